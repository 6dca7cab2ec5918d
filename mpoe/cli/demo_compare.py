"""`mpoe demo --compare`: the gain of a mixture, its size and its cost; from conversion to reload, on data that comes
with Python."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpoe.cli.demo import MODEL_FOLDER
from mpoe.cli.demo_arms import (
    NUM_EXPERTS,
    Settings,
    count_parameters,
    demo_tasks,
    train_arm,
    training_items,
)
from mpoe.cli.demo_tables import (
    LARGE_NAMES,
    check,
    comparison_lines,
    comparison_table,
    show_comparison,
    what_holds,
)


class Stages:
    """Seconds of every stage, in order; times under the same name are added."""

    def __init__(self, console: Any) -> None:
        self.console = console
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        self.console.print(f"[dim]{name}: {time.perf_counter() - start:.1f} s[/dim]", highlight=False)


@dataclass(frozen=True)
class Demo:
    """Shared state of a demo's stages. ``kind``: key of `SETTINGS`; ``start``: from `time.perf_counter`."""

    output_dir: Path
    kind: str
    settings: Settings
    seed: int
    start: float
    console: Any
    stages: Stages


def run(output_dir: Path, kind: str, settings: Settings, seed: int) -> dict[str, Any]:
    """The demo; returns what ``results.json`` holds."""
    from rich.console import Console

    start, console = time.perf_counter(), Console()
    stages = Stages(console)
    demo = Demo(output_dir, kind, settings, seed, start, console, stages)
    console.print(f"[bold]mpoe demo[/bold]: {kind} stand-in, tasks {', '.join(settings.tasks)}, output in {output_dir}")
    with stages.stage("import torch and transformers"):
        import torch
        from transformers import set_seed

        from mpoe.cli.pretrained import quiet_transformers
        from mpoe.cli.scoring import encode_task
        from mpoe.data.embedded import load_stand_in
        from mpoe.models import convert_to_mpoe
        from mpoe.training import MPOETrainer  # noqa: F401 - its import belongs to this stage

        quiet_transformers()
    with stages.stage("load the stand-in and read the documentation"):
        tasks = demo_tasks(settings)
        dense, tokenizer = load_stand_in(kind)
        items = training_items(settings, tasks, tokenizer, settings.steps, seed)
        probe = encode_task(tasks[0], "test", tokenizer, 32)
    console.print(comparison_lines(settings)[0], highlight=False)

    with stages.stage(f"time a layer of {settings.large}"):
        from mpoe.cli.demo_cost import hidden_size, large_costs
        from mpoe.models.widen import widened

        torch.manual_seed(0)
        large = large_costs(settings)
    models: dict[str, Any] = {}
    arms: list[dict[str, Any]] = []
    with stages.stage("convert"):
        for arm in settings.arms:
            set_seed(seed)
            if arm.experts is not None:
                models[arm.key] = convert_to_mpoe(dense, arm.config())
            elif arm.as_large_as is None:
                models[arm.key] = dense
        report = models[settings.main_arm].parameter_report()
        base = count_parameters(report, dense=True)["experts"]
        for arm in settings.arms:
            if arm.as_large_as is not None:
                weights = count_parameters(models[arm.as_large_as].parameter_report())["experts"]
                set_seed(seed)
                models[arm.key] = widened(dense, round(weights / base * hidden_size(dense.config)))
        differences = {
            key: largest_difference(dense, model, probe, tokenizer.pad_token_id)
            for key, model in models.items()
            if key != "dense"
        }
    for arm in settings.arms:
        model, difference = models[arm.key], differences.get(arm.key)
        if difference is not None:
            console.print(f"{arm.name}: largest difference from the dense logits, relative: {difference:.1e}")
    for arm in settings.arms:
        model = models[arm.key]
        set_seed(seed)
        result = train_and_score(demo, arm, model, tokenizer, tasks, items)
        result["conversion_difference"] = differences.get(arm.key)
        if arm.experts is not None:
            result["parameters"] = count_parameters(model.parameter_report())
        else:
            grown = sum(p.numel() for p in model.parameters()) - report["dense_total"]
            result["parameters"] = count_parameters(report, dense=True, grown=grown)
        result["large"] = large[arm.key]
        arms.append(result)

    with stages.stage("save, reload, compare, generate"):
        same, examples = save_and_reload(
            models[settings.main_arm], tokenizer, tasks, probe, output_dir / MODEL_FOLDER, settings
        )
    return finish(demo, arms, same, examples)


def logits_and_mask(model: Any, items: list[dict], pad_token_id: int) -> tuple[Any, Any]:
    """Logits [B, S, V] of encoded items and the mask [B, S] of the positions that are not padding."""
    import torch

    from mpoe.data.collate import IGNORED_LABEL, PaddingCollator
    from mpoe.data.predict import evaluation_mode

    batch = PaddingCollator(pad_token_id)(items)
    with torch.inference_mode(), evaluation_mode(model):
        return model(**batch).logits, batch["labels"] != IGNORED_LABEL


