"""`mpoe demo`: three experts are trained apart beside one small model and composed into a mixture
without their texts.

Model and texts come with the installation. `--compare` instead compares a dense model, a wider one,
Switch and MPO experts that are trained alike: gain and size."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mode
from typing import Any, ClassVar

import torch
from markupsafe import Markup
from rich.console import Console
from rich.text import Text
from transformers.utils import logging

from mpoe.cli import compare, train
from mpoe.cli.command import CommandError, Request, as_command, check_installed, option
from mpoe.cli.outputs import (
    MODEL_OR_RUN,
    REPORT_FILE,
    RESULTS_FILE,
    check_model_output,
    check_output,
    model_folder,
    write_json,
)
from mpoe.cli.report import Table, expert_colours, routes_html, section, write_page
from mpoe.cli.short_help import SHORT
from mpoe.config.checks import check_seed
from mpoe.data.documentation import load_documentation
from mpoe.data.domains import DOMAINS, domain_text
from mpoe.data.predict import token_losses
from mpoe.data.stand_in_models import load_stand_in
from mpoe.inspection import Route, route_text
from mpoe.models import collect_statistics, compose_experts, merge_expert, save_expert, start_expert
from mpoe.models.background import own_texts, pooled_background, token_batches
from mpoe.models.expert_mixture import (
    AT_ONCE,
    EXPERTS_FOLDER,
    batches,
    documentation_batches,
    keep_experts,
    pieces,
)
from mpoe.training.run_lock import hold

MODEL_FOLDER = "model"


@dataclass
class DemoOptions:
    """Options of the demo."""

    output_dir: Path = option(
        Path("mpoe_demo"), "folder for report.html, results, and experts and model or the runs"
    )
    compare: bool = option(False, "compare dense, wider, Switch and MPO experts")
    model: str = option(
        "t5",
        "of --compare: t5 (documentation) or gpt2 (language modelling)",
        choices=["t5", "gpt2"],
    )
    steps: int | None = option(None, "training steps per expert or arm; default: the tuned budget")
    seed: int = option(0, "of data order, routers and dropout")
    overwrite: bool = option(False, "replace the demo in the output folder")

    LEAST: ClassVar[dict[str, int]] = {"steps": 1}

    def __post_init__(self) -> None:
        check_seed("seed", self.seed)


@as_command(SHORT["demo"].usage, DemoOptions)
def command(request: Request) -> None:
    """Train and compose the experts, or compare the arms, in the output folder."""
    (options,) = request.options
    if "model" in request.given and not options.compare:
        raise CommandError(
            "model is for --compare; the experts are trained beside the embedded GPT-2"
        )
    if options.compare:
        check_installed("train")
    patterns = (RESULTS_FILE, REPORT_FILE, EXPERTS_FOLDER, MODEL_FOLDER, *ARMS)
    folder = check_output(
        "output_dir",
        options.output_dir,
        options.overwrite,
        "an earlier demo",
        patterns,
        MODEL_OR_RUN,
    )
    with hold(folder):
        for name in (RESULTS_FILE, REPORT_FILE):
            (folder / name).unlink(missing_ok=True)  # stale if this demo is killed
        if options.compare:
            compare_arms(folder, options.model, options.steps, options.seed)
        else:
            train_experts(folder, options.steps or STEPS, options.seed)


# ------------------------------------------------------------------------ --compare: `mpoe train`,
# arm by arm

_HIDDEN = "--shape hidden --block_size 16 --top_k 2"
# options of each arm; the wider dense model has as many weights as the hidden mixture
ARMS = {
    "dense": "--baseline dense",
    "wider": f"--baseline wider {_HIDDEN}",
    "switch": "--baseline switch",
    # blocks at the rate of the rest
    "hidden": f"{_HIDDEN} --regime scratch --auxiliary_lr_scale 1.0",
    "separable": "--shape separable",
}
# Options by model, and rates of the baselines and of the mixtures, chosen on the validation items:
# of T5 from .001, .0015 and .002 with 200 steps of two seeds.
SETTINGS = {
    "t5": ("--tasks doc_module --max_steps 200 --per_device_train_batch_size 32", "1e-3", "1.5e-3"),
    "gpt2": ("--tasks doc_lm --max_steps 60 --per_device_train_batch_size 16", "3e-4", "3e-4"),
}
_ALIKE = (
    "--lr_scheduler_type cosine --warmup_steps 0.05 --weight_decay 0.01 --logging_steps 5 "
    "--eval_strategy no"
)
_ALIKE += " --save_strategy no --use_cpu --disable_tqdm true --report_to none --overwrite"
_COMPARED = (
    "The same start, the same items in the same order, one seed. So short a training from a "
    "pretrained start hardly needs experts, and seeds differ by a point or so: larger models, "
    "longer training and other data may differ. Parameters and FLOPs of a large model: mpoe plan "
    "t5-base."
)


def compare_arms(output_dir: Path, kind: str, steps: int | None, seed: int) -> None:
    """Train the arms alike, each in a folder of its own, and put them side by side."""
    settings, of_baselines, of_mixtures = SETTINGS[kind]
    settings += f" --model {kind} --seed {seed} {_ALIKE}" + (
        f" --max_steps {steps}" if steps else ""
    )
    for arm, options in ARMS.items():
        print(f"{arm}:")
        rate = of_baselines if "--baseline" in options else of_mixtures
        words = f"{settings} --learning_rate {rate} {options}"
        train.command([*words.split(), "--output_dir", str(output_dir / arm)])
    compare.command(
        [*(str(output_dir / arm) for arm in ARMS), "--output_dir", str(output_dir), "--overwrite"]
    )
    print(_COMPARED)


# ------------------------------------------------------------------------------ experts, trained
# apart

STEPS = 60
LENGTH = 128
NEURONS = 64
RATE = 0.01
TESTED = 24  # pieces of each held-out text
SHOWN = 22  # tokens of each domain in the picture
FOREIGN = "documentation"
COLUMNS = ("base", "own", "composed", "merged")
HEADER = ("held-out text", "base", "own expert", "composed", "merged")
_MEANING = (
    "Nats per token, lower is better. Own expert: the right one is named for every text, and is "
    f"always on (for {FOREIGN}, which no expert saw: the mean of the three). Composed: one "
    "mixture, whose routers were solved from the experts' files alone, and nobody says which text "
    "is which. Merged: one dense network with the neurons of all experts at a third of their "
    "weight."
)
_PICTURE = (
    "Every token of a text that changes its domain, coloured by the expert that most layers "
    "sent it to."
)


def train_experts(output_dir: Path, steps: int, seed: int) -> dict[str, Any]:
    """Experts of three domains, trained apart, become a mixture that sorts by itself; returns the
    results."""
    logging.disable_progress_bar()
    start = time.perf_counter()
    base, tokenizer = load_stand_in("gpt2")
    tokenizer.model_max_length = 10**9  # texts are cut into pieces

    def cut(text: str, most: int = 10**4) -> Any:
        return pieces(text, tokenizer, LENGTH, most, "the text")

    def loss(model: Any, text: str) -> float:
        return float(token_losses(model, held_out[text]).mean())

    held_out = {name: batches(cut(domain_text(name, True), TESTED)) for name in DOMAINS}
    foreign = "\n\n".join(record.text for record in load_documentation("test")[::7])
    held_out[FOREIGN] = batches(cut(foreign, TESTED))
    losses = {text: {"base": loss(base, text)} for text in held_out}
    files = []
    always_on = []
    (output_dir / EXPERTS_FOLDER).mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(DOMAINS):
        started = time.perf_counter()
        domain_pieces = cut(domain_text(name, False))
        model = _train(base, domain_pieces, steps, seed + number)
        files.append(output_dir / EXPERTS_FOLDER / f"{name}.expert")
        statistics = collect_statistics(model, batches(domain_pieces[:256]))
        save_expert(
            model, files[-1], statistics=statistics, tokenizer=tokenizer, training={"steps": steps}
        )
        losses[name]["own"] = loss(model, name)
        always_on.append(loss(model, FOREIGN))
        seconds = time.perf_counter() - started
        print(
            f"trained {files[-1]} on {domain_pieces.numel():,} tokens in {seconds:.0f} s: "
            f"{losses[name]['base']:.2f} -> {losses[name]['own']:.2f} nats per token"
        )
    losses[FOREIGN]["own"] = sum(always_on) / len(always_on)
    # Not the general text of the default background, which is a domain here.
    said = [token_batches(own_texts(base, tokenizer)), documentation_batches(base, tokenizer)]
    mixture = compose_experts(
        base, files, background=pooled_background(base, said), tokenizer=tokenizer
    )
    merged = merge_expert(base, files, weight=1 / len(files))
    for text in held_out:
        losses[text] |= {"composed": loss(mixture, text), "merged": loss(merged, text)}
    shown = "\n".join(
        tokenizer.decode(held_out[name][0]["input_ids"][0][:SHOWN]) for name in DOMAINS
    )
    routes = route_text(mixture, tokenizer, shown)
    first = zip(*([best[0] for best in layer] for layer in routes[0].experts), strict=True)
    with model_folder(
        check_model_output("model", output_dir / MODEL_FOLDER, True), mixture, tokenizer
    ) as staging:
        keep_experts(mixture, staging)
    results: dict[str, Any] = {
        "steps": steps,
        "seed": seed,
        "experts": mixture.config.mpoe_experts,
        "losses": losses,
        "kept": kept(losses),
        "picture": [
            (token, mode(of_layers))
            for token, of_layers in zip(routes[0].tokens, first, strict=True)
        ],
        "megabytes": {file.name: file.stat().st_size / 1e6 for file in files},
        "seconds": time.perf_counter() - start,
    }
    _tell(output_dir / REPORT_FILE, results, routes)
    write_json(output_dir / RESULTS_FILE, results)
    print(
        f"{output_dir / REPORT_FILE}, {output_dir / RESULTS_FILE}, experts and the mixture in "
        f"{output_dir}"
    )
    return results


def _train(base: Any, pieces: Any, steps: int, seed: int) -> Any:
    """An expert beside ``base``, trained on random pieces."""
    torch.manual_seed(seed)
    model = start_expert(base, NEURONS).train()
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, RATE, total_steps=steps + 1, pct_start=0.1
    )
    for _ in range(steps):
        ids = pieces[torch.randint(len(pieces), (AT_ONCE,))]
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval()


def kept(losses: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Share of its own expert's gain that the mixture keeps, by domain."""
    domains = {name: losses_of_text for name, losses_of_text in losses.items() if name != FOREIGN}
    return {
        n: (losses_of_text["base"] - losses_of_text["composed"])
        / (losses_of_text["base"] - losses_of_text["own"])
        for n, losses_of_text in domains.items()
    }


