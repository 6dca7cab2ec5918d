"""The demo's story: experts of three domains, trained apart beside one model, become a mixture that sorts by itself."""

from __future__ import annotations

import html
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpoe.cli.html import note, table, write_page
from mpoe.cli.inspect_report import expert_colour
from mpoe.data.demo_texts import DOMAINS, domain_text
from mpoe.data.documentation import load_documentation
from mpoe.data.embedded import load_stand_in
from mpoe.inspection.composed import Worth, composed_worth, token_losses
from mpoe.inspection.routes import route_text
from mpoe.models import (
    collect_statistics,
    compose_experts,
    merge_expert,
    save_expert,
    start_expert,
)
from mpoe.models.expert_mixture import keep_experts

STEPS, BATCH, LENGTH = 120, 8, 128
NEURONS, RATE = 64, 0.01
TESTED = 24  # pieces of each held-out text
SHOWN = 22  # tokens of each domain in the picture
FOREIGN = "documentation"
HEADER = ("held-out text", "base", "own expert", "composed", "merged")
_MEANING = (
    "Nats per token, lower is better. Own expert: the right one is named for every text, and is always on (for "
    f"{FOREIGN}, which no expert saw: the mean of the three). Composed: one mixture, whose routers were solved from "
    "the experts' files alone, and nobody says which text is which. Merged: one dense network with the neurons of all "
    "experts at a third of their weight."
)
_PICTURE = "Every token of a text that changes its domain, coloured by the expert that most layers sent it to."


def _pieces(tokenizer: Any, text: str, most: int | None = None) -> Tensor:
    ids = tokenizer(text)["input_ids"]
    count = min(len(ids) // LENGTH, most or len(ids))
    return torch.tensor(ids[: count * LENGTH]).view(count, LENGTH)


def _batches(pieces: Tensor) -> list[dict[str, Tensor]]:
    return [{"input_ids": part, "labels": part} for part in pieces.split(BATCH)]


def _train(base: Any, pieces: Tensor, steps: int, seed: int) -> Any:
    """An expert beside ``base``, trained on random pieces."""
    torch.manual_seed(seed)
    model = start_expert(base, NEURONS).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps + 1, pct_start=0.1)
    for _ in range(steps):
        ids = pieces[torch.randint(len(pieces), (BATCH,))]
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval()


def _loss(model: Any, batches: Sequence[Mapping[str, Tensor]]) -> float:
    return float(token_losses(model, batches).mean())


def token_experts(mixture: Any, tokenizer: Any, text: str) -> list[tuple[str, int]]:
    """Every token of a text with the expert that most layers sent it to first."""
    (route,) = route_text(mixture, tokenizer, text)
    chosen = [Counter(layer[place][0] for layer in route.experts) for place in range(len(route.tokens))]
    return [(token, counts.most_common(1)[0][0]) for token, counts in zip(route.tokens, chosen, strict=True)]


def run(output_dir: Path, steps: int, seed: int) -> dict[str, Any]:
    """The demo; returns what ``results.json`` holds."""
    from rich.console import Console

    from mpoe.cli.demo import MODEL_FOLDER
    from mpoe.cli.files import REPORT_FILE, RESULTS_FILE, model_folder, write_json
    from mpoe.cli.pretrained import quiet_transformers

    quiet_transformers()
    start, console = time.perf_counter(), Console()
    base, tokenizer = load_stand_in("gpt2")
    tokenizer.model_max_length = 10**9  # texts are cut into pieces below
    held_out = {name: _batches(_pieces(tokenizer, domain_text(name, True), TESTED)) for name in DOMAINS}
    foreign = "\n\n".join(record.text for record in load_documentation().split("test")[::7])
    held_out[FOREIGN] = _batches(_pieces(tokenizer, foreign, TESTED))
    losses = {text: {"base": _loss(base, batches)} for text, batches in held_out.items()}
    files, always_on = [], []
    (output_dir / "experts").mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(DOMAINS):
        begun, pieces = time.perf_counter(), _pieces(tokenizer, domain_text(name, False))
        model = _train(base, pieces, steps, seed + number)
        files.append(output_dir / "experts" / f"{name}.expert")
        statistics = collect_statistics(model, _batches(pieces[:256]))
        save_expert(model, files[-1], statistics=statistics, tokenizer=tokenizer, training={"steps": steps})
        losses[name]["own"] = _loss(model, held_out[name])
        always_on.append(_loss(model, held_out[FOREIGN]))
        console.print(
            f"trained {files[-1]} on {pieces.numel():,} tokens in {time.perf_counter() - begun:.0f} s: "
            f"{losses[name]['base']:.2f} -> {losses[name]['own']:.2f} nats per token",
            highlight=False,
            soft_wrap=True,
        )
    losses[FOREIGN]["own"] = sum(always_on) / len(always_on)
    mixture = compose_experts(base, files, tokenizer=tokenizer)
    merged = merge_expert(base, files, weight=1 / len(files))
    for text, batches in held_out.items():
        losses[text] |= {"composed": _loss(mixture, batches), "merged": _loss(merged, batches)}
    classes = [*(expert.statistics for expert in mixture.composed_of), mixture.background_statistics]
    worth = composed_worth(mixture, classes, [batch for name in DOMAINS for batch in held_out[name]])
    shown = "\n".join(tokenizer.decode(held_out[name][0]["input_ids"][0][:SHOWN]) for name in DOMAINS)
    with model_folder(output_dir / MODEL_FOLDER) as staging:
        mixture.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        keep_experts(mixture, staging)
    results: dict[str, Any] = {
        "steps": steps,
        "seed": seed,
        "experts": worth.names,
        "losses": losses,
        "kept": kept(losses),
        "worth": vars(worth),
        "picture": token_experts(mixture, tokenizer, shown),
        "megabytes": {file.name: file.stat().st_size / 1e6 for file in files},
        "seconds": time.perf_counter() - start,
    }
    write_report(output_dir / REPORT_FILE, results)
    write_json(output_dir / RESULTS_FILE, results)
    _show(console, results, worth)
    console.print(f"{output_dir / REPORT_FILE}, {output_dir / RESULTS_FILE}, experts and the mixture in {output_dir}")
    return results


