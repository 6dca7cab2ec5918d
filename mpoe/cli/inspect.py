"""`mpoe inspect MODEL`: routes of tokens, singular values at the bonds, growth of parameters; as a report with plots.

Of a mixture that `mpoe compose` made of experts it also says what each expert is worth on the texts: the loss without
it, and the distance to the best single expert of every token.

MODEL is the folder of a converted model or of a training run, whose curves are drawn too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from transformers import DataCollatorForSeq2Seq

from mpoe.cli import models, report
from mpoe.cli.command import Asked, CommandError, as_command, option
from mpoe.cli.evaluate import encode_task, expert_load
from mpoe.cli.models import MODEL_OR_RUN, REPORT_FILE, check_output, write_json
from mpoe.cli.tasks import DataOptions, data_of_run, resolve
from mpoe.data.task import Task
from mpoe.inspection import Worth, bond_spectra, composed_worth, parameter_growth, route_text
from mpoe.layers.cores import MPOCores
from mpoe.models.expert_mixture import EXPERTS_FOLDER, kept_experts
from mpoe.models.others import facts
from mpoe.models.report import HEADER, LEGEND, routed_layers, short_name, summarize
from mpoe.models.table import ENCODER, SEQ2SEQ
from mpoe.training.output_dir import METRICS_FILE, read_metrics

NUMBERS_FILE = "inspect.json"
PLOTS = ("expert_load", "bond_spectra", "parameters", "training")
_AT_ONCE = 16  # items of a batch
_MAX_TOKENS = 60  # of the items that are shown when no text is given
_WORDS = {
    "Which expert took which token": (
        "A column for each token, a row for each layer; the number is the expert that the router gave the token to, "
        "and the colour says the same. Hold the pointer over a cell to see the router's probability. A row of one "
        "colour is a layer that sends everything to one expert; equal tokens show whether a layer sorts by word or by"
        " context."
    ),
    "What each expert is worth": (
        "Losses in nats per token, on {} predicted tokens. \"Alone\": all tokens go to this expert ('none' is the "
        'base). "Without": the mixture composed without it; what that adds is the price of removing the expert. The '
        "oracle gives every token the single expert that predicts it best, so it is a bound that no router reaches."
    ),
    "Expert load": (
        "The share of its tokens that each layer gave to each expert, counted on {}. Padding is not counted. An "
        "expert near 0 learns nothing from such data; raise balance_loss_weight if training does not cure it."
    ),
    "What the bonds carry": (
        "Cutting an expert's matrix in two at a bond of dimension d leaves d singular values there; their "
        "entanglement entropy S gives the effective rank exp(S): over how many of the d directions the weight is "
        "spread. Near 100% of d, a smaller max_bond would cost accuracy; a low share means that truncation is cheap. "
        "The lines are the singular values, averaged over the experts."
    ),
    "Parameters against experts": (
        "A dense expert brings full weights of its own, an MPO expert its auxiliary cores and a row of the router."
    ),
    "Training": ("From the run's metrics.jsonl; pale lines are the raw values, the others running means."),
}


@dataclass
class InspectOptions:
    """Options that only `inspect` has."""

    text: list[str] = option([], "sentences whose tokens are followed; default: the first two items of the data")
    output_dir: str = option("mpoe_inspect", "folder for report.html, plots and inspect.json")
    overwrite: bool = option(False, "replace the report in the output folder")
    split: str = option("validation", "items that the expert load is counted on")
    num_items: int = option(256, "at most so many of them")
    num_tokens: int = option(2048, "tokens of the pass that plans are for")

    LEAST: ClassVar[dict[str, int]] = {"num_items": 1, "num_tokens": 1}

    def __post_init__(self) -> None:
        if any(not text.strip() for text in self.text):
            raise ValueError("text must hold words; got an empty one")


@as_command("mpoe inspect MODEL [--flag value ...]", InspectOptions, DataOptions, words=(1, 1))
def command(asked: Asked) -> None:
    """Inspect the model; write the plots, the numbers and, last, the report."""
    (options, data), (name,) = asked.options, asked.words
    data, seed, described = data_of_run(name, data, asked.given)
    folder = Path(options.output_dir)
    check_output("output_dir", folder, options.overwrite, "an earlier report", [REPORT_FILE], MODEL_OR_RUN)
    source = models.find(name)
    if not source.is_mpoe:
        raise CommandError(
            f"{name} is a dense {source.model_type}; inspect looks into mixtures: mpoe convert {name} OUT, then "
            "mpoe inspect OUT"
        )
    tokenizer = models.load_tokenizer(source)
    style = SEQ2SEQ if source.style == ENCODER else source.style
    tasks = resolve(data.eval_tasks or data.tasks, data, style, seed, described)
    items = _items(source.style, options, tasks, tokenizer)
    model = models.load_model(source)
    counted = f"{len(items)} {options.split} items of {', '.join(task.name for task in tasks)}"
    print(f"{name}: counting {counted}, following tokens, reading bonds")
    worth = None if source.style == ENCODER else _worth(Path(name), model, tokenizer, items, options.text)
    _report(folder, name, model, tokenizer, items, counted, options, worth)
    if worth is not None:
        print("\n".join(f"{row[0]}: {row[1]} of tokens, {row[4]} nats if removed" for row in worth_rows(worth)))
        print(f"the mixture has {worth.loss:.3f} nats per token, {worth.loss - worth.oracle:.3f} more than the oracle")
    print(f"plots, numbers and report are in {folder}; open {folder / REPORT_FILE}")


def _items(style: str, options: InspectOptions, tasks: Sequence[Task], tokenizer: Any) -> list[dict[str, Any]]:
    """Encoded items on which the expert load is counted; an encoder reads only the inputs."""
    share = -(-options.num_items // len(tasks))
    if style != ENCODER:
        return [item for task in tasks for item in encode_task(task, options.split, tokenizer, share, style)]
    texts = [example.source for task in tasks for example in task.examples(options.split)[:share]]
    encoded = tokenizer(texts, truncation=True, max_length=128)
    names = ("input_ids", "attention_mask")
    return [dict(zip(names, item, strict=True)) for item in zip(*(encoded[name] for name in names), strict=True)]


def _worth(folder: Path, model: Any, tokenizer: Any, items: list[dict[str, Any]], texts: Sequence[str]) -> Worth | None:
    """What the experts of a composed mixture are worth on ``texts``, or on the items; None for other models."""
    if not (folder / EXPERTS_FOLDER).is_dir():
        return None
    experts, background = kept_experts(folder)
    classes = [*(expert.statistics for expert in experts), *([] if background is None else [background])]
    if texts and not model.config.is_encoder_decoder:
        rows = tokenizer(list(texts))["input_ids"]
        items = [{"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids} for ids in rows]
    collate = DataCollatorForSeq2Seq(tokenizer)
    parts = (items[start : start + _AT_ONCE] for start in range(0, len(items), _AT_ONCE))
    return composed_worth(model, classes, [collate(part) for part in parts])


def worth_rows(worth: Worth) -> list[list[str]]:
    """Share of tokens, loss alone, loss without and what removing adds, by expert."""
    parts = zip(worth.names, worth.share, worth.alone, worth.removed, strict=True)
    return [[n, f"{s:.0%}", f"{a:.3f}", f"{r:.3f}", f"{r - worth.loss:+.3f}"] for n, s, a, r in parts]


def _spectra(weights: Sequence[Any]) -> dict[str, dict[str, list[Any]]]:
    """Bonds of MPO weights by kind (up, down, an attention projection's name, ...) and layer."""
    found: dict[str, dict[str, list[Any]]] = {}
    for row in weights:
        layer, _, kind = short_name(row.name).rpartition(".")
        bonds = bond_spectra(row.cores) if isinstance(row.cores, MPOCores) else []
        if bonds:
            found.setdefault(kind, {})[layer or kind] = bonds
    return found


def _report(
    folder: Path,
    name: str,
    model: Any,
    tokenizer: Any,
    items: list[dict[str, Any]],
    counted: str,
    options: InspectOptions,
    worth: Worth | None,
) -> None:
    """Look into the model section by section, then write everything."""
    config, parameters = model.mpoe_config, model.parameter_report()
    layers = [short_name(layer) for layer, _ in routed_layers(model)]
    parts, drawn = [report.Table((), list(facts(model).items()), kind="text").html()], {}
    numbers: dict[str, Any] = {"model": name, "parameters": parameters, "layers": layers, "counted_on": counted}

    def add(heading: str, *found: Any, words: object = "", **figures: Any) -> None:
        files = {file: report.png(figure) for file, figure in figures.items()}
        drawn.update(files)
        pictures = [report.picture(data, heading) for data in files.values()]
        parts.append(report.section(heading, *pictures, *found, note=_WORDS[heading].format(words)))

    numbers |= {"routes": [], "expert_load": [], "worth": None, "parameters_by_experts": None}
    if layers:
        first = (tokenizer.decode(item["input_ids"][:_MAX_TOKENS], skip_special_tokens=True) for item in items[:2])
        routes = [(text, route_text(model, tokenizer, text)) for text in options.text or list(first)]
        numbers["routes"] = [{"text": text, "streams": [vars(route) for route in found]} for text, found in routes]
        named = getattr(model.config, "mpoe_experts", None) or [""] * config.num_experts
        add(
            "Which expert took which token",
            report.routes_html(routes, [f"{k} {own}".strip() for k, own in enumerate(named)]),
        )
    if worth is not None:
        numbers["worth"] = vars(worth)
        whole = [["the mixture", "", f"{worth.loss:.3f}", "", ""], ["oracle", "", f"{worth.oracle:.3f}", "", ""]]
        table = report.Table(("expert", "tokens", "alone", "without", "removed"), [*worth_rows(worth), *whole])
        add("What each expert is worth", table.html(), words=worth.tokens)
    if layers:
        numbers["expert_load"] = expert_load(model, items, tokenizer)
        add("Expert load", words=counted, expert_load=report.load_map(numbers["expert_load"], layers))
    weights = summarize(model, options.num_tokens, config.top_k)
    spectra = _spectra(weights)
    if spectra:
        add("What the bonds carry", bond_spectra=report.spectrum_lines(spectra))
    numbers["bonds"] = {
        kind: {
            layer: [{"dimension": b.dimension, "entropy": b.entropy.tolist()} for b in bonds]
            for layer, bonds in own.items()
        }
        for kind, own in spectra.items()
    }
    if "ffn" in config.targets:
        growth = parameter_growth(model)
        numbers["parameters_by_experts"] = vars(growth)
        add("Parameters against experts", parameters=report.growth(growth, config.num_experts))
    records = read_metrics(name) if (Path(name) / METRICS_FILE).is_file() else []
    if any("loss" in record for record in records):
        add("Training", training=report.training_curves(records))
    if weights:
        parts.append(report.Table(HEADER, [row.cells for row in weights], "MPO weights", LEGEND).section())
    folder.mkdir(parents=True, exist_ok=True)
    for old in (REPORT_FILE, NUMBERS_FILE, *(f"{plot}.png" for plot in PLOTS)):
        (folder / old).unlink(missing_ok=True)
    for plot, data in drawn.items():
        (folder / f"{plot}.png").write_bytes(data)
    write_json(folder / NUMBERS_FILE, numbers)
    report.write_page(folder / REPORT_FILE, f"mpoe inspect: {name}", parts)
