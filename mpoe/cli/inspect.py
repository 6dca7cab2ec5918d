"""`mpoe inspect MODEL`: routes of tokens, load, singular values at the bonds and parameters, in one
HTML file.

Of a mixture that `mpoe compose` made of experts it also says what each expert is worth on the
texts: the loss without it, and the distance to the best single expert of every token.

MODEL is the folder of a converted model or of a training run, whose own report.html has its
curves."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mpoe.cli import models, report
from mpoe.cli.command import Request, as_command, option
from mpoe.cli.errors import CommandError, check_files
from mpoe.cli.evaluate import encode_task, expert_load, padded_batches
from mpoe.cli.outputs import REPORT_FILE, check_output, write_json
from mpoe.cli.tasks import SOURCES, DataOptions, data_of_run, resolve
from mpoe.data.batches import read_batches
from mpoe.data.encode import Item, encoded_item
from mpoe.data.task import Task
from mpoe.inspection import (
    Batches,
    BondSpectrum,
    Route,
    Worth,
    bond_spectra,
    composed_worth,
    route_text,
)
from mpoe.models.card import facts
from mpoe.models.expert_mixture import EXPERTS_FOLDER, experts_in
from mpoe.models.report import HEADER, LEGEND, summarize
from mpoe.models.table import CAUSAL, ENCODER, SEQ2SEQ
from mpoe.models.walk import mpo_modules, routed_layers, short_name

NUMBERS_FILE = "inspect.json"
NUM_TOKENS = 2048  # the plans of MPO weights are for a forward pass of so many
LENGTH = 128  # tokens of an item at most; of tasks that have a length, theirs
SHOWN_TOKENS = 60  # of an item whose routes are shown because no --text is given
# A pass over the items counts the load. It shall take about ten seconds of one core.
LOAD_FLOPS = 6e11
MOST_ITEMS = 256
# To tell experts' worth, every expert is tried alone and left out on every item. All these passes
# together shall take about half a minute of one core.
WORTH_FLOPS = 2.5e12
MOST_ITEMS_OF_FILE = 4
# How to read a section of the report.
_ROUTES_NOTE = (
    "A column for each token, a row for each layer; the number is the expert that the router gave "
    "the token to, and the colour says the same. Hold the pointer over a cell to see the router's "
    "probability. A row of one colour is a layer that sends everything to one expert; equal tokens "
    "show whether a layer sorts by word or by context."
)
_WORTH_NOTE = (
    "Weight is the expert's share of what the router gives out. Losses in nats per predicted "
    'token. "Alone": all tokens go to this expert (\'none\' is the base). "Without": the mixture '
    "composed without it; what that adds is the price of removing the expert. The oracle gives "
    "every token the single expert that predicts it best, so it is a bound that no router reaches."
)
_LOAD_NOTE = (
    "The share of its tokens that each layer gave to each expert, counted on {counted}. Padding is "
    "not counted. An expert near 0 learns nothing from such data; raise balance_loss_weight if "
    "training does not cure it."
)
_BONDS_NOTE = (
    "Cutting an expert's matrix in two at a bond of dimension d leaves d singular values there; "
    "their entanglement entropy S gives the effective rank exp(S): over how many of the d "
    "directions the weight is spread. Near 100% of d, a smaller max_bond would cost accuracy; a "
    "low share means that truncation is cheap. The lines are the singular values, averaged over "
    "the experts."
)


@dataclass
class InspectOptions:
    """Options that only `inspect` has."""

    text: list[str] = option(
        [], "sentences whose tokens are followed; default: the first two items of the data"
    )
    output_dir: Path = option(Path("mpoe_inspect"), "folder for report.html and inspect.json")
    overwrite: bool = option(False, "replace the report in the output folder")
    split: str = option("validation", "items that the expert load is counted on")
    texts: list[str] = option(
        [],
        "of a mixture of experts: a file of each domain, read as mpoe train does, on which each "
        "expert's worth is told; at most four items of 128 tokens, fewer where these would take "
        "more than about half a minute",
    )
    num_items: int | None = option(
        None,
        "at most so many items of the split, or of each file of --texts; default: by the model's "
        "size",
    )

    LEAST = (("num_items", 1),)

    def __post_init__(self) -> None:
        if any(not text.strip() for text in self.text):
            raise ValueError("text must hold words; got an empty one")


@dataclass(frozen=True)
class Subject:
    """The model that is inspected.

    Attributes:
        folder: as it was typed.
        style: of the model, see `mpoe.models.table`.
        model, tokenizer: the tokenizer is None if the folder has none.
        is_composed: its experts came from files, so the folder has their statistics.
    """

    folder: str
    style: str
    model: Any
    tokenizer: Any
    is_composed: bool


@dataclass(frozen=True)
class Reading:
    """What the model reads; nothing if it has no tokenizer or no routers.

    Attributes:
        shown: sentences whose tokens are followed.
        counted: what the load is counted on, in words.
        items: encoded, of the pass that counts the load; none if the passes over ``texts`` do.
        texts: name -> batches on which experts' worth is told; none if it is not.
    """

    shown: Sequence[str] = ()
    counted: str = "nothing"
    items: Sequence[Item] = ()
    texts: Mapping[str, Batches] = field(default_factory=dict)


@dataclass(frozen=True)
class Findings:
    """What was found about the model.

    Attributes:
        routes: a sentence and the routes of its tokens, by stream.
        load: tokens by layer and expert; empty if they were not counted.
        worth: text -> what each expert is worth on it.
    """

    routes: list[tuple[str, list[Route]]]
    load: list[list[int]]
    worth: dict[str, Worth]


@as_command(InspectOptions, DataOptions, words=(1, 1))
def command(request: Request) -> None:
    """Inspect the model; write the numbers and, last, the report."""
    (options, data), (name,) = request.options, request.words
    output_dir = options.output_dir
    # What can be refused is, before the model is loaded.
    check_output("output_dir", output_dir, options.overwrite, "an earlier report", [REPORT_FILE])
    source = models.find(name)
    if not source.is_mpoe:
        raise CommandError(
            f"{name} is a dense {source.model_type}; inspect looks into mixtures: mpoe convert "
            f"{name} OUT, then mpoe inspect OUT"
        )
    tokenizer = models.tokenizer_if_any(source)
    is_composed = (Path(name) / EXPERTS_FOLDER).is_dir()
    if tokenizer is None and (options.text or options.texts):
        raise CommandError(f"text and texts need a tokenizer; {name} holds none")
    tasks: list[Task] = []
    if options.texts:
        _check_texts(options.texts, source, is_composed, request.given)
    else:
        data, seed, described = data_of_run(name, data, request.given)
        # of an encoder only the inputs are read, as those of an encoder-decoder are
        style = SEQ2SEQ if source.style == ENCODER else source.style
        tasks = resolve(data.eval_tasks or data.tasks, data, style, seed, described)
        for task in tasks:
            task.examples(options.split)
    subject = Subject(name, source.style, models.load_model(source), tokenizer, is_composed)
    are_chosen = any(getattr(data, option_name) for option_name in SOURCES)
    reading = _read(subject, options, tasks, are_chosen)
    steps = ["reading bonds"]
    if reading.shown:
        steps = [f"counting {reading.counted}", "following tokens", *steps]
    print(f"{name}: {', '.join(steps)}", flush=True)
    worth = _worth(subject, reading.texts)
    routes = [(text, route_text(subject.model, tokenizer, text)) for text in reading.shown]
    _write(output_dir, subject, reading, Findings(routes, _load(subject, reading, worth), worth))
    _print_worth(worth)
    if is_composed and source.style == CAUSAL and not worth:
        print("what each expert is worth: give --texts FILE ..., a file of each domain")
    print(f"report and numbers are in {output_dir}; open {output_dir / REPORT_FILE}")


def _check_texts(
    files: Sequence[str], source: models.Source, is_composed: bool, given: set[str]
) -> None:
    """Refuse ``--texts`` of other models, beside options of other items, files that are not there
    or named twice."""
    if not is_composed or source.style != CAUSAL:
        raise CommandError(
            "texts are for mixtures that mpoe compose made of experts of a decoder; "
            f"{source.path} is of the family {source.model_type}, "
            f"{'composed' if is_composed else 'not composed'}"
        )
    others = sorted(given & {"split", *vars(DataOptions())})
    if others:
        raise CommandError(f"texts are all that is read; got {', '.join(others)} too")
    if len(set(files)) < len(files):
        raise CommandError(f"texts must be different files; got {', '.join(files)}")
    check_files("texts", files)


def _read(
    subject: Subject, options: InspectOptions, tasks: Sequence[Task], are_chosen: bool
) -> Reading:
    """The files of ``--texts``, or tasks, which the user or the run may have chosen."""
    if subject.tokenizer is None or not routed_layers(subject.model):
        return Reading()
    if options.texts:
        return _read_files(subject, options)
    return _read_tasks(subject, options, tasks, are_chosen)


def _read_files(subject: Subject, options: InspectOptions) -> Reading:
    """The start of every file of ``--texts``, on which worth is told and the load counted."""
    passes = len(options.texts) * _worth_passes(subject.model)
    most = options.num_items or _fitting(
        subject.model, WORTH_FLOPS, passes, LENGTH, MOST_ITEMS_OF_FILE
    )
    texts = {file: read_batches(file, subject.tokenizer, LENGTH, most) for file in options.texts}
    first = [batches[0]["input_ids"][0].tolist() for batches in texts.values()]
    count = sum(len(batch["input_ids"]) for batches in texts.values() for batch in batches)
    return Reading(
        shown=options.text or _decoded(subject.tokenizer, first[:2]),
        counted=f"{count} items of {', '.join(texts)}",
        texts=texts,
    )


def _read_tasks(
    subject: Subject, options: InspectOptions, tasks: Sequence[Task], are_chosen: bool
) -> Reading:
    """Items of a split of the tasks. Experts' worth is told on the sentences of ``--text``, or on
    the items if these were chosen; the load is counted on the items."""
    model = subject.model
    tokenizer = subject.tokenizer
    tells_worth = subject.is_composed and subject.style != ENCODER
    texts: dict[str, Batches] = {}
    if tells_worth and subject.style == CAUSAL:
        texts = _sentences(subject, options.text)
    is_worth_of_items = tells_worth and are_chosen and not texts
    flops, passes = LOAD_FLOPS, 1
    if is_worth_of_items:
        flops, passes = WORTH_FLOPS, _worth_passes(model)
    length = LENGTH if subject.style == ENCODER else max(map(_longest_item, tasks))
    most = options.num_items or _fitting(model, flops, passes, length, MOST_ITEMS)
    tasks = tasks[:most]
    items = _items(subject, options.split, most, tasks)
    shown = options.text or _decoded(tokenizer, [item["input_ids"] for item in items[:2]])
    counted = f"{len(items)} {options.split} items of {', '.join(task.name for task in tasks)}"
    if is_worth_of_items and items:
        return Reading(shown, counted, texts={"the items": padded_batches(model, items, tokenizer)})
    return Reading(shown, counted, items, texts)


def _sentences(subject: Subject, sentences: Sequence[str]) -> dict[str, Batches]:
    """Sentences as batches; without those of one token, of which nothing is predicted."""
    encoded = (subject.tokenizer(text, truncation=True)["input_ids"] for text in sentences)
    items = [encoded_item(ids, ids) for ids in encoded if len(ids) > 1]
    if not items:
        return {}
    return {"the sentences": padded_batches(subject.model, items, subject.tokenizer)}


def _longest_item(task: Task) -> int:
    """Tokens of its longest item, of running text a block."""
    if task.kind == "language_modeling":
        return task.max_source_length
    return task.max_source_length + task.max_target_length


def _items(subject: Subject, split: str, most: int, tasks: Sequence[Task]) -> list[Item]:
    """At most so many encoded items of the tasks, shared out evenly; of an encoder only inputs."""
    tokenizer = subject.tokenizer
    items: list[Item] = []
    for number, task in enumerate(tasks):
        share = math.ceil((most - len(items)) / (len(tasks) - number))
        if subject.style == ENCODER:
            sources = [example.source for example in task.examples(split)[:share]]
            cut = {"truncation": True, "max_length": LENGTH, "return_token_type_ids": False}
            items += [dict(tokenizer(text, **cut)) for text in sources]
        else:
            items += encode_task(task, split, tokenizer, share, subject.style)
    return items


def _worth(subject: Subject, texts: Mapping[str, Batches]) -> dict[str, Worth]:
    """What each expert is worth, by text."""
    if not texts:
        return {}
    experts, background = experts_in(Path(subject.folder))
    classes = [expert.statistics for expert in experts]
    if background is not None:
        classes.append(background)
    return composed_worth(subject.model, classes, texts)


def _load(subject: Subject, reading: Reading, worth: Mapping[str, Worth]) -> list[list[int]]:
    """Tokens by layer and expert; empty if nothing was read."""
    if reading.items:
        return expert_load(subject.model, reading.items, subject.tokenizer)
    if worth:
        return torch.tensor([result.load for result in worth.values()]).sum(0).tolist()
    return []


def _decoded(tokenizer: Any, rows: Sequence[list[int]]) -> list[str]:
    """The start of items, as text."""
    return [tokenizer.decode(ids[:SHOWN_TOKENS], skip_special_tokens=True) for ids in rows]


def _print_worth(worth: Mapping[str, Worth]) -> None:
    for text, result in worth.items():
        _worth_table(result, text).show()
        print(
            f"on {result.tokens} tokens the mixture has {result.loss:.3f} nats per token, "
            f"{result.loss - result.oracle:.3f} more than the oracle"
        )


def _worth_passes(model: Any) -> int:
    """Passes over a text that tell the worth of its experts: of the mixture, of every expert alone
    and without every one."""
    return 2 * model.mpoe_config.num_experts + 1


def _fitting(model: Any, flops: float, passes: int, length: int, most: int) -> int:
    """Items of ``length`` tokens, at most so many, with which these passes take about ``flops``."""
    return max(1, min(most, int(flops / (passes * 2 * length * model.num_parameters()))))


def _worth_table(worth: Worth, text: str) -> report.Table:
    """Share of the router's weights, loss alone, loss without and what removing adds, by expert."""
    columns = (worth.names, worth.share, worth.alone, worth.removed)
    rows = [
        [name, f"{share:.0%}", f"{alone:.3f}", f"{without:.3f}", f"{without - worth.loss:+.3f}"]
        for name, share, alone, without in zip(*columns, strict=True)
    ]
    rows.append(["the mixture", "", f"{worth.loss:.3f}", "", ""])
    rows.append(["oracle", "", f"{worth.oracle:.3f}", "", ""])
    header = ("expert", "weight", "alone", "without", "removed")
    return report.Table(header, rows, f"{text}, {worth.tokens} tokens")