def kept(losses: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Share of its own expert's gain that the mixture keeps, by domain."""
    return {
        n: (own["base"] - own["composed"]) / (own["base"] - own["own"]) for n, own in losses.items() if n in DOMAINS
    }


def rows_of(losses: Mapping[str, Mapping[str, float]]) -> list[list[str]]:
    """The table's rows, as in `HEADER`."""
    columns = ("base", "own", "composed", "merged")
    return [[text, *(f"{own[column]:.3f}" for column in columns)] for text, own in losses.items()]


def conclusions(results: Mapping[str, Any]) -> list[str]:
    """What the numbers say, and what they do not."""
    losses, shares = results["losses"], results["kept"]
    own = {column: value - losses[FOREIGN]["base"] for column, value in losses[FOREIGN].items()}
    told = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
    return [
        f"Of its own expert's gain the mixture keeps: {told}; nobody said which text is which.",
        f"Forgetting, on {FOREIGN}, which no expert saw: an expert that is always on {own['own']:+.3f} nats, the "
        f"mixture {own['composed']:+.3f}, merged {own['merged']:+.3f}.",
        "What this does not show: larger models, longer training, domains that are nearer to each other.",
    ]


def _show(console: Any, results: Mapping[str, Any], worth: Worth) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    picture, colours = Text(), [expert_colour(number, len(worth.names)) for number in range(len(worth.names))]
    for token, expert in results["picture"]:
        picture.append(token.replace("\\n", " "), style=f"black on {colours[expert]}")
    console.print(Text(_PICTURE, style="dim"))
    console.print(picture)
    console.print(*(Text(f" {n} ", style=f"black on {c}") for n, c in zip(worth.names, colours, strict=True)))
    shown = Table(title=f"mpoe demo: {results['steps']} steps per expert, seed {results['seed']}", box=box.SIMPLE_HEAD)
    for place, name in enumerate(HEADER):
        shown.add_column(name, justify="right" if place else "left")
    for row in rows_of(results["losses"]):
        shown.add_row(*row)
    console.print(shown)
    for line in [*conclusions(results), f"{results['seconds']:.0f} seconds."]:
        console.print(Text(line))


def write_report(file: Path, results: Mapping[str, Any]) -> None:
    """Write ``report.html``: the table, what it says, the coloured tokens, what each expert is worth."""
    names, worth = results["experts"], results["worth"]
    colours = [expert_colour(number, len(names)) for number in range(len(names))]
    spans = [
        f'<span style="background:{colours[expert]}" title="{names[expert]}">{html.escape(token)}</span>'
        for token, expert in results["picture"]
    ]
    legend = [f'<span style="background:{c}">&nbsp;{n}&nbsp;</span> ' for n, c in zip(names, colours, strict=True)]
    without = zip(names, worth["share"], worth["alone"], worth["removed"], strict=True)
    rows = [[n, f"{s:.0%}", f"{a:.3f}", f"{r - worth['loss']:+.3f}"] for n, s, a, r in without]
    parts = [
        "<h1>mpoe demo: experts trained apart, composed</h1>",
        f"<ul>{''.join(f'<li>{html.escape(line)}</li>' for line in conclusions(results))}</ul>",
        table(HEADER, rows_of(results["losses"])),
        note(_MEANING),
        f"<h2>Who took which token</h2><p>{_PICTURE}</p><p>{''.join(legend)}</p>",
        f'<p class="picture">{"".join(spans)}</p>',
        "<h2>What each expert is worth</h2>",
        table(("expert", "share of choices", "loss if alone", "removing it adds"), rows),
        note(
            f"On the three held-out texts together: the mixture {worth['loss']:.3f} nats per token, the best single "
            f"expert for every token (an oracle) {worth['oracle']:.3f}."
        ),
    ]
    write_page(file, "mpoe demo", parts, ".picture { white-space: pre-wrap; line-height: 1.7; }")
