"""`mpoe inspect MODEL`: routes of tokens, singular values at the bonds, growth of parameters; as a report with plots.

Of a mixture that `mpoe compose` made of experts it also says what each expert is worth on the texts: the loss without
it, and the distance to the best single expert of every token.

MODEL is the folder of a converted model or of a training run, whose curves are drawn too."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpoe.cli import plots
from mpoe.cli.compare import check_report_folder
from mpoe.cli.errors import CommandError
from mpoe.cli.files import REPORT_FILE, write_json
from mpoe.cli.parsing import option, read_command
from mpoe.cli.runs import data_of_run
from mpoe.cli.tasks import DataOptions, resolve
from mpoe.models.table import ENCODER, SEQ2SEQ
from mpoe.training.metrics_file import METRICS_FILE, read_metrics

if TYPE_CHECKING:
    from mpoe.data.task import Task
    from mpoe.inspection.composed import Worth
    from mpoe.inspection.routes import Route

NUMBERS_FILE = "inspect.json"
PLOTS = ("expert_load", "bond_rank", "bond_spectra", "parameters", "training")
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
        "Below, the singular values themselves, averaged over the experts."
    ),
    "Parameters against experts": (
        "A dense expert brings full weights of its own, an MPO expert its auxiliary cores and a row of the router."
    ),
    "Training": ("From the run's metrics.jsonl; pale lines are the raw values, the others running means."),
}


@dataclass
class InspectOptions:
    """Options that only `inspect` has."""

    _argument_group_name = "inspection"

    text: list[str] = option([], "sentences whose tokens are followed; default: the first two items of the data")
    output_dir: str = option("mpoe_inspect", "folder for report.html, plots and inspect.json")
    overwrite: bool = option(False, "replace the report in the output folder")
    split: str = option("validation", "items that the expert load is counted on")
    num_items: int = option(256, "at most so many of them")
    num_tokens: int = option(2048, "tokens of the pass that plans are for")

    def __post_init__(self) -> None:
        if any(not text.strip() for text in self.text):
            raise ValueError("text must hold words; got an empty one")
        for name in ("num_items", "num_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")


def command(arguments: Sequence[str]) -> None:
    """Run the command on its tokens."""
    usage = "mpoe inspect MODEL [--flag value ...]"
    asked = read_command(usage, __doc__, [InspectOptions, DataOptions], arguments, words=1)
    if asked is None:
        return
    if not asked.words:
        raise CommandError(f"inspect needs a model first: {usage}")
    options, data = asked.options
    data, seed, described = data_of_run(asked.words[0], data, asked.given)
    if not plots.have_matplotlib():
        raise CommandError('inspect draws with matplotlib, which is not installed: pip install "mpoe[report]"')
    find_tasks = partial(resolve, data.eval_tasks or data.tasks, data, data_seed=seed, described=described)
    run(asked.words[0], options, find_tasks)


def run(name: str, options: InspectOptions, find_tasks: Callable[..., list[Task]]) -> None:
    """Inspect the model ``name``; writes the report. ``find_tasks(style=...)`` gives the tasks whose items count."""
    folder = check_report_folder(options.output_dir, options.overwrite)
    from mpoe.cli.pretrained import find, load_model, load_tokenizer

    source = find(name)
    if not source.is_mpoe:
        raise CommandError(
            f"{name} is a dense {source.model_type}; inspect looks into mixtures: mpoe convert {name} OUT, then "
            "mpoe inspect OUT"
        )
    tokenizer = load_tokenizer(source)
    tasks = find_tasks(style=SEQ2SEQ if source.style == ENCODER else source.style)
    items = _items(source.style, options, tasks, tokenizer)
    model = load_model(source)
    counted = f"{len(items)} {options.split} items of {', '.join(task.name for task in tasks)}"
    print(f"{name}: counting {counted}, following tokens, reading bonds")
    found = _look(name, model, tokenizer, items, counted, options)
    if source.style != ENCODER:
        found.worth = _worth(Path(name), model, tokenizer, items, options.text)
    _write(folder, found)
    for line in _worth_lines(found.worth):
        print(line)
    print(f"plots, numbers and report are in {folder}; open {folder / REPORT_FILE}")


def _items(style: str, options: InspectOptions, tasks: Sequence[Task], tokenizer: Any) -> list[dict[str, Any]]:
    """Encoded items on which the expert load is counted; an encoder reads only the inputs."""
    from mpoe.cli.scoring import encode_task

    share = -(-options.num_items // len(tasks))
    if style != ENCODER:
        return [item for task in tasks for item in encode_task(task, options.split, tokenizer, share, style)]
    texts = [example.source for task in tasks for example in task.examples(options.split)[:share]]
    encoded = tokenizer(texts, truncation=True, max_length=128)
    names = ("input_ids", "attention_mask")
    return [dict(zip(names, item, strict=True)) for item in zip(*(encoded[name] for name in names), strict=True)]


# ------------------------------------------------------------------------ what is found


@dataclass
class _Found:
    """What a report shows of a model; ``spectra`` by kind of weight (up, down, an attention projection's name, ...) and
    layer."""

    name: str
    model: Any
    counted: str
    layers: list[str]
    load: list[list[int]]
    routes: list[tuple[str, list[Route]]]
    weights: Sequence[Any]
    spectra: dict[str, dict[str, list[Any]]]
    growth: Any
    records: list[dict[str, Any]] = field(default_factory=list)
    worth: Worth | None = None


def _look(
    name: str, model: Any, tokenizer: Any, items: list[dict[str, Any]], counted: str, options: InspectOptions
) -> _Found:
    from mpoe.cli.scoring import expert_load
    from mpoe.inspection.growth import parameter_growth
    from mpoe.inspection.routes import route_text
    from mpoe.inspection.spectra import bond_spectra
    from mpoe.layers.cores import MPOCores
    from mpoe.models.report import routed_layers, short_name, summarize

    config = model.mpoe_config
    layers = [short_name(layer) for layer, _ in routed_layers(model)]
    first = (tokenizer.decode(item["input_ids"][:_MAX_TOKENS], skip_special_tokens=True) for item in items[:2])
    texts = options.text or list(first)
    weights = summarize(model, options.num_tokens, config.top_k)
    spectra: dict[str, dict[str, list[Any]]] = {}
    for row in weights:
        layer, _, kind = short_name(row.name).rpartition(".")
        bonds = bond_spectra(row.cores) if isinstance(row.cores, MPOCores) else []
        if bonds:
            spectra.setdefault(kind, {})[layer or kind] = bonds
    file = Path(name) / METRICS_FILE
    return _Found(
        name,
        model,
        counted,
        layers,
        expert_load(model, items, tokenizer.pad_token_id) if layers else [],
        [(text, route_text(model, tokenizer, text)) for text in texts] if layers else [],
        weights,
        spectra,
        parameter_growth(model) if "ffn" in config.targets else None,
        read_metrics(file) if file.is_file() else [],
    )


def _worth(folder: Path, model: Any, tokenizer: Any, items: list[dict[str, Any]], texts: Sequence[str]) -> Worth | None:
    """What the experts of a composed mixture are worth on ``texts``, or on the items; None for other models."""
    from mpoe.data.collate import PaddingCollator
    from mpoe.inspection.composed import composed_worth
    from mpoe.models.expert_mixture import EXPERTS_FOLDER, kept_experts

    if not (folder / EXPERTS_FOLDER).is_dir():
        return None
    experts, background = kept_experts(folder)
    classes = [*(expert.statistics for expert in experts), *([] if background is None else [background])]
    if texts and not model.config.is_encoder_decoder:
        rows = tokenizer(list(texts))["input_ids"]
        items = [{"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids} for ids in rows]
    collate = PaddingCollator(tokenizer.pad_token_id)
    parts = (items[start : start + _AT_ONCE] for start in range(0, len(items), _AT_ONCE))
    return composed_worth(model, classes, [collate(part) for part in parts])


def worth_rows(worth: Worth) -> list[list[str]]:
    """Share of tokens, loss alone, loss without and what removing adds, by expert."""
    parts = zip(worth.names, worth.share, worth.alone, worth.removed, strict=True)
    return [[n, f"{s:.0%}", f"{a:.3f}", f"{r:.3f}", f"{r - worth.loss:+.3f}"] for n, s, a, r in parts]


def _worth_lines(worth: Worth | None) -> list[str]:
    """What the experts are worth, in words; empty for a model that was not composed."""
    if worth is None:
        return []
    told = [f"{row[0]}: {row[1]} of tokens, {row[4]} nats if removed" for row in worth_rows(worth)]
    distance = worth.loss - worth.oracle
    return [*told, f"the mixture has {worth.loss:.3f} nats per token, {distance:.3f} more than the oracle"]


# ---------------------------------------------------------------------- what is written


def _write(folder: Path, found: _Found) -> None:
    """Write the plots, the numbers and, last, the report."""
    from markupsafe import Markup

    from mpoe.cli import routes
    from mpoe.cli.report import Table, facts, image, write_page
    from mpoe.models.report import HEADER, LEGEND

    sections = list(_sections(found))
    folder.mkdir(parents=True, exist_ok=True)
    for old in (REPORT_FILE, NUMBERS_FILE, *(f"{plot}.png" for plot in PLOTS)):
        (folder / old).unlink(missing_ok=True)
    title = f"mpoe inspect: {found.name}"
    parts: list[Any] = [Markup("<h1>{}</h1>").format(title), facts(_facts(found))]
    for heading, value, drawn, html in sections:
        parts.append(Markup("<h2>{}</h2><p>{}</p>").format(heading, _WORDS[heading].format(value)))
        for plot, png in drawn.items():
            (folder / f"{plot}.png").write_bytes(png)
            parts.append(image(plot, png, heading))
        parts.append(html)
    if found.weights:
        parts.append(Table(HEADER, [row.cells() for row in found.weights], "MPO weights", LEGEND).section())
    write_json(folder / NUMBERS_FILE, _numbers(found))
    write_page(folder / REPORT_FILE, title, parts, routes.STYLE)


def _facts(found: _Found) -> list[tuple[str, str]]:
    """A short description of the model."""
    report, config = found.model.parameter_report(), found.model.mpoe_config
    shape = config.shape if isinstance(config.shape, str) else "given"
    experts = f"{config.num_experts} {config.expert_type} experts, top-{config.top_k}"
    parts = [f"{key} {report[key]:,}" for key in ("central", "auxiliary", "expert", "router", "rest") if report[key]]
    total, dense, switch = report["total"], report["dense_total"], report["switch_total"]
    return [
        ("model", f"{type(found.model).__name__}, {total:,} parameters"),
        ("mixture", f"moe_type {config.moe_type}: {experts}, shape {shape}" if found.layers else "no routers"),
        ("parameters", ", ".join(parts)),
        ("as a dense model", f"{dense:,}; this one is {total / dense:.2f} times as large"),
        ("with dense experts", f"{switch:,}, {switch / total:.2f} times as many as here"),
    ]


def _sections(found: _Found) -> Iterator[tuple[str, Any, Mapping[str, bytes], Any]]:
    """Heading, what its words name, plots by file name, further HTML."""
    from mpoe.cli.report import Table
    from mpoe.cli.routes import routes_html

    config, worth = found.model.mpoe_config, found.worth
    if found.routes:
        named = getattr(found.model.config, "mpoe_experts", None)
        yield "Which expert took which token", "", {}, routes_html(found.routes, config.num_experts, named)
    if worth is not None:
        whole = [["the mixture", "", f"{worth.loss:.3f}", "", ""], ["oracle", "", f"{worth.oracle:.3f}", "", ""]]
        table = Table(("expert", "tokens", "alone", "without", "removed"), [*worth_rows(worth), *whole])
        yield "What each expert is worth", worth.tokens, {}, table.html()
    if found.load:
        yield "Expert load", found.counted, {"expert_load": plots.load_by_layer(found.load, found.layers)}, ""
    if found.spectra:
        drawn = {"bond_rank": plots.bond_ranks(found.spectra), "bond_spectra": plots.spectrum_lines(found.spectra)}
        yield "What the bonds carry", "", drawn, ""
    if found.growth is not None:
        yield "Parameters against experts", "", {"parameters": plots.growth(found.growth, config.num_experts)}, ""
    if any("loss" in record for record in found.records):
        yield "Training", "", {"training": plots.training_curves(found.records)}, ""


def _numbers(found: _Found) -> dict[str, Any]:
    """Everything that is drawn, JSON-able."""
    bonds = {
        kind: {
            layer: [{"dimension": b.dimension, "entropy": b.entropy.tolist()} for b in bonds]
            for layer, bonds in weights.items()
        }
        for kind, weights in found.spectra.items()
    }
    return {
        "model": found.name,
        "parameters": found.model.parameter_report(),
        "layers": found.layers,
        "expert_load": found.load,
        "counted_on": found.counted,
        "worth": None if found.worth is None else vars(found.worth),
        "routes": [{"text": text, "streams": [vars(route) for route in routes]} for text, routes in found.routes],
        "bonds": bonds,
        "parameters_by_experts": None if found.growth is None else vars(found.growth),
    }
