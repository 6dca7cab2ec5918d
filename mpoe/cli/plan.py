"""`mpoe plan MODEL_OR_CONFIG [flags]`: parameters, FLOPs and memory of a mixture of MPO experts,
beside dense experts (Switch) and the dense model. No weights are loaded or allocated, and nothing
is timed.

The mixture is built from the configuration on the meta device, and its modules are counted, so all
numbers are exact:

* parameters: of the modules; dense experts have ``E * I * F`` for every matrix ``[I, F]``, and both
  mixtures a router.
* FLOPs of one device's matrix products in a step: of the contraction that
  `mpoe_kernels.plan_contraction` ranks first for MPO experts, ``2 T K I F`` for dense ones, three
  times that with the backward pass. Around hidden-side experts and beside neurons the dense
  products stay; the backward pass recomputes the activation's input, so what experts own then takes
  part in four products of up and gate_proj and in three of down.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from mpoe.cli.command import Request, as_command, option
from mpoe.cli.errors import CommandError
from mpoe.cli.models import read_configuration
from mpoe.cli.options import ExpertOptions, expert_options_of
from mpoe.cli.outputs import check_writable_file, write_json
from mpoe.cli.report import Table
from mpoe.config import MPOEConfig
from mpoe.config.checks import refusing
from mpoe.data.mappings import read_mapping
from mpoe.layers import MPOEmbedding, TopKRouter
from mpoe.layers.cores import MPOCores
from mpoe.layers.drop_in import linear_weight
from mpoe.layers.feed_forward import KeptFeedForward, RoutedFeedForward
from mpoe.models.classes import classes_of, default_class
from mpoe.models.find import with_own_head
from mpoe.models.table import CLASS_PREFIX, TABLE, TYPE_PREFIX, known_type
from mpoe.models.walk import kept_modules, modules_of, short_name
from mpoe_kernels import plan_contraction

SCHEMA = 3
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DESIGNS = {"mpoe": "MPOE", "switch": "Switch", "dense": "dense"}
STATE_BYTES = 16  # of a trained parameter: itself, its gradient and AdamW's two moments, in float32
SMALL = 0.5  # of Switch's parameters: with more, the mixture is not a small one
WIDTH = 110  # of a table, if that of the terminal is unknown, as in a pipe


@dataclass
class PlanOptions:
    """The workload."""

    tokens: int = option(
        2048, "tokens of one device in one step; of T5: in each of encoder and decoder"
    )
    dtype: str = option(
        "bf16", "fp32, bf16 or fp16: weights and activations in products", choices=list(DTYPES)
    )
    inference: bool = option(False, "forward only, without the training's backward pass")
    json: str | None = option(None, "also write everything, matrix by matrix, to this file")

    LEAST = (("tokens", 0),)

    @property
    def passes(self) -> int:
        """Number of products of a dense linear in the step: the output and, in training, the two
        gradients."""
        return 1 if self.inference else 3


@as_command(PlanOptions, ExpertOptions, words=(1, 1))
def command(request: Request) -> None:
    """Print the table, and write everything as JSON if wanted."""
    (options, experts), (name,) = request.options, request.words
    if options.json is not None:
        check_writable_file("json", Path(options.json))
    values = read_values(name)
    chosen = expert_options_of(request.given)
    converted = values.get("mpoe")
    if converted is not None and chosen:
        raise CommandError(
            f"{name} is converted already: {', '.join(chosen)} cannot be changed any more"
        )
    config = experts.build() if converted is None else MPOEConfig.from_dict(converted)
    if config is None or config.expert_type == "dense":
        raise CommandError(
            "plan puts dense experts and the dense model beside MPO experts; got no MPO experts"
        )
    model = build(name, values, config)
    planned = {
        "schema": SCHEMA,
        "name": name,
        "class": type(model).__name__.removeprefix(CLASS_PREFIX),
        "work": vars(options),
        **costs(model, options),
    }
    table(planned).show(WIDTH)
    if options.json is not None:
        write_json(Path(options.json), planned)
        print(f"written to {options.json}")


# ------------------------------------------------------------- the model

# Sizes of well-known models, so that they can be planned without network or weights: those of the
# models' published configurations (Raffel et al., JMLR 2020, sections 3.2 and 3.7; Radford et al.
# 2019, table 2; Devlin et al., NAACL 2019, section 3); everything else is the default of the
# model's Hugging Face configuration class.
_FIELDS = {
    "t5": ("d_model", "d_ff", "num_layers", "num_heads", "d_kv", "vocab_size"),
    "gpt2": ("n_embd", "n_layer", "n_head"),
    "bert": ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
}
_SIZES = {
    "t5-small": (512, 2048, 6, 8, 64, 32128),
    "t5-base": (768, 3072, 12, 12, 64, 32128),
    "t5-large": (1024, 4096, 24, 16, 64, 32128),
    "t5-3b": (1024, 16384, 24, 32, 128, 32128),
    "t5-11b": (1024, 65536, 24, 128, 128, 32128),
    "gpt2": (768, 12, 12),
    "gpt2-medium": (1024, 24, 16),
    "gpt2-large": (1280, 36, 20),
    "gpt2-xl": (1600, 48, 25),
    "bert-base-uncased": (768, 3072, 12, 12),
    "bert-large-uncased": (1024, 4096, 24, 16),
}


def read_values(name: str) -> dict:
    """The configuration of a well-known size such as ``t5-11b``, of a ``.json`` file, or of a
    model.

    Raises:
        ValueError: nothing of that name; the message suggests the closest known ones.
    """
    if name in _SIZES and not Path(name).exists():
        family = name.partition("-")[0]
        return {"model_type": family, **dict(zip(_FIELDS[family], _SIZES[name], strict=True))}
    if name.endswith(".json") and Path(name).is_file():
        return read_mapping(name, "configuration")
    return read_configuration(name, _SIZES)


def build(name: str, values: Mapping, config: MPOEConfig) -> Any:
    """The mixture that converting a model of this configuration gives, on the meta device.

    Args:
        name: of the model, for messages.
        values: of its ``config.json``.
        config: of the conversion; its default shape becomes separable where the family takes no
            blocks.

    Raises:
        ValueError: an unknown family, a broken configuration, a ``config`` that does not fit.
    """
    family = known_type(name, values).removeprefix(TYPE_PREFIX)
    config = config if TABLE[family].takes_blocks else config.with_cores()
    classes = {dense.__name__: made for dense, made in classes_of(family).items()}
    architectures = values.get("architectures") or []
    named = [str(architecture).removeprefix(CLASS_PREFIX) for architecture in architectures]
    made = classes[next(filter(classes.__contains__, named), default_class(family))]
    fields = {**values, "mpoe": config}
    for key in ("model_type", "architectures"):
        fields.pop(key, None)
    # configurations and models raise many types of errors
    invalid = f"model: the configuration of {name!r} builds no {made.__name__}: "
    with refusing(invalid), torch.device("meta"):
        model = made(made.config_class(**fields))
    return model if values.get("tie_word_embeddings", True) else with_own_head(model)


# ------------------------------------------------------------- its costs


@dataclass(frozen=True)
class Cost:
    """Additive costs of a part of the model: elements, FLOPs of a step, and the peak of weights
    that a product rebuilds (for a sum, the larger)."""

    parameters: int = 0
    flops: int = 0
    temporary_bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        temporary = max(self.temporary_bytes, other.temporary_bytes)
        return Cost(self.parameters + other.parameters, self.flops + other.flops, temporary)

    def values(self, work: PlanOptions, dense: Cost | None = None) -> dict:
        """For JSON: with the bytes of weights and of the training's state, and FLOPs relative to
        those of ``dense``."""
        return {
            **vars(self),
            "weight_bytes": self.parameters * DTYPES[work.dtype].itemsize,
            "state_bytes": 0 if work.inference else self.parameters * STATE_BYTES,
            "x_dense": self.flops / dense.flops if dense is not None and dense.flops else None,
        }


Costs = Mapping[str, Cost]  # by design


def _values(part_costs: Costs, work: PlanOptions) -> dict:
    return {design: cost.values(work, part_costs["dense"]) for design, cost in part_costs.items()}


def costs(model: Any, work: PlanOptions) -> dict:
    """Costs of a mixture, for JSON.

    Returns:
        ``config``; ``layers``: how many feed-forward layers are converted; ``parts``: groups of
        equal matrices and networks, with the costs of one of them by design and, of MPOs,
        ``lossless`` (no bond is truncated) and the ``strategy``; ``totals``: ``converted`` (all of
        them, with routers), ``rest`` (the same in all designs) and ``whole``. A cost has the fields
        of `Cost.values`.
    """
    groups: dict[str, dict] = {}
    every: list[Costs] = []
    flops = 0
    kept = {
        projection
        for network in kept_modules(model).values()
        for projection in network.projections().values()
    }
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)) and module not in kept and "pooler" not in name:
            flops += 2 * work.tokens * linear_weight(module).numel() * work.passes
        elif isinstance(module, MPOEmbedding) and model.mpoe_config.tied_head:
            flops += 2 * work.tokens * module.num_embeddings * module.embedding_dim * work.passes
        for values, part_costs in _parts(model, name, module, work):
            every.append(part_costs)
            if values:
                new = {**values, "count": 0, **_values(part_costs, work)}
                groups.setdefault(repr(values), new)["count"] += 1
    converted = {design: sum((part[design] for part in every), Cost()) for design in DESIGNS}
    others = Cost(model.num_parameters() - converted["mpoe"].parameters, flops)
    whole = {design: cost + others for design, cost in converted.items()}
    return {
        "config": model.config.mpoe,
        "layers": len(modules_of(model, RoutedFeedForward)),
        "parts": list(groups.values()),
        "totals": {
            "converted": _values(converted, work),
            "rest": others.values(work),
            "whole": _values(whole, work),
        },
    }


def _parts(
    model: Any, name: str, module: nn.Module, work: PlanOptions
) -> Iterator[tuple[dict | None, Costs]]:
    """What a module adds to the converted parts: facts about it (none of a router) and its costs by
    design."""
    if isinstance(module, TopKRouter):
        router = Cost(module.weight.numel(), 2 * work.tokens * module.weight.numel() * work.passes)
        yield None, {"mpoe": router, "switch": router, "dense": Cost()}
        return
    if not isinstance(module, (KeptFeedForward, MPOCores)):
        return
    experts = module.num_experts
    kind = short_name(name).rpartition(".")[2]
    top_k = model.mpoe_config.top_k if experts > 1 else 1
    if isinstance(module, KeptFeedForward):
        elements = sum(weight.numel() for weight in module.dense_parameters().values())
        shared = sum(weight.numel() for weight in module.shared_parameters().values())
        matrices = len(module.projections())
        forward = 2 * work.tokens * elements
        of_shared = 2 * work.tokens * shared
        added = round(forward * (module.relative_flops(top_k) - 1)) - of_shared
        if not work.inference:
            added = added * (4 * matrices - 1) // matrices
        parameters = elements + shared + module.own_parameters()
        mpoe = Cost(parameters, (forward + of_shared) * work.passes + added)
        sizes = (module.in_features, module.hidden_features)
        lossless = True
        kind = "network"
        strategies: tuple[str, str | None] = (module.shape, None)
    elif isinstance(model.get_submodule(name.rpartition(".")[0]), MPOEmbedding):
        dense_table = Cost(module.in_features * module.out_features)
        mpo_table = Cost(module.shape.parameters(experts))
        yield None, {"mpoe": mpo_table, "switch": dense_table, "dense": dense_table}
        return
    else:
        plan = plan_contraction(
            module.shape,
            experts,
            work.tokens,
            DTYPES[work.dtype],
            top_k=top_k,
            training=not work.inference,
        )
        mpoe = Cost(module.shape.parameters(experts), plan.flops, plan.temporary_bytes)
        sizes = (module.in_features, module.out_features)
        elements = module.in_features * module.out_features
        strategies = (plan.strategy, plan.backward_strategy)
        lossless = module.shape.is_full
    flops = 2 * work.tokens * elements * work.passes
    values = {
        "kind": kind,
        "in_features": sizes[0],
        "out_features": sizes[1],
        "lossless": lossless,
        "strategy": strategies[0],
        "backward_strategy": strategies[1],
    }
    switch = Cost(experts * elements, top_k * flops)
    yield values, {"mpoe": mpoe, "switch": switch, "dense": Cost(elements, flops)}


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


def table(values: Mapping) -> Table:
    """Every kind of part, all of them, and the whole model, in the three designs, with how to read
    it."""
    config = values["config"]
    totals = values["totals"]
    work = values["work"]
    shape = config["shape"] if isinstance(config["shape"], str) else "given"
    title = f"{config['num_experts']:,} experts, top-{config['router']['top_k']}, shape {shape}"
    state = [] if work["inference"] else ["state"]
    rows: list[list[str]] = []

    def cells(cost: Mapping) -> list[str]:
        temporary = cost["temporary_bytes"]
        x_dense = cost["x_dense"]
        return [
            count(cost["parameters"]),
            scaled(cost["weight_bytes"], "B"),
            *[scaled(cost["state_bytes"], "B") for _ in state],
            scaled(temporary, "B") if temporary else "-",
            scaled(cost["flops"]),
            "-" if x_dense is None else f"{x_dense:.2f}",
        ]

    def add(part: str, design_costs: Mapping, second: str = "") -> None:
        for design, first in zip(DESIGNS, (part, second, ""), strict=True):
            rows.append([first, DESIGNS[design], *cells(design_costs[design])])

    for part in values["parts"]:
        by = dict.fromkeys(filter(None, (part["strategy"], part["backward_strategy"])))
        sizes = f"  {part['in_features']}x{part['out_features']} by {' / '.join(by)}"
        add(part["kind"], part, sizes)
    add(f"{values['layers']} feed-forward layers", totals["converted"])
    rows.append(["rest of the model", "all", *cells(totals["rest"])])
    add("whole model", totals["whole"])
    header = ["part", "design", "parameters", "weights", *state, "temporary", "FLOP", "x dense"]
    return Table(header, rows, title, "\n".join(_notes(values)))


def _notes(values: Mapping) -> Iterator[str]:
    work = values["work"]
    totals = values["totals"]
    phase = "inference" if work["inference"] else "training"
    parameters = count(totals["whole"]["dense"]["parameters"])
    model = f"{values['name']} ({values['class']}, {parameters} parameters)"
    yield f"{model}, {phase}: {work['tokens']:,} tokens a step"
    yield (
        "MPOE: experts around shared matrices; Switch: as many dense experts; "
        "dense: the model as it is."
    )
    state = "state: with gradients and AdamW, float32 (16 bytes per parameter). "
    if work["inference"]:
        state = ""
    yield (
        f"weights: in {work['dtype']}. {state}temporary: rebuilt for one product, at most two "
        "experts' of one matrix. Activations are not counted."
    )
    yield (
        "FLOP: of one step's matrix products, routers included, attention scores not; x dense: "
        "over the dense row's. by: the order of the fewest FLOPs, forward / backward; a run times "
        "the best few of them once."
    )
    share = totals["converted"]["mpoe"]["parameters"] / totals["converted"]["switch"]["parameters"]
    if share >= SMALL:
        yield (
            "At this width these experts are not small: MPOE's feed-forward layers hold "
            f"{share:.0%} of Switch's parameters. Compare --shape separable, --shape neurons, and "
            "a lower --bond."
        )
    if not all(part["lossless"] for part in values["parts"]):
        yield (
            "truncated bonds lose most of a pretrained matrix (relative error .59 to .93 at bonds "
            "128 to 32): for training from scratch, not for converting."
        )
