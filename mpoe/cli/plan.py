"""`mpoe plan MODEL_OR_CONFIG [flags]`: parameters, FLOPs and memory of a mixture of MPO experts, beside dense experts
(Switch) and the dense model.

Computed only from the configuration: no weights are loaded or allocated, and nothing is timed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from mpoe.cli.command import Asked, CommandError, as_command, option
from mpoe.cli.options import ExpertOptions
from mpoe.config import MPOEConfig, RouterConfig
from mpoe.config.shapes import NEURONS

if TYPE_CHECKING:
    from mpoe.cli.report import Table
    from mpoe.estimation import Inventory, Usage

SCHEMA = 2
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
NAMES = {"mpoe": "MPOE", "switch": "Switch", "dense": "dense"}
SMALL = 0.5  # of Switch's parameters: with more, the mixture is not a small one
WIDTH = 110  # of a table, if that of the terminal is unknown, as in a pipe


@dataclass
class PlanOptions:
    """The workload."""

    tokens: int = option(2048, "tokens of one device in one step; of T5: in each of encoder and decoder")
    decoder_tokens: int | None = option(None, "T5: tokens of the decoder, when they are others")
    dtype: str = option("bf16", "fp32, bf16 or fp16: weights and activations in products", choices=list(DTYPES))
    training: bool = option(False, "forward and backward; the default")
    inference: bool = option(False, "forward only")
    mask_central: bool = option(False, "training: a step in which the gradient mask spares the central cores")
    json: str | None = option(None, "also write everything, layer by layer, to this file")

    LEAST: ClassVar[dict[str, int]] = {"tokens": 0, "decoder_tokens": 0}

    def __post_init__(self) -> None:
        if self.training and self.inference:
            raise ValueError("--training and --inference exclude each other")
        if self.mask_central and self.inference:
            raise ValueError("mask_central concerns training; it cannot be given with --inference")


@as_command("mpoe plan MODEL_OR_CONFIG [--flag value ...]", PlanOptions, ExpertOptions, words=(1, 1))
def command(asked: Asked) -> None:
    """Print the table, and write everything as JSON if asked."""
    import torch

    from mpoe.cli.models import check_writable_file, write_json
    from mpoe.data.embedded import stand_in_path
    from mpoe.estimation import Usage, model_costs, take_inventory

    (options, experts), (name,) = asked.options, asked.words
    if options.json is not None:
        check_writable_file("json", Path(options.json))
    # gpt2, the other stand-in's name, means the well-known size here
    path = str(stand_in_path(name)) if name == "t5" and not Path(name).exists() else name
    inventory = take_inventory(path, experts.exclude_modules, experts.layers_to_transform or None)
    inventory = replace(inventory, name=name) if path != name else inventory
    if options.decoder_tokens is not None and "decoder" not in inventory.streams:
        raise CommandError(f"decoder_tokens needs a model with a decoder of its own; {inventory.name} has none")
    tokens = dict.fromkeys((*inventory.streams, *(stream for stream, _, _ in inventory.rest)), options.tokens)
    if options.decoder_tokens is not None:
        tokens["decoder"] = options.decoder_tokens
    usage = Usage(tokens, getattr(torch, DTYPES[options.dtype]), not options.inference, options.mask_central)
    costs = model_costs(inventory, _config(inventory, experts, asked.given), usage)
    model = {key: getattr(inventory, key) for key in ("name", "source", "class_name", "parameters")}
    model["feed_forward_layers"] = len(inventory.sites)
    work = {**vars(usage), "dtype": str(usage.dtype).removeprefix("torch.")}
    values = {"schema": SCHEMA, "model": model, "work": work, "kind": "plan", **costs}
    _table(values, [_head(inventory, usage), *_notes(values)]).show(WIDTH)
    if options.json is not None:
        write_json(Path(options.json), values)
        print(f"written to {options.json}")


def _config(inventory: Inventory, experts: ExpertOptions, given: set[str]) -> MPOEConfig:
    """The requested mixture; for a converted model, its own unless flags override it."""
    own = inventory.mpoe
    if experts.shape is None and own is not None and own.is_neurons:
        experts.shape = NEURONS
    asked = experts.build()
    if asked is None or asked.expert_type == "dense":
        raise CommandError("plan puts dense experts and the dense model beside MPO experts; got no MPO experts")
    asked = asked.with_cores() if any(site.obstacle for site in inventory.sites) else asked
    if own is None:
        return asked
    changes = {field.name: getattr(asked, field.name) for field in fields(own) if field.name in given}
    shape = changes.get("shape", own.shape)
    if shape != NEURONS:
        changes |= {"neurons": None, "latent": None}
    if given & {field.name for field in fields(RouterConfig)} or (own.is_neurons and shape != NEURONS):
        changes |= {"moe_type": asked.moe_type, "router": asked.router}
    return replace(own, **changes)


# ------------------------------------------------------------- what is shown


def scaled(number: float, unit: str = "", billion: str = "G") -> str:
    """``294.0 M``, ``1.176 GB``: powers of ten, four significant digits."""
    for prefix, size in (("P", 1e15), ("T", 1e12), (billion, 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            value = number / size
            return f"{value:.{1 if value >= 100 else 2 if value >= 10 else 3}f} {prefix}{unit}"
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


def _table(values: dict[str, Any], words: Sequence[str]) -> Table:
    """Every kind of layer, all of them, and the whole model, in the three designs."""
    from mpoe.cli.report import Table

    config, training, totals = values["config"], values["work"]["training"], values["totals"]
    shape = config["shape"] if isinstance(config["shape"], str) else "given"
    title = f"{config['num_experts']:,} experts, top-{config['router']['top_k']}, shape {shape}"
    header = ["part", "design", "parameters", "weights", *["state"][:training], "temporary", "FLOP", "x dense"]
    rows: list[list[str]] = []

    def add(part: str, found: dict[str, Any], second: str = "") -> None:
        for design, first in zip(NAMES, (part, second, ""), strict=True):
            rows.append([first, NAMES[design], *_cells(found[design], training)])

    for layer in values["layers"]:
        stream = " and ".join(name for name in layer["streams"] if name != "main")
        for matrix in layer["matrices"]:
            by = dict.fromkeys(filter(None, (matrix["strategy"], matrix["backward_strategy"])))
            sizes = f"{matrix['in_features']}x{matrix['out_features']}"
            add(f"{stream} {matrix['kind']}".strip(), matrix, f"  {sizes} by {' / '.join(by)}")
    add(f"{sum(layer['count'] for layer in values['layers'])} feed-forward layers", totals["feed_forward"])
    rows.append(["rest of the model", "all", *_cells(totals["rest"], training)])
    add("whole model", totals["whole"])
    return Table(header, rows, title, "\n".join(words))


def _notes(values: dict[str, Any]) -> list[str]:
    training, dtype = values["work"]["training"], values["work"]["dtype"]
    state = "state: with gradients and AdamW, float32 (16 bytes per parameter). " if training else ""
    lossless = all(matrix["lossless"] for layer in values["layers"] for matrix in layer["matrices"])
    experts = values["totals"]["feed_forward"]
    share = experts["mpoe"]["parameters"] / experts["switch"]["parameters"]
    large = (
        f"At this width these experts are not small: MPOE's feed-forward layers hold {share:.0%} of Switch's "
        "parameters. Compare --shape separable, --shape neurons, and a lower --bond."
    )
    return [
        "MPOE: experts that share a central core per matrix; Switch: as many dense experts; dense: the model as it is.",
        f"weights: in {dtype}. {state}temporary: rebuilt for one product, at most two experts' of one matrix. "
        "Activations are not counted.",
        "FLOP: of one step's matrix products, routers included, attention scores not; x dense: over the dense row's. "
        "by: the order of the fewest FLOPs, forward / backward; a run times the best few of them once.",
        *([large] if share >= SMALL else []),
        *([] if lossless else [TRUNCATED]),
    ]


TRUNCATED = (
    "truncated bonds lose most of a pretrained matrix (relative error .59 to .93 at bonds 128 to 32): "
    "for training from scratch, not for converting."
)