def largest_difference(dense: Any, converted: Any, items: list[dict], pad_token_id: int) -> float:
    """``max |difference| / max |logit|`` of two models on the positions that are not padding."""
    first, mask = logits_and_mask(dense, items, pad_token_id)
    second, _ = logits_and_mask(converted, items, pad_token_id)
    return float((first - second)[mask].abs().max() / first[mask].abs().max())


def train_and_score(
    demo: Demo, arm: Any, model: Any, tokenizer: Any, tasks: Sequence[Any], items: list[dict]
) -> dict[str, Any]:
    """Train one arm and score it on the held-out items."""
    import tempfile

    from rich.progress import Progress

    from mpoe.cli.scoring import encode_task, evaluate_tasks, expert_load
    from mpoe.data.tasks import average_score

    with demo.stages.stage(f"train: {arm.name}"):
        with tempfile.TemporaryDirectory() as scratch, Progress(console=demo.console, transient=True) as bar:
            ticker = bar.add_task(f"train {arm.name}", total=len(items) // demo.settings.batch)
            result = train_arm(
                *(model, arm, items, demo.settings, tokenizer.pad_token_id, Path(scratch), demo.seed),
                lambda n: bar.advance(ticker, n),
            )
    with demo.stages.stage(f"evaluate: {arm.name}"):
        found = evaluate_tasks(model, tokenizer, tasks, "test")
        sample = [item for task in tasks for item in encode_task(task, "test", tokenizer, 128 // len(tasks))]
        load = expert_load(model, sample, tokenizer.pad_token_id)
    return {
        "key": arm.key,
        "name": arm.name,
        "experts_config": arm.experts,
        **result,
        "scores": found.scores,
        "mean": average_score(found.scores),
        "baselines": found.baselines,
        "remarks": found.remarks,
        "expert_load": load,
    }


def save_and_reload(
    model: Any, tokenizer: Any, tasks: Sequence[Any], probe: list[dict], folder: Path, settings: Settings
) -> tuple[bool, list[dict[str, str]]]:
    """Save, load again, compare logits bit for bit, and let the reloaded model write a few answers."""
    import torch

    from mpoe.cli.files import model_folder
    from mpoe.cli.generate import generate_one
    from mpoe.models import load_mpoe

    with model_folder(folder) as staging:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
    reloaded = load_mpoe(folder).eval()
    first, _ = logits_and_mask(model, probe, tokenizer.pad_token_id)
    second, _ = logits_and_mask(reloaded, probe, tokenizer.pad_token_id)
    examples = []
    for task in tasks:
        for example in task.test()[: 2 if len(tasks) > 1 else 3]:
            prompt, expected = example.source, example.target
            if settings.causal:
                prompt, expected = example.source[:60], example.source[60:120]
            text = generate_one(reloaded, tokenizer, prompt, max_new_tokens=24, do_sample=False)
            examples.append({"prompt": prompt, "expected": expected, "generated": text})
    return bool(torch.equal(first, second)), examples


def finish(demo: Demo, arms: list[dict[str, Any]], same: bool, examples: list[dict[str, str]]) -> dict[str, Any]:
    """Check the claim, write results and report, and show the table."""
    from mpoe.cli.files import REPORT_FILE, RESULTS_FILE, write_json
    from mpoe.cli.info import collect
    from mpoe.cli.report import write_demo_report

    facts, settings, kind, output_dir = collect(), demo.settings, demo.kind, demo.output_dir
    results: dict[str, Any] = {
        "model": kind,
        "seed": demo.seed,
        "steps": settings.steps,
        "batch": settings.batch,
        "num_experts": NUM_EXPERTS,
        "score": "perplexity, lower is better" if settings.causal else "mean test score here, per cent",
        "large": LARGE_NAMES[settings.large],
        "comparison": comparison_lines(settings),
        "arms": arms,
        "holds": what_holds(arms, settings),
        "check": check(arms, settings),
        "reloaded_equal": same,
        "examples": examples,
        "versions": {"mpoe": facts["mpoe"], "python": facts["python"]}
        | {name: facts["packages"][name] for name in ("torch", "transformers", "numpy")},
        "threads": facts["torch_threads"],
        "stages": demo.stages.seconds,
    }
    header, rows = comparison_table(arms, settings)
    with demo.stages.stage("write the report"):
        write_demo_report(output_dir / REPORT_FILE, results, header, rows)
    results["seconds"] = time.perf_counter() - demo.start
    write_json(output_dir / RESULTS_FILE, results)
    show_comparison(demo.console, results, header, rows)
    demo.console.print(
        f"{output_dir / REPORT_FILE}, {output_dir / RESULTS_FILE} and the model in {output_dir / MODEL_FOLDER}"
    )
    return results
