"""`mpoe plan MODEL_OR_CONFIG [flags]`: parameters, FLOPs and memory of a mixture of MPO experts, beside dense experts
(Switch) and the dense model.

Computed only from the configuration: no weights are loaded or allocated, and nothing is timed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpoe.cli.errors import CommandError, close_matches
from mpoe.cli.parsing import option, read_command

if TYPE_CHECKING:
    from rich.table import Table

    from mpoe.config import MPOEConfig
    from mpoe.estimation.costs import ModelCosts, Usage
    from mpoe.estimation.inventory import Inventory
    from mpoe.estimation.suggest import Limits, Suggestion

SCHEMA = 2
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
NAMES = {"mpoe": "MPOE", "switch": "Switch", "dense": "dense"}
WIDTH = 110  # of a table, if that of the terminal is unknown, as in a pipe
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9, "t": 10**12}


@dataclass
class PlanOptions:
    """The mixture and its workload."""

    _argument_group_name = "plan"

    experts: int = option(8, "experts per layer", "num_experts")
    shape: str | None = option(
        None,
        "hidden, neurons, separable, paper, light, or JSON: kind -> MPOShape; of suggestions: the only family; "
        "default: hidden, or separable where a bond or cores are given",
    )
    neurons: int | None = option(None, "hidden neurons of each expert, of shape neurons; default: 64")
    latent: int | None = option(None, "size of the space that such experts share; none = the model's own")
    bond: int | None = option(None, "cap of every bond dimension; none = lossless", "max_bond")
    separable_left: int | None = option(None, "left core of a separable up projection")
    separable_right: int | None = option(None, "right core of a separable up projection")
    light_p: int = option(64, "product i * j of a light shape's outer cores")
    exclude_modules: list[str] = option([], "feed-forward modules that stay dense")
    layers_to_transform: list[int] = option([], "layers to convert; none given = all")
    top_k: int | None = option(
        None, "experts per token; default: 2 of hidden, an eighth of neurons (2 to 8), 1 of other shapes"
    )
    tokens: int = option(2048, "tokens of one device in one step; of T5: in each of encoder and decoder")
    decoder_tokens: int | None = option(None, "T5: tokens of the decoder, when they are others")
    dtype: str = option("bf16", "fp32, bf16 or fp16: weights and activations in products")
    training: bool = option(False, "forward and backward; the default")
    inference: bool = option(False, "forward only")
    mask_central: bool = option(False, "training: a step in which the gradient mask spares the central cores")
    json: str | None = option(None, "also write everything, layer by layer, to this file")


@dataclass
class SuggestOptions:
    """Shapes for a budget."""

    _argument_group_name = "suggest"

    suggest: bool = option(False, "propose shapes instead of planning one; a budget or rank implies it")
    max_parameters: str | None = option(None, "of the whole model, e.g. 300M or 1.2B")
    max_flops: float | None = option(None, "of the feed-forward layers, x dense, e.g. 1.3")
    rank_by: str = option("capacity", "capacity (auxiliary parameters per expert), flops or parameters")


GROUPS = (PlanOptions, SuggestOptions)


def command(arguments: Sequence[str]) -> None:
    """Run the command on its tokens."""
    usage = "mpoe plan MODEL_OR_CONFIG [--flag value ...]"
    asked = read_command(usage, __doc__, GROUPS, arguments, words=1)
    if asked is None:
        return
    words, (plan, suggest), given = asked
    if not words:
        raise CommandError(f"plan needs a model first: {usage}")
    run(words[0], plan, suggest, given)


def run(model: str, options: PlanOptions, budget: SuggestOptions, given: set[str]) -> dict[str, Any]:
    """Plan, or suggest shapes; print a table and return (and write) everything as JSON-able values."""
    from rich.console import Console
    from rich.markup import escape

    from mpoe.cli.files import check_writable_file, write_json

    if options.json is not None:
        check_writable_file("json", Path(options.json))
    suggesting = budget.suggest or bool(given & {"max_parameters", "max_flops", "rank_by"})
    _check(options, budget, given, suggesting)
    limits = _limits(budget)
    inventory = _inventory(model, options)
    config, usage = _config(inventory, options, given, suggesting), _usage(inventory, options)
    values: dict[str, Any] = {"schema": SCHEMA, "model": inventory.values(), "work": usage.values()}
    if suggesting:
        from mpoe.config import NAMED_SHAPES
        from mpoe.estimation.suggest import suggest

        families = NAMED_SHAPES if options.shape is None else (options.shape,)
        found = suggest(inventory, config, usage, limits, budget.rank_by, families)
        values |= _suggestion_values(found, limits)
        table, notes = _suggestion_table(found, budget.rank_by), _suggestion_notes(found)
    else:
        from mpoe.estimation.costs import model_costs

        costs = model_costs(inventory, config, usage)
        values |= {"kind": "plan", **costs.values()}
        table, notes = _plan_table(costs), _plan_notes(costs)
    console = Console()
    wide = console if console.is_terminal else Console(width=max(WIDTH, console.width))
    for line in (escape(_head(inventory, usage)), table, *map(escape, notes)):
        wide.print(line, highlight=False)
    if options.json is not None:
        write_json(Path(options.json), values)
        print(f"written to {options.json}")
    return values


# ------------------------------------------------------------- what is asked


def parse_count(name: str, text: str) -> int:
    """``"300M"``, ``"1.2B"``, ``"300_000_000"`` -> the number (units k, M, B or G, T).

    Raises:
        CommandError: not such a number, or less than one.
    """
    match = re.fullmatch(r"([0-9][0-9_,]*(?:\.[0-9]+)?|\.[0-9]+)\s*([kmgbt]?)", text.strip().lower())
    if match is None:
        raise CommandError(f"{name} must be a number like 300M or 1.2B; got {text!r}")
    value = int(float(match[1].replace("_", "").replace(",", "")) * _UNITS[match[2]])
    if value < 1:
        raise CommandError(f"{name} must be at least 1; got {text!r}")
    return value


def _check(options: PlanOptions, budget: SuggestOptions, given: set[str], suggesting: bool) -> None:
    """Refuse invalid values before heavy imports, and options that a search for shapes cannot use."""
    if options.training and options.inference:
        raise CommandError("--training and --inference exclude each other")
    for name, least in (("experts", 1), ("bond", 1), ("top_k", 1), ("tokens", 0), ("decoder_tokens", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise CommandError(f"{name} must be at least {least}; got {value}")
    if options.dtype not in DTYPES:
        raise CommandError(f"dtype must be one of {', '.join(DTYPES)}; got {options.dtype!r}")
    if options.mask_central and options.inference:
        raise CommandError("mask_central concerns training; it cannot be given with --inference")
    if budget.max_flops is not None and not (budget.max_flops > 0 and math.isfinite(budget.max_flops)):
        raise CommandError(f"max_flops must be greater than 0; got {budget.max_flops}")
    if budget.max_flops is not None and options.tokens == 0 and not options.decoder_tokens:
        raise CommandError("max_flops needs tokens; got 0")
    for name in ("bond", "separable_left", "separable_right", "light_p"):
        if suggesting and name in given:
            raise CommandError(f"{name} is what suggestions choose; it cannot be given with --suggest or a budget")
    if suggesting and options.shape == "neurons":
        raise CommandError("shape must be separable, paper or light with --suggest or a budget; got 'neurons'")
    if suggesting and options.shape is not None and options.shape.lstrip().startswith("{"):
        raise CommandError("shape must be separable, paper or light with --suggest or a budget; got JSON")


def _inventory(model: str, options: PlanOptions) -> Inventory:
    from mpoe.estimation.inventory import take_inventory

    if model == "t5" and not Path(model).exists():  # gpt2, the other stand-in's name, means the well-known size here
        from mpoe.data.embedded import stand_in_path

        model = str(stand_in_path(model))
    return take_inventory(model, options.exclude_modules, options.layers_to_transform or None)


def _config(inventory: Inventory, options: PlanOptions, given: set[str], suggesting: bool) -> MPOEConfig:
    """The requested mixture; for a converted model, its own unless flags override it."""
    from mpoe.cli.options import ExpertOptions
    from mpoe.config import MPOEConfig
    from mpoe.config.shapes import NEURONS, SEPARABLE

    shape = options.shape
    if shape is None and inventory.mpoe is not None and inventory.mpoe.is_neurons:
        shape = NEURONS
    asked = ExpertOptions(
        num_experts=options.experts,
        shape=SEPARABLE if options.shape is None and suggesting else shape,
        max_bond=options.bond,
        separable_left=options.separable_left,
        separable_right=options.separable_right,
        light_p=options.light_p if "light_p" in given else None,
        top_k=options.top_k,
        neurons=options.neurons,
        latent=options.latent,
    ).build()
    assert asked is not None  # only a dense model has no configuration
    asked = asked if inventory.blocks_fit else asked.with_cores()
    if inventory.mpoe is None:
        return asked
    own = inventory.mpoe
    names = {"experts": "num_experts", "bond": "max_bond", "shape": "shape", "light_p": "light_p"}
    names |= {name: name for name in ("separable_left", "separable_right", "neurons", "latent")}
    changes = {kept: getattr(asked, kept) for name, kept in names.items() if name in given}
    fields = {**{kept: getattr(own, kept) for kept in names.values()}, **changes}
    routing = asked if "top_k" in given or (own.is_neurons and fields["shape"] != NEURONS) else own
    if fields["shape"] != NEURONS:
        fields |= {"neurons": None, "latent": None}
    return MPOEConfig(
        **fields,
        moe_type=routing.moe_type,
        router=routing.router,
    )


def _usage(inventory: Inventory, options: PlanOptions) -> Usage:
    import torch

    from mpoe.estimation.costs import Usage

    if options.decoder_tokens is not None and "decoder" not in inventory.streams:
        raise CommandError(f"decoder_tokens needs a model with a decoder of its own; {inventory.name} has none")
    tokens = dict.fromkeys((*inventory.streams, *(stream for stream, _, _ in inventory.rest)), options.tokens)
    if options.decoder_tokens is not None:
        tokens["decoder"] = options.decoder_tokens
    return Usage(tokens, getattr(torch, DTYPES[options.dtype]), not options.inference, options.mask_central)


def _limits(budget: SuggestOptions) -> Limits:
    from mpoe.estimation.suggest import RANKS, Limits

    if budget.rank_by not in RANKS:
        hint = close_matches(budget.rank_by, RANKS)
        raise CommandError(f"rank_by must be one of {', '.join(RANKS)}; got {budget.rank_by!r}{hint}")
    most = None if budget.max_parameters is None else parse_count("max_parameters", budget.max_parameters)
    return Limits(most, budget.max_flops)


# ------------------------------------------------------------- what is shown


def _suggestion_values(found: Sequence[Suggestion], limits: Limits) -> dict[str, Any]:
    """Suggestions, best first."""
    rows = [
        {
            "name": one.name,
            "options": one.options,
            "config": one.costs.config.to_dict(),
            "lossless": one.costs.lossless,
            "capacity": one.capacity,
            **one.costs.whole("mpoe").values(one.costs.usage),
            "x_dense": one.x_dense,
        }
        for one in found
    ]
    budget = {"max_parameters": limits.parameters, "max_flops": limits.x_dense}
    return {"kind": "suggestions", "budget": budget, "suggestions": rows}


def _digits(value: float) -> str:
    """Four significant digits, without an exponent."""
    return f"{value:.1f}" if value >= 100 else f"{value:.2f}" if value >= 10 else f"{value:.3f}"


def scaled(number: float, unit: str = "", billion: str = "G") -> str:
    """``294.0 M``, ``1.176 GB``: powers of ten."""
    for prefix, size in (("P", 1e15), ("T", 1e12), (billion, 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{_digits(number / size)} {prefix}{unit}"
    return f"{number:.0f} {unit}".rstrip()


def count(number: float) -> str:
    """``294.0 M``, ``1.176 B``: parameters, in the units that papers use."""
    return scaled(number, billion="B")


def _head(inventory: Inventory, usage: Usage) -> str:
    tokens = ", ".join(f"{number:,} {stream} tokens" for stream, number in usage.tokens.items())
    tokens = tokens.replace(" main tokens", " tokens")  # the only stream of GPT-2 and BERT needs no name
    phase = "training" if usage.training else "inference"
    masked = ", central cores masked" if usage.mask_central else ""
    return (
        f"{inventory.name} ({inventory.source}; {inventory.class_name}, {count(inventory.parameters)} parameters), "
        f"{phase}{masked}: {tokens} a step, {str(usage.dtype).removeprefix('torch.')}"
    )


def _new_table(title: str, *columns: str) -> Table:
    from rich import box
    from rich.table import Table

    style: dict[str, Any] = {"title_justify": "left", "box": box.HORIZONTALS}
    table = Table(title=title, padding=(0, 1, 0, 0), pad_edge=False, **style)
    for name in columns:
        left = name in ("part", "design", "shape", "lossless")
        table.add_column(name, justify="left" if left else "right", no_wrap=True)
    return table


def _cells(cost: dict[str, Any], training: bool) -> list[str]:
    temporary, x_dense = cost["temporary_bytes"], cost["x_dense"]
    return [
        count(cost["parameters"]),
        scaled(cost["weight_bytes"], "B"),
        *([scaled(cost["state_bytes"], "B")] if training else []),
        scaled(temporary, "B") if temporary else "-",
        scaled(cost["flops"]),
        "-" if x_dense is None else f"{x_dense:.2f}",
    ]


def _plan_table(costs: ModelCosts) -> Table:
    """Every kind of layer, all of them, and the whole model, in the three designs."""
    config, training, values = costs.config, costs.usage.training, costs.values()
    shape = config.shape if isinstance(config.shape, str) else "given"
    state = ["state"] if training else []
    table = _new_table(
        f"{config.num_experts:,} experts, top-{config.top_k}, shape {shape}",
        *("part", "design", "parameters", "weights", *state, "temporary", "FLOP", "x dense"),
    )

    def add(part: str, found: dict[str, Any], second: str = "") -> None:
        for design, words in zip(NAMES, (part, second, ""), strict=True):
            table.add_row(words, NAMES[design], *_cells(found[design], training))
        table.add_section()

    for layer in values["layers"]:
        stream = " and ".join(name for name in layer["streams"] if name != "main")
        for matrix in layer["matrices"]:
            by = dict.fromkeys(filter(None, (matrix["strategy"], matrix["backward_strategy"])))
            part = f"{stream} {matrix['kind']} {matrix['in_features']}x{matrix['out_features']}".strip()
            add(part, matrix, f"  by {' / '.join(by)}")
    totals, number = values["totals"], sum(layer["count"] for layer in values["layers"])
    add(f"{number} feed-forward layers", totals["feed_forward"])
    table.add_row("rest of the model", "all", *_cells(totals["rest"], training))
    table.add_section()
    add("whole model", totals["whole"])
    return table


def _plan_notes(costs: ModelCosts) -> list[str]:
    state = "state: with gradients and AdamW, float32 (16 bytes per parameter). " if costs.usage.training else ""
    notes = [
        "MPOE: experts that share a central core per matrix; Switch: as many dense experts; dense: the model as it is.",
        f"weights: in {str(costs.usage.dtype).removeprefix('torch.')}. {state}temporary: rebuilt for one product, at "
        "most two experts' of one matrix. Activations are not counted.",
        "FLOP: of one step's matrix products, routers included, attention scores not; x dense: over the dense row's. "
        "by: the order of the fewest FLOPs, forward / backward; a run times the best few of them once.",
    ]
    return notes if costs.lossless else [*notes, TRUNCATED]


TRUNCATED = (
    "truncated bonds lose most of a pretrained matrix (relative error .59 to .93 at bonds 128 to 32): "
    "for training from scratch, not for converting."
)


def _suggestion_table(found: Sequence[Suggestion], rank_by: str) -> Table:
    """The shapes that meet a budget, the lossless ones first."""
    from mpoe.estimation.suggest import front

    config, usage = found[0].costs.config, found[0].costs.usage
    state = ["state"] if usage.training else []
    table = _new_table(
        f"{config.num_experts:,} experts, top-{config.top_k}; ranked by {rank_by}",
        *("shape", "parameters", "per expert", *state, "x dense", "lossless"),
    )
    best = {one.name for one in front([one for one in found if one.costs.lossless])}
    for one in found:
        whole, lossless = one.costs.whole("mpoe").values(usage), one.costs.lossless
        table.add_row(
            f"{one.name} *" if one.name in best else one.name,
            count(one.parameters),
            f"{one.capacity:.2%}",
            *([scaled(whole["state_bytes"], "B")] if usage.training else []),
            f"{one.x_dense:.2f}",
            "yes" if lossless else "no",
        )
    return table


def _suggestion_notes(found: Sequence[Suggestion]) -> list[str]:
    notes = [
        f"the first, for plan and convert: {found[0].options}",
        "per expert: its own parameters over the dense layer's, its capacity. x dense: FLOPs of the feed-forward "
        "layers. *: no lossless one listed has both more capacity and fewer FLOPs.",
        "separable L/R: --shape separable --separable_left L --separable_right R; light P: --shape light --light_p P; "
        "bond B: --max_bond B.",
    ]
    return notes if all(one.costs.lossless for one in found) else [*notes, TRUNCATED]