def conclusions(results: Mapping[str, Any]) -> list[str]:
    """What the numbers say, and what they do not."""
    losses = results["losses"]
    shares = results["kept"]
    excess = {column: value - losses[FOREIGN]["base"] for column, value in losses[FOREIGN].items()}
    kept_shares = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
    return [
        f"Of its own expert's gain the mixture keeps: {kept_shares}; nobody said which "
        "text is which.",
        f"Forgetting, on {FOREIGN}, which no expert saw: an expert that is always on "
        f"{excess['own']:+.3f} nats, the mixture {excess['composed']:+.3f}, merged "
        f"{excess['merged']:+.3f}.",
        "What this does not show: larger models, longer training, domains that are nearer to each "
        "other.",
    ]


def _tell(file: Path, results: Mapping[str, Any], routes: Sequence[Route]) -> None:
    """Print, and write as ``report.html``: the coloured tokens, the table and what it says."""
    names = results["experts"]
    said = conclusions(results)
    rows = [
        [text, *(f"{by_column[column]:.3f}" for column in COLUMNS)]
        for text, by_column in results["losses"].items()
    ]
    losses = Table(
        HEADER,
        rows,
        f"mpoe demo: {results['steps']} steps per expert, seed {results['seed']}",
        _MEANING,
    )
    colours = expert_colours(len(names))
    tokens = [
        Text(token.replace("\\n", " "), f"black on {colours[expert]}")
        for token, expert in results["picture"]
    ]
    known = [
        Text(f" {name} ", f"black on {colour}") for name, colour in zip(names, colours, strict=True)
    ]
    Console().print(
        _PICTURE, Text.assemble(*tokens), Text(" ").join(known), sep="\n", highlight=False
    )
    losses.show()
    print("\n".join([*said, f"{results['seconds']:.0f} seconds."]))
    lines = Markup("<ul>{}</ul>").format(
        Markup("").join(Markup("<li>{}</li>").format(line) for line in said)
    )
    note = "A column for each token, a row for each layer."
    picture = section("Who took which token", routes_html([("", routes)], names), note=note)
    write_page(
        file, "mpoe demo: experts trained apart, composed", [lines, losses.section(), picture]
    )
