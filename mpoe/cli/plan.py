"""`mpoe plan MODEL_OR_CONFIG [flags]`: parameters, FLOPs and memory of a mixture of MPO experts, beside dense experts
(Switch) and the dense model.

Computed only from the configuration: no weights are loaded or allocated, and nothing is timed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpoe.cli.errors import CommandError
from mpoe.cli.parsing import option, read_command

if TYPE_CHECKING:
    from rich.table import Table

    from mpoe.config import MPOEConfig
    from mpoe.estimation.costs import ModelCosts, Usage
    from mpoe.estimation.inventory import Inventory

SCHEMA = 2
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
NAMES = {"mpoe": "MPOE", "switch": "Switch", "dense": "dense"}
SMALL = 0.5  # of Switch's parameters: with more, the mixture is not a small one
WIDTH = 110  # of a table, if that of the terminal is unknown, as in a pipe


@dataclass
class PlanOptions:
    """The mixture and its workload."""

    _argument_group_name = "plan"

    experts: int = option(8, "experts per layer", "num_experts")
    shape: str | None = option(
        None,
        "hidden, neurons, separable, paper, light, or JSON: kind -> MPOShape; "
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


GROUPS = (PlanOptions,)


def command(arguments: Sequence[str]) -> None:
    """Run the command on its tokens."""
    usage = "mpoe plan MODEL_OR_CONFIG [--flag value ...]"
    asked = read_command(usage, __doc__, GROUPS, arguments, words=1)
    if asked is None:
        return
    words, (plan,), given = asked
    if not words:
        raise CommandError(f"plan needs a model first: {usage}")
    run(words[0], plan, given)


def run(model: str, options: PlanOptions, given: set[str]) -> dict[str, Any]:
    """Plan; print a table and return (and write) everything as JSON-able values."""
    from rich.console import Console
    from rich.markup import escape

    from mpoe.cli.files import check_writable_file, write_json
    from mpoe.estimation.costs import model_costs

    if options.json is not None:
        check_writable_file("json", Path(options.json))
    _check(options)
    inventory = _inventory(model, options)
    usage = _usage(inventory, options)
    costs = model_costs(inventory, _config(inventory, options, given), usage)
    values = {"schema": SCHEMA, "model": inventory.values(), "work": usage.values(), "kind": "plan", **costs.values()}
    console = Console()
    wide = console if console.is_terminal else Console(width=max(WIDTH, console.width))
    for line in (escape(_head(inventory, usage)), _plan_table(costs), *map(escape, _plan_notes(costs))):
        wide.print(line, highlight=False)
    if options.json is not None:
        write_json(Path(options.json), values)
        print(f"written to {options.json}")
    return values


# ------------------------------------------------------------- what is asked


def _check(options: PlanOptions) -> None:
    """Refuse invalid values before heavy imports."""
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


def _inventory(model: str, options: PlanOptions) -> Inventory:
    from mpoe.estimation.inventory import take_inventory

    if model == "t5" and not Path(model).exists():  # gpt2, the other stand-in's name, means the well-known size here
        from mpoe.data.embedded import stand_in_path

        model = str(stand_in_path(model))
    return take_inventory(model, options.exclude_modules, options.layers_to_transform or None)


def _config(inventory: Inventory, options: PlanOptions, given: set[str]) -> MPOEConfig:
    """The requested mixture; for a converted model, its own unless flags override it."""
    from mpoe.cli.options import ExpertOptions
    from mpoe.config import MPOEConfig
    from mpoe.config.shapes import NEURONS

    shape = options.shape
    if shape is None and inventory.mpoe is not None and inventory.mpoe.is_neurons:
        shape = NEURONS
    asked = ExpertOptions(
        num_experts=options.experts,
        shape=shape,
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


# ------------------------------------------------------------- what is shown


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
    share = costs.experts("mpoe").parameters / costs.experts("switch").parameters
    if share >= SMALL:
        notes.append(
            f"At this width these experts are not small: MPOE's feed-forward layers hold {share:.0%} of Switch's "
            "parameters. Compare --shape separable, --shape neurons, and a lower --bond."
        )
    return notes if costs.lossless else [*notes, TRUNCATED]


TRUNCATED = (
    "truncated bonds lose most of a pretrained matrix (relative error .59 to .93 at bonds 128 to 32): "
    "for training from scratch, not for converting."
)