def _spectra(model: Any) -> report.Spectra:
    """Bonds of MPO weights by kind (up, down, an attention projection's name, ...) and layer."""
    by_kind: dict[str, dict[str, list[BondSpectrum]]] = {}
    for name, cores in mpo_modules(model):
        layer, _, kind = short_name(name).rpartition(".")
        bonds = bond_spectra(cores)
        if bonds:
            by_kind.setdefault(kind, {})[layer or kind] = bonds
    return by_kind


def _write(folder: Path, subject: Subject, reading: Reading, findings: Findings) -> None:
    """Write the numbers and the report."""
    spectra = _spectra(subject.model)
    numbers = _numbers(subject, reading, findings, spectra)
    sections = _sections(subject, reading, findings, spectra)
    folder.mkdir(parents=True, exist_ok=True)
    # The report is written last: where there is one, the numbers beside it are its own.
    (folder / REPORT_FILE).unlink(missing_ok=True)
    write_json(folder / NUMBERS_FILE, numbers)
    report.write_page(folder / REPORT_FILE, f"mpoe inspect: {subject.folder}", sections)


def _numbers(
    subject: Subject, reading: Reading, findings: Findings, spectra: report.Spectra
) -> dict:
    routes = [
        {"text": text, "streams": [vars(route) for route in streams]}
        for text, streams in findings.routes
    ]
    used = {  # effective rank as a share of every bond
        kind: {layer: [bond.used for bond in bonds] for layer, bonds in layers.items()}
        for kind, layers in spectra.items()
    }
    return {
        "model": subject.folder,
        "parameters": subject.model.parameter_report(),
        "layers": _layer_names(subject.model),
        "counted_on": reading.counted,
        "expert_load": findings.load,
        "worth": {text: vars(result) for text, result in findings.worth.items()},
        "routes": routes,
        "bonds": used,
    }


