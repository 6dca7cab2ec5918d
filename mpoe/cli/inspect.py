"""`mpoe inspect MODEL`: routes of tokens, load, singular values at the bonds and parameters, in one
HTML file.

Of a mixture that `mpoe compose` made of experts it also says what each expert is worth on the
texts: the loss without it, and the distance to the best single expert of every token.

MODEL is the folder of a converted model or of a training run, whose own report.html has its
curves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mpoe.cli import models, report
from mpoe.cli.command import CommandError, Request, as_command, check_files, option
from mpoe.cli.evaluate import encode_task, expert_load, padded_batches
from mpoe.cli.outputs import REPORT_FILE, check_output, write_json
from mpoe.cli.tasks import DataOptions, data_of_run, resolve
from mpoe.data.batches import read_batches
from mpoe.data.encode import Item, encoded_item
from mpoe.data.task import Task
from mpoe.inspection import Batches, Route, Worth, bond_spectra, composed_worth, route_text
from mpoe.models.card import facts
from mpoe.models.expert_mixture import EXPERTS_FOLDER, experts_in
from mpoe.models.report import HEADER, LEGEND, summarize
from mpoe.models.table import CAUSAL, ENCODER, SEQ2SEQ
from mpoe.models.walk import mpo_modules, routed_layers, short_name

NUMBERS_FILE = "inspect.json"
# that tell what experts are worth, where no file does
ITEMS = "the items"
SENTENCES = "the sentences"
NUM_TOKENS = 2048  # of the pass that plans of MPO weights are for
# of the pass that counts the load, about: ten seconds of one core; smaller models read `MOST_ITEMS`
FLOPS = 6e11
MOST_ITEMS = 256
# of the passes that say what each expert is worth, about: half a minute of one core
FLOPS_OF_WORTH = 2.5e12
MOST_ITEMS_OF_TEXT = 4  # of a domain's text
LENGTH = 128  # tokens of such an item
_MAX_TOKENS = 60  # of the items that are shown when no text is given
_WORDS = {
    "Which expert took which token": (
        "A column for each token, a row for each layer; the number is the expert that the router "
        "gave the token to, and the colour says the same. Hold the pointer over a cell to see the "
        "router's probability. A row of one colour is a layer that sends everything to one expert; "
        "equal tokens show whether a layer sorts by word or by context."
    ),
    "What each expert is worth": (
        "Weight is the expert's share of what the router gives out. Losses in nats per predicted "
        "token. \"Alone\": all tokens go to this expert ('none' is the base). "
        '"Without": the mixture composed without it; what that adds is the price of '
        "removing the expert. The oracle gives every token the single expert that predicts it "
        "best, so it is a bound that no router reaches."
    ),
    "Expert load": (
        "The share of its tokens that each layer gave to each expert, counted on {}. Padding is "
        "not counted. An expert near 0 learns nothing from such data; raise balance_loss_weight if "
        "training does not cure it."
    ),
    "What the bonds carry": (
        "Cutting an expert's matrix in two at a bond of dimension d leaves d singular values "
        "there; their entanglement entropy S gives the effective rank exp(S): over how many of the "
        "d directions the weight is spread. Near 100% of d, a smaller max_bond would cost "
        "accuracy; a low share means that truncation is cheap. The lines are the singular values, "
        "averaged over the experts."
    ),
}


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
        nargs="+",
    )
    num_items: int | None = option(
        None, "at most so many of them, or of each file of --texts; default: by size, of the model"
    )

    LEAST = (("num_items", 1),)

    def __post_init__(self) -> None:
        if any(not text.strip() for text in self.text):
            raise ValueError("text must hold words; got an empty one")


@as_command(InspectOptions, DataOptions, words=(1, 1))
def command(request: Request) -> None:
    """Inspect the model; write the numbers and, last, the report."""
    (options, data), (name,) = request.options, request.words
    data, seed, described = data_of_run(name, data, request.given)
    folder = options.output_dir
    check_output("output_dir", folder, options.overwrite, "an earlier report", [REPORT_FILE])
    source = models.find(name)
    if not source.is_mpoe:
        raise CommandError(
            f"{name} is a dense {source.model_type}; inspect looks into mixtures: mpoe convert "
            f"{name} OUT, then mpoe inspect OUT"
        )
    tokenizer = models.tokenizer_if_any(source)
    style = SEQ2SEQ if source.style == ENCODER else source.style
    tasks = resolve(data.eval_tasks or data.tasks, data, style, seed, described)
    is_composed = (Path(name) / EXPERTS_FOLDER).is_dir()
    if options.texts and not (is_composed and tokenizer and source.style == CAUSAL):
        raise CommandError(
            f"texts are for mixtures that mpoe compose made of experts of a decoder; {name} is "
            "another"
        )
    check_files("texts", options.texts)
    model = models.load_model(source)
    texts: dict[str, Batches] = {}
    if options.texts:
        # every expert is tried alone and left out on every item
        passes = len(options.texts) * (2 * model.mpoe_config.num_experts + 1)
        most = options.num_items or _fitting(model, FLOPS_OF_WORTH, passes, MOST_ITEMS_OF_TEXT)
        texts = {file: read_batches(file, tokenizer, LENGTH, most) for file in options.texts}
        items = [{"input_ids": batches[0]["input_ids"][0].tolist()} for batches in texts.values()]
        rows = sum(len(batch["input_ids"]) for batches in texts.values() for batch in batches)
        counted = f"{rows} items of {', '.join(texts)}"
    else:
        most = options.num_items or _fitting(model, FLOPS, 1, MOST_ITEMS)
        items = _items(source.style, options.split, most, tasks, tokenizer) if tokenizer else []
        counted = f"{len(items)} {options.split} items of {', '.join(task.name for task in tasks)}"
    print(f"{name}: counting {counted}, following tokens, reading bonds", flush=True)
    if is_composed and tokenizer and source.style != ENCODER and not texts:
        # what experts are worth on the sentences, or on the items that were asked for
        if options.text and not model.config.is_encoder_decoder:
            sentences = [encoded_item(ids, ids) for ids in tokenizer(options.text)["input_ids"]]
            texts = {SENTENCES: padded_batches(model, sentences, tokenizer)}
        elif items and (data.data_dir or data.tasks or data.task_file):
            texts = {ITEMS: padded_batches(model, items, tokenizer)}
    worth: dict[str, Worth] = {}
    if texts:
        experts, background = experts_in(Path(name))
        classes = [expert.statistics for expert in experts]
        worth = composed_worth(
            model, classes if background is None else [*classes, background], texts
        )
    text = options.text or [
        tokenizer.decode(item["input_ids"][:_MAX_TOKENS], skip_special_tokens=True)
        for item in items[:2]
    ]
    routes = [
        (sample, route_text(model, tokenizer, sample))
        for sample in text
        if tokenizer and routed_layers(model)
    ]
    load = []
    if routes and worth and SENTENCES not in worth:
        load = torch.tensor([result.load for result in worth.values()]).sum(0).tolist()
    elif routes:
        load = expert_load(model, items, tokenizer)
    _report(folder, name, model, routes, load, counted, worth)
    for text_name, result in worth.items():
        worth_table(result, text_name).show()
        print(
            f"on {result.tokens} tokens the mixture has {result.loss:.3f} nats per token, "
            f"{result.loss - result.oracle:.3f} more than the oracle"
        )
    if is_composed and not worth:
        print("what each expert is worth: give --texts FILE ..., a file of each domain")
    print(f"report and numbers are in {folder}; open {folder / REPORT_FILE}")


def _items(style: str, split: str, most: int, tasks: Sequence[Task], tokenizer: Any) -> list[Item]:
    """Encoded items on which the expert load is counted; an encoder reads only the inputs."""
    share = -(-most // len(tasks))
    if style != ENCODER:
        return [
            item for task in tasks for item in encode_task(task, split, tokenizer, share, style)
        ]
    texts = (example.source for task in tasks for example in task.examples(split)[:share])
    return [
        dict(tokenizer(t, truncation=True, max_length=128, return_token_type_ids=False))
        for t in texts
    ]


def _fitting(model: Any, flops: float, passes: int, most: int) -> int:
    """Items of `LENGTH` tokens, at most so many, with which these passes take about ``flops``."""
    return max(1, min(most, int(flops / (passes * 2 * LENGTH * model.num_parameters()))))


def worth_table(worth: Worth, text: str) -> report.Table:
    """Share of the router's weights, loss alone, loss without and what removing adds, by expert."""
    parts = zip(worth.names, worth.share, worth.alone, worth.removed, strict=True)
    rows = [
        [n, f"{s:.0%}", f"{a:.3f}", f"{r:.3f}", f"{r - worth.loss:+.3f}"] for n, s, a, r in parts
    ]
    rows.append(["the mixture", "", f"{worth.loss:.3f}", "", ""])
    rows.append(["oracle", "", f"{worth.oracle:.3f}", "", ""])
    header = ("expert", "weight", "alone", "without", "removed")
    return report.Table(header, rows, f"{text}, {worth.tokens} tokens")


