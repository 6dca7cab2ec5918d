"""Calls that between them launch every Triton kernel in every configuration that ships, and what a
call launches.

Calls are made on tensors without memory while launches are recorded, so neither a GPU nor memory is
needed. A kernel that is launched only at other sizes needs its own call in `problems`.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import product
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from mpoe_kernels import (
    MPOBlocks,
    MPOShape,
    Routing,
    backends,
    combine,
    dispatch,
    grouped_mpo_linear,
    hidden_experts,
    neuron_experts,
    route,
)
from mpoe_kernels.contract import BlockDims, autotune, contractions
from mpoe_kernels.linear import triton as linear_triton
from mpoe_kernels.linear.ffn import placed_mpo_linear
from mpoe_kernels.linear.triton import MOST_EXPERTS
from mpoe_kernels.routing import triton_gates as gates_of_router
from mpoe_kernels.testing.launches import Launch, recorded

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
TOKENS = (4096, 64, 8)  # training, a small batch, decoding
FEW_TOKENS = (4096, 8)
TILES = 4  # length of the longest table of tiles
ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu")


class Library(NamedTuple):
    """An operation of PyTorch: name, FLOPs of products, bytes of its tensors."""

    name: str
    flops: float
    bytes: int


def bytes_of(values: Iterable[Any]) -> int:
    """Of all different tensors among the values; views of one tensor count as their largest."""
    return sum(_storages(values).values())


def _storages(values: Iterable[Any]) -> dict[int, int]:
    """The memory of all tensors among the values, and how many bytes of it are used."""
    sizes = {}
    for value in values:
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            key = storage._cdata
            used = min(value.nbytes, storage.nbytes())
            sizes[key] = max(sizes.get(key, 0), used)
    return sizes


class Recorder(TorchDispatchMode):
    """Appends PyTorch's operations to ``log``, as `recorded` does Triton's launches, unless
    ``only_ours``."""

    def __init__(self, log: list[Any], only_ours: bool = False) -> None:
        super().__init__()
        self.log = log
        self.only_ours = only_ours

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "mpoe":
            with nullcontext() if self.only_ours else self:
                return OPDEFS[f"mpoe::{func._opname}"]._init_fn(*args, **kwargs)
        if self.only_ours:
            return func(*args, **kwargs)
        with self:
            result = func.decompose(*args, **kwargs)  # what is several operations
        if result is not NotImplemented:
            return result
        result = func(*args, **kwargs)
        inputs = tree_leaves((args, kwargs))
        outputs = tree_leaves(result)
        is_new = _storages(outputs).keys() - _storages(inputs).keys()
        if "empty" not in str(func) and (is_new or func._schema.is_mutable):
            count = flop_registry.get(func.overloadpacket, lambda *_, **__: 0)
            flops = count(*args, **kwargs, out_val=result)
            name = func._schema.name.removeprefix("aten::")
            self.log.append(Library(name, flops, bytes_of(inputs + outputs)))
        return result


@contextmanager
def as_on_gpu(
    architecture: str, tile: int | None = None, only_ours: bool = False
) -> Iterator[list[Any]]:
    """Calls of our ops on tensors without memory are made as on a GPU; gives the log of what they
    launch.

    Args:
        architecture: one of `mpoe_kernels.triton.architecture.ARCHITECTURES`.
        tile, only_ours: see `recorded`, `Recorder`.
    """
    autotune.forget()
    backends._selected.cache_clear()
    with (
        patch.object(torch, "is_autocast_enabled", lambda *_: False),
        patch.object(backends.Backend, "unsupported_reasons", lambda *_: []),
        patch.dict(backends.PREFERRED, meta=("triton",)),
        patch.dict(os.environ, {autotune.SETTING: "0"}),  # the first of the ranking
        recorded(architecture, tile) as log,
        Recorder(log, only_ours),
    ):
        yield log


class Sizes(NamedTuple):
    """Widths of a feed-forward layer, numbers of experts, the first of which is used where one is
    enough, and whether all shipped tiles are tried."""

    model: int
    hidden: int
    experts: tuple[int, ...]
    every_tile: bool = False


T5_BASE = Sizes(768, 3072, (8, 64), every_tile=True)
LARGE_SIZES = (
    Sizes(4096, 14336, (8, 64)),
    Sizes(768, 3072, (1024,)),
)


class Problem(NamedTuple):
    """Calls of the ops: a description, what makes them, and whether to try all shipped tiles on
    them."""

    name: str
    run: Callable[[], object]
    every_tile: bool = False

    def launches(self, architecture: str) -> list[Launch]:
        """With the suitable tiles, and with all others in turn if requested."""
        launches = []
        tiles = [None]
        if self.every_tile:
            tiles += range(TILES)
        for tile in tiles:
            with as_on_gpu(architecture, tile=tile, only_ours=True) as log:
                self.run()
            launches += log
        return launches


def _leaf(*size: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.empty(size, dtype=dtype, device="meta", requires_grad=dtype.is_floating_point)


def _called(op: Callable[..., Tensor], *arguments: Any, **options: Any) -> None:
    """Without gradients, and with all of them."""
    with torch.no_grad():
        op(*arguments, backend="triton", **options)
    y = op(*arguments, backend="triton", **options)
    y.backward(torch.empty_like(y))


def shapes(sizes: Sizes = T5_BASE) -> dict[str, tuple[MPOShape, MPOShape]]:
    """Those of the up and the down projection by name."""
    up = (sizes.model, sizes.hidden)
    down = (sizes.hidden, sizes.model)
    separable = MPOShape.separable(*up)
    pairs = {"separable": (separable, separable.mirrored())}
    makers = {"light 64": partial(MPOShape.light, p=64)}
    for bond in (16, 32, 64, 128, None):
        makers[f"paper {bond or 'full'}"] = partial(MPOShape.paper, max_bond=bond)
    for name, make in makers.items():
        pairs[name] = (make(*up), make(*down))
    return pairs


def run_linear(
    shape: MPOShape,
    experts: int,
    tokens: int,
    dtype: torch.dtype,
    strategy: str,
    activation: str | None = None,
    masked: bool = False,
    on_chip: bool = True,
    biased: bool = True,
) -> None:
    """The grouped product of gathered rows, and of rows that are scattered to their tokens.

    Args:
        shape, experts, tokens, dtype: the problem.
        strategy: one of the planner's.
        activation, biased: with the former there is a bias, unless it is said otherwise.
        masked: the central block has no gradient.
        on_chip: weights that fit stay on chip.
    """
    d = BlockDims.of_shape(shape)
    left = _leaf(experts, d.iL, d.jL, d.a, dtype=dtype)
    central = _leaf(d.a, d.iC, d.jC, d.b, dtype=dtype)
    right = _leaf(experts, d.b, d.iR, d.jR, dtype=dtype)
    central.requires_grad_(not masked)
    blocks = MPOBlocks(left, central, right, shape.in_features, shape.out_features)
    bias = None
    if activation is not None and biased:
        bias = _leaf(shape.out_features, dtype=dtype)
    offsets = _leaf(experts + 1, dtype=torch.int32)
    where = Routing(offsets, _leaf(tokens), _leaf(tokens, 1))
    rows = _leaf(tokens, shape.in_features, dtype=dtype)
    gates = _leaf(tokens, 1, dtype=torch.float32)
    options = {"strategy": strategy, "activation": activation, "row_index": where.token_of_slot}
    off_chip = patch.object(linear_triton, "fused_reasons", lambda *_: ["not on chip"])
    with nullcontext() if on_chip else off_chip:
        _called(grouped_mpo_linear, rows, blocks, offsets, bias, **options)
        with torch.no_grad():
            placed_mpo_linear(rows, blocks, offsets, None, where, gates, "triton", strategy)


def _linear(dtype: torch.dtype, few: bool, sizes: Sizes) -> Iterator[Problem]:
    """Every strategy that may be chosen, up (with ReLU and bias) and down (without); some with what
    is rarer."""
    counts = FEW_TOKENS if few else TOKENS
    functions = ACTIVATIONS[:1] if few else ACTIVATIONS
    for (name, pair), experts, tokens in product(shapes(sizes).items(), sizes.experts, counts):
        if few and name not in ("paper 64", "separable"):
            continue
        first = not few and (experts, tokens) == (sizes.experts[0], TOKENS[0])
        every_tile = first and sizes.every_tile
        up = [{"activation": "relu"}]
        down = [{}]
        if name in ("paper 64", "separable"):
            down.append({"masked": True})
        if name == "separable":
            up += [{"activation": function, "biased": False} for function in functions]
        if name in ("paper 32", "separable") and first:
            up += [{"activation": function} for function in ACTIVATIONS[1:]]
        for shape, options in zip(pair, (up, down), strict=True):
            given = (experts, tokens, dtype)
            for plan in contractions(BlockDims.of_shape(shape), *given, "forward"):
                label = f"{name} {plan.strategy} E={experts} T={tokens}"
                work = partial(run_linear, shape, *given, plan.strategy)
                for option in options:
                    yield Problem(f"{label} {option}", partial(work, **option), every_tile)
                if plan.strategy == "rebuild":
                    off = partial(work, **options[0], on_chip=False)
                    yield Problem(f"{label} not on chip", off, every_tile)


def run_routing(
    experts: int, tokens: int, top_k: int, width: int, dtype: torch.dtype, limited: bool
) -> None:
    """A router's gates, the sort, and the rows there and back; ``limited``: with a capacity and
    masked tokens."""
    x = _leaf(tokens, width, dtype=dtype)
    weight = _leaf(experts, width, dtype=torch.float32)
    in_parts = dtype == torch.bfloat16
    for raw in (False, True):
        for of_router in (weight, weight.to(dtype)):
            logits = gates_of_router.router_logits(x, of_router)
            decided = gates_of_router.gate(logits, top_k, raw, 1.0)
        weights = decided.top_k_weights
        for dlogits in (None, decided.logits):
            gates_of_router.gate_backward(decided, dlogits, weights, raw, 1.0, in_parts=in_parts)
    capacity = None
    mask = None
    if limited:
        capacity = tokens * top_k // experts + 1
        mask = _leaf(tokens, dtype=torch.bool)
    where = route(_leaf(tokens, top_k), experts, capacity, mask, backend="triton")
    _called(dispatch, _leaf(tokens, width, dtype=dtype), where)
    rows = _leaf(tokens * top_k, width, dtype=dtype)
    _called(combine, rows, where, _leaf(tokens, top_k, dtype=torch.float32))


def _routing(dtype: torch.dtype, few: bool, sizes: Sizes) -> Iterator[Problem]:
    """Of pairs that one launch sorts, and of more."""
    pairs = [(4096, 1), *product(TOKENS, (2, 8))]
    loads = (*sizes.experts, MOST_EXPERTS)
    for experts, (tokens, top_k), limited in product(loads, pairs, (False, True)):
        work = partial(run_routing, experts, tokens, top_k, sizes.model, dtype, limited)
        yield Problem(f"routing E={experts} T={tokens} K={top_k} limited={limited}", work)


# Experts, those of a token, whether groups of hidden units own blocks, and a block's side.
HIDDEN_SIZES = (
    (8, 2, True, 64),
    (64, 2, False, 64),
    (8, 4, True, 128),
    (64, 8, True, 64),
)
# Experts, those of a token, and the neurons of each.
NEURON_SIZES = (
    (8, 2, 64),
    (8, 2, 512),
    (64, 8, 128),
    (64, 16, 8),
)


def run_hidden(
    units: int,
    tokens: int,
    dtype: torch.dtype,
    gated: bool,
    experts: int,
    top_k: int,
    per_group: bool,
    block: int,
) -> None:
    """`hidden_experts` between the products of the layer, with biases."""
    groups = units // block if per_group else 1
    right, left, right_gate = (_leaf(experts, groups, block, block, dtype=dtype) for _ in range(3))
    u = _leaf(tokens, units, dtype=dtype)
    gates = _leaf(tokens, top_k, dtype=torch.float32)
    bias = _leaf(experts, units, dtype=dtype)
    more = {"activation": "gelu"}
    if gated:
        u_gate = _leaf(tokens, units, dtype=dtype)
        more = {"activation": "silu", "u_gate": u_gate, "right_gate": right_gate}
    _called(hidden_experts, u, gates, _leaf(tokens, top_k), right, left, bias, **more)


def run_neurons(
    width: int, tokens: int, dtype: torch.dtype, gated: bool, experts: int, top_k: int, neurons: int
) -> None:
    """`neuron_experts` beside a layer of that width, with biases."""
    up, down, gate_up = (_leaf(experts, neurons, width, dtype=dtype) for _ in range(3))
    x = _leaf(tokens, width, dtype=dtype)
    gates = _leaf(tokens, top_k, dtype=torch.float32)
    bias = _leaf(experts, neurons, dtype=dtype)
    more = {"activation": "gelu"}
    if gated:
        more = {"activation": "silu", "gate_up": gate_up}
    _called(neuron_experts, x, gates, _leaf(tokens, top_k), up, down, bias, **more)


def _experts(
    run: Callable[..., None],
    kinds: Sequence[tuple[int, ...]],
    dtype: torch.dtype,
    few: bool,
    sizes: Sizes,
) -> Iterator[Problem]:
    """Of these kinds, gated and not, on every tile."""
    width = sizes.hidden if run is run_hidden else sizes.model
    counts = TOKENS
    if few:
        kinds = kinds[:2]
        counts = FEW_TOKENS
    if not sizes.every_tile:
        kinds = [(experts, *kind[1:]) for experts in sizes.experts for kind in kinds]
    for kind, gated, tokens in product(kinds, (False, True), counts):
        label = f"{run.__name__} {kind} gated={gated} T={tokens}"
        work = partial(run, width, tokens, dtype, gated, *kind)
        every_tile = sizes.every_tile and not few and tokens == TOKENS[0]
        yield Problem(label, work, every_tile)


FAMILIES = {
    "linear": _linear,
    "routing": _routing,
    "hidden": partial(_experts, run_hidden, HIDDEN_SIZES),
    "neurons": partial(_experts, run_neurons, NEURON_SIZES),
}


def problems(dtype: torch.dtype, few: bool = False, sizes: Sizes = T5_BASE) -> Iterator[Problem]:
    """All shipped problems in one dtype; ``few``: enough of them to launch every kernel."""
    if few:
        sizes = sizes._replace(experts=sizes.experts[:1])
    for family in FAMILIES.values():
        yield from family(dtype, few, sizes)