def _sections(
    subject: Subject, reading: Reading, findings: Findings, spectra: report.Spectra
) -> list:
    model = subject.model
    config = model.mpoe_config
    sections = [report.Table((), list(facts(model).items()), kind="text").html()]

    def add(heading: str, note: str, *contents: Any) -> None:
        sections.append(report.section(heading, *contents, note=note))

    if findings.routes:
        named = getattr(model.config, "mpoe_experts", None) or [""] * config.num_experts
        names = [f"{k} {expert_name}".strip() for k, expert_name in enumerate(named)]
        table = report.routes_html(findings.routes, names)
        add("Which expert took which token", _ROUTES_NOTE, table)
    if findings.worth:
        tables = [_worth_table(result, text).section() for text, result in findings.worth.items()]
        add("What each expert is worth", _WORTH_NOTE, *tables)
    if findings.load:
        heat_map = report.load_map(findings.load, _layer_names(model))
        add("Expert load", _LOAD_NOTE.format(counted=reading.counted), heat_map)
    if spectra:
        add("What the bonds carry", _BONDS_NOTE, report.spectrum_lines(spectra))
    weights = summarize(model, NUM_TOKENS, config.top_k)
    if weights:
        rows = list(weights.values())
        sections.append(report.Table(HEADER, rows, "MPO weights", LEGEND).section())
    return sections


def _layer_names(model: Any) -> list[str]:
    return [short_name(layer) for layer, _ in routed_layers(model)]