def _spectra(model: Any) -> dict[str, dict[str, list]]:
    """Bonds of MPO weights by kind (up, down, an attention projection's name, ...) and layer."""
    by_kind: dict[str, dict[str, list]] = {}
    for name, cores in mpo_modules(model):
        layer, _, kind = short_name(name).rpartition(".")
        bonds = bond_spectra(cores)
        if bonds:
            by_kind.setdefault(kind, {})[layer or kind] = bonds
    return by_kind


def _report(
    folder: Path,
    name: str,
    model: Any,
    routes: Sequence[tuple[str, list[Route]]],
    load: list[list[int]],
    counted: str,
    worth: Mapping[str, Worth],
) -> None:
    """Write everything, section by section."""
    config = model.mpoe_config
    layers = [short_name(layer) for layer, _ in routed_layers(model)]
    parts = [report.Table((), list(facts(model).items()), kind="text").html()]
    spectra = _spectra(model)
    numbers = {
        "model": name,
        "parameters": model.parameter_report(),
        "layers": layers,
        "counted_on": counted,
        "expert_load": load,
        "worth": {text: vars(result) for text, result in worth.items()},
        "routes": [{"text": text, "streams": list(map(vars, streams))} for text, streams in routes],
        "bonds": {  # effective rank as a share of every bond
            kind: {layer: [bond.used for bond in bonds] for layer, bonds in layers_of_kind.items()}
            for kind, layers_of_kind in spectra.items()
        },
    }

    def add(heading: str, *contents: Any, words: object = "") -> None:
        parts.append(report.section(heading, *contents, note=_WORDS[heading].format(words)))

    if routes:
        named = getattr(model.config, "mpoe_experts", None) or [""] * config.num_experts
        names = [f"{k} {expert_name}".strip() for k, expert_name in enumerate(named)]
        add("Which expert took which token", report.routes_html(routes, names))
    if worth:
        tables = [worth_table(result, text).section() for text, result in worth.items()]
        add("What each expert is worth", *tables)
    if load:
        add("Expert load", report.load_map(load, layers), words=counted)
    if spectra:
        add("What the bonds carry", report.spectrum_lines(spectra))
    weights = summarize(model, NUM_TOKENS, config.top_k)
    if weights:
        parts.append(report.Table(HEADER, list(weights.values()), "MPO weights", LEGEND).section())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / REPORT_FILE).unlink(missing_ok=True)
    write_json(folder / NUMBERS_FILE, numbers)
    report.write_page(folder / REPORT_FILE, f"mpoe inspect: {name}", parts)
