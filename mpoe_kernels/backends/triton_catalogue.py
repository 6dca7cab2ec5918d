"""What is shipped, as problems: what the ops start on the sizes of a T5-base feed-forward layer and of its table.

Problems run on ``meta`` tensors while launches are recorded, so neither a GPU nor memory is needed. A kernel that some
op starts on these sizes is found by itself; one that starts on others only needs a problem of its own in `problems`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mpoe_kernels.embedding import triton as embedding
from mpoe_kernels.hidden_experts.triton import launch as hidden
from mpoe_kernels.hidden_experts.triton.tiles import Tile, rows_per_token
from mpoe_kernels.linear.call import BackwardCall, ForwardCall
from mpoe_kernels.linear.triton import kernels as linear
from mpoe_kernels.linear.triton.configs import most_tiles
from mpoe_kernels.linear.triton.cost import MOST_EXPERTS, ON_CHIP, ON_CHIP_FROM_HALF
from mpoe_kernels.linear.triton.fused_cost import fused_reasons, half_fits
from mpoe_kernels.linear.triton.fused_tiles import MOST_BOND, Cut, Sides, rebuild_work
from mpoe_kernels.mpo.shape import MPOShape
from mpoe_kernels.planner import BlockDims, contractions
from mpoe_kernels.planner.program import PHASES
from mpoe_kernels.routing import triton as routing
from mpoe_kernels.triton.start import Launch, recorded, target_of

MODEL, HIDDEN, VOCABULARY = 768, 3072, 32128
EXPERTS = (8, 64)
ON_CHIP_NAMES = (ON_CHIP, ON_CHIP_FROM_HALF)
TOKENS = (4096, 64, 8)  # training, a small batch, decoding
FEW_SHAPES = ("paper 64", "separable")  # on which every kernel of the products is started
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Problem:
    """Something that the ops compute.

    Attributes:
        name: in words.
        run: starts its kernels on ``meta`` tensors.
        every_tile: whether all shipped tiles are to be tried on it, not only those that suit it.
    """

    name: str
    run: Callable[[], object]
    every_tile: bool = False


def shapes() -> dict[str, tuple[MPOShape, MPOShape]]:
    """Shapes of the up and the down projection by name."""
    found = {"separable": (up := MPOShape.separable(MODEL, HIDDEN), up.mirrored())}
    for bond in (16, 32, 64, 128, None):
        pair = (MPOShape.paper(*sizes, max_bond=bond) for sizes in ((MODEL, HIDDEN), (HIDDEN, MODEL)))
        found[f"paper {bond or 'full'}"] = (next(pair), next(pair))
    found["light 64"] = (MPOShape.light(MODEL, HIDDEN, 64), MPOShape.light(HIDDEN, MODEL, 64))
    return found


def dims_of(shape: MPOShape) -> BlockDims:
    """Sizes of a shape's folded blocks."""
    return BlockDims.of_shape(shape)


def _empty(*size: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def _integers(*size: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return _empty(*size, dtype=dtype)


def _blocks(dims: BlockDims, experts: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return (
        _empty(experts, dims.iL, dims.jL, dims.a, dtype=dtype),
        _empty(dims.a, dims.iC, dims.jC, dims.b, dtype=dtype),
        _empty(experts, dims.b, dims.iR, dims.jR, dtype=dtype),
    )


def strategies(dims: BlockDims, experts: int, tokens: int, dtype: torch.dtype, phase: str) -> list[str]:
    """Names of the candidates: what the planner may choose, and the fused kernels."""
    found = [plan.strategy for plan in contractions(dims, experts, tokens, dtype, phase)]
    if max(dims.a, dims.b) > MOST_BOND or dims.is_separable:
        return found
    return [*found, ON_CHIP, *([ON_CHIP_FROM_HALF] if half_fits(dims, experts) else [])]


def _common(
    dims: BlockDims, experts: int, tokens: int, dtype: torch.dtype, candidate: str, activation: str, indexed: bool
) -> dict[str, Any]:
    """What forward and backward calls have in common."""
    left, central, right = _blocks(dims, experts, dtype)
    return {
        "x": _empty(tokens, dims.in_features, dtype=dtype),
        "left": left,
        "central": central,
        "right": right,
        "expert_offsets": _integers(experts + 1, dtype=torch.int32),
        "bias": _empty(dims.out_features, dtype=dtype) if activation != "none" else None,
        "row_index": _integers(tokens) if indexed else None,
        "slot_of_token": _integers(tokens, 1) if indexed else None,
        "in_features": dims.in_features,
        "out_features": dims.out_features,
        "activation": activation,
        "strategy": "rebuild" if candidate in ON_CHIP_NAMES else candidate,
        "backend": "triton",
    }


def _on_chip(dims: BlockDims, dtype: torch.dtype, candidate: str) -> bool:
    """Whether the candidate keeps weights on chip, and the device can; by steps otherwise."""
    return candidate in ON_CHIP_NAMES and not fused_reasons(dims, dtype, target_of(torch.device("meta")))


def forward_work(
    dims: BlockDims,
    experts: int,
    tokens: int,
    dtype: torch.dtype,
    strategy: str,
    activation: str = "none",
    indexed: bool = True,
) -> Callable[[], object]:
    """Computes the grouped product of ``tokens`` rows, gathered if ``indexed``, as a layer that trains calls it."""
    call = ForwardCall(**_common(dims, experts, tokens, dtype, strategy, activation, indexed), save=True)
    if _on_chip(dims, dtype, strategy):
        return partial(linear.forward_on_chip, call, half=strategy == ON_CHIP_FROM_HALF)
    return partial(linear.forward_by_steps, call)


def backward_work(
    dims: BlockDims,
    experts: int,
    tokens: int,
    dtype: torch.dtype,
    strategy: str,
    activation: str = "none",
    mask_central: bool = False,
    indexed: bool = True,
) -> Callable[[], object]:
    """Computes its gradients."""
    common = _common(dims, experts, tokens, dtype, strategy, activation, indexed)
    grad, saved = (_empty(tokens, dims.out_features, dtype=dtype) for _ in range(2))
    h = _empty(tokens * dims.jC if strategy == "separable" else 0, dims.b, dtype=dtype)
    need = [True, True, not mask_central, True, activation != "none"]
    call = BackwardCall(**common, grad=grad, h=h, saved=saved, need=need)
    if _on_chip(dims, dtype, strategy):
        return partial(linear.backward_on_chip, call, half=strategy == ON_CHIP_FROM_HALF)
    return partial(linear.backward_by_steps, call)


WORK: dict[str, Callable[..., Callable[[], object]]] = {"forward": forward_work, "backward": backward_work}


def run(phase: str, *problem: Any, **options: Any) -> None:
    """Do the work of a phase."""
    WORK[phase](*problem, **options)()


def _linear(dtype: torch.dtype, few: bool) -> Iterator[Problem]:
    """Every strategy that the planner may choose, up (with ReLU and bias) and down (without)."""
    for name, pair in shapes().items():
        if few and name not in FEW_SHAPES:
            continue
        for direction, activation, shape in zip(("up", "down"), ("relu", "none"), pair, strict=True):
            dims = dims_of(shape)
            for experts, tokens in ((e, t) for e in EXPERTS[: 1 if few else None] for t in TOKENS):
                label = f"{name} {direction} E={experts} T={tokens}"
                sizes = (dims, experts, tokens, dtype)
                for phase in PHASES:
                    for strategy in strategies(*sizes, phase):
                        work = partial(run, phase, *sizes, strategy, activation)
                        every_tile = not few and (experts, tokens) == (EXPERTS[0], TOKENS[0])
                        yield Problem(f"{label} {phase} {strategy}", work, every_tile)


def _activations(dtype: torch.dtype, few: bool) -> Iterator[Problem]:
    """The other activations, and a masked central gradient, on one shape each."""
    for name in () if few else ("separable", "paper 32"):
        dims = dims_of(shapes()[name][0])
        strategy = "separable" if dims.is_separable else ON_CHIP
        sizes = (dims, EXPERTS[0], TOKENS[0], dtype, strategy)
        for activation in ("gelu", "gelu_tanh", "silu"):
            yield Problem(f"{name} {activation} forward", partial(run, "forward", *sizes, activation))
            yield Problem(f"{name} {activation} backward", partial(run, "backward", *sizes, activation))
        yield Problem(f"{name} masked backward", partial(run, "backward", *sizes, "relu", True))


def _routing(dtype: torch.dtype, few: bool) -> Iterator[Problem]:
    loads = EXPERTS[:1] if few else EXPERTS
    for experts, tokens, top_k in ((e, t, k) for e in (*loads, MOST_EXPERTS) for t in TOKENS for k in (1, 2)):
        label, slots = f"routing E={experts} T={tokens} K={top_k}", tokens * top_k
        index, offsets = _integers(tokens, top_k), _integers(experts + 1, dtype=torch.int32)
        token_of_slot, slot_of_token = _integers(slots), _integers(tokens, top_k)
        mask = _empty(tokens, dtype=torch.bool)
        rows, gates = _empty(tokens, MODEL, dtype=dtype), _empty(tokens, top_k, dtype=torch.float32)
        sorted_rows = _empty(slots, MODEL, dtype=dtype)
        for capacity, token_mask in ((None, None), (slots // experts + 1, mask)):
            yield Problem(f"{label} route", partial(routing.route_forward, index, experts, capacity, token_mask))
        where = (offsets, token_of_slot, slot_of_token)
        yield Problem(f"{label} dispatch", partial(routing.dispatch_forward, rows, *where))
        yield Problem(f"{label} dispatch backward", partial(routing.dispatch_backward, sorted_rows, slot_of_token))
        yield Problem(f"{label} combine", partial(routing.combine_forward, sorted_rows, *where, gates))
        work = partial(routing.combine_backward, rows, sorted_rows, token_of_slot, slot_of_token, gates, True, True)
        yield Problem(f"{label} combine backward", work)


def _embedding(dtype: torch.dtype, few: bool) -> Iterator[Problem]:
    """A few rows are gathered, many are read from a rebuilt table."""
    shape = MPOShape.paper(VOCABULARY, MODEL, max_bond=64)
    blocks = _blocks(dims_of(shape), 1, dtype)
    for ids in (_integers(TOKENS[-1]), _integers(TOKENS[0])):
        tokens, sizes = ids.shape[0], (VOCABULARY, MODEL)
        yield Problem(f"embedding T={tokens}", partial(embedding.embedding_forward, ids, *blocks, *sizes), not few)
        work = partial(embedding.embedding_backward, _empty(tokens, MODEL, dtype=dtype), ids, *blocks, *sizes)
        yield Problem(f"embedding T={tokens} backward", work, not few)


class HiddenSize(NamedTuple):
    """Experts on the hidden side: how many, of how many each token takes, and whether groups own their blocks."""

    experts: int
    top_k: int
    per_group: bool
    block: int = 64


HIDDEN_SIZES = (HiddenSize(8, 2, True), HiddenSize(64, 2, False), HiddenSize(8, 4, True, 128), HiddenSize(64, 8, True))


def hidden_inputs(size: HiddenSize, tokens: int, dtype: torch.dtype, gated: bool) -> dict[str, Any]:
    """Arguments of `hidden_experts` by name, with biases."""
    blocks = (size.experts, HIDDEN // size.block if size.per_group else 1, size.block, size.block)
    return {
        "u": _empty(tokens, HIDDEN, dtype=dtype),
        "gates": _empty(tokens, size.top_k, dtype=torch.float32),
        "top_k_index": _integers(tokens, size.top_k),
        "right": _empty(*blocks, dtype=dtype),
        "left": _empty(*blocks, dtype=dtype),
        "bias": _empty(size.experts, HIDDEN, dtype=dtype),
        "u_gate": _empty(tokens, HIDDEN, dtype=dtype) if gated else None,
        "right_gate": _empty(*blocks, dtype=dtype) if gated else None,
    }


def run_hidden(size: HiddenSize, tokens: int, dtype: torch.dtype, gated: bool, activation: str, phase: str) -> None:
    """`hidden_experts` between the products of the layer, or all its gradients."""
    inputs = hidden_inputs(size, tokens, dtype, gated)
    if phase == "forward":
        hidden.forward(**inputs, activation=activation)
    else:
        need = [name != "top_k_index" for name in inputs if name != "top_k_index"]
        hidden.backward(_empty(tokens, HIDDEN, dtype=dtype), **inputs, activation=activation, need=need)


def _hidden(dtype: torch.dtype, few: bool) -> Iterator[Problem]:
    """Gated and not, on every tile."""
    for size in HIDDEN_SIZES[: 2 if few else None]:
        for gated, activation in ((False, "gelu"), (True, "silu")):
            for phase in PHASES:
                label = f"hidden {size.block} E={size.experts} {'gated ' if gated else ''}{phase}"
                for tokens in TOKENS:
                    work = partial(run_hidden, size, tokens, dtype, gated, activation, phase)
                    yield Problem(f"{label} T={tokens}", work, not few and tokens == TOKENS[0])


def problems(dtype: torch.dtype, few: bool = False) -> Iterator[Problem]:
    """Everything that is shipped, in one dtype; ``few``: enough of it to start every kernel."""
    for family in (_linear, _activations, _routing, _embedding, _hidden):
        yield from family(dtype, few)


def _padded(arguments: Mapping[str, Any], **tiles: str) -> float:
    """FLOPs of whole tiles over those of the product: ``size="tile"`` names a dimension and its block size."""
    sizes = [(arguments[size], arguments[tile]) for size, tile in tiles.items()]
    return math.prod(-(-size // tile) * tile / size for size, tile in sizes)


def _fused(arguments: Mapping[str, Any]) -> float:
    """Whole tiles of W, and what making them adds to multiplying with them."""
    sides = Sides(arguments["K_SIZES"], arguments["N_SIZES"], arguments["A"], arguments["B"])
    cut = Cut(*(arguments[name] for name in ("KL", "NL", "KR", "NR")))
    tiles = math.prod(cut.tiles(sides)) * cut.k * cut.n / math.prod(sides.k + sides.n)
    return tiles * (1 + rebuild_work(sides, cut, arguments["BUILT"]) / arguments["BM"])


def _hidden_rows(arguments: Mapping[str, Any]) -> float:
    """Rows of whole tiles, whole units of blocks, and, for every part of a block's results, what comes before them."""
    tile = Tile(*(arguments[name] for name in ("BT", "BM", "BN", "BK", "num_warps")))
    experts, top_k, products = arguments["EXPERTS"], arguments["TOP_K"], _hidden_products(arguments)
    parts, results = -(-arguments["B"] // tile.units), 2 if "grad" in arguments and arguments["GATED"] else 1
    again = (results + parts * (products - results)) / products
    units = (parts * tile.units / arguments["B"]) ** 2
    return rows_per_token(tile, experts, top_k) / top_k * units * again


# FLOPs of a launch over those of the product it computes: what fills tiles, and what is built anew for every tile. The
# last rows of every expert come on top: half a tile each, on average.
FLOP_OVERHEAD: dict[str, Callable[[Mapping[str, Any]], float]] = {
    "rows_kernel": partial(_padded, K="BK", N="BN"),
    "outer_kernel": partial(_padded, M="BM", N="BN"),
    "blocks_kernel": partial(_padded, M="BM", N="BN", K="BK"),
    "weights_kernel": partial(_padded, M="BM"),
    "fused_kernel": _fused,
    "hidden_forward_kernel": _hidden_rows,
    "hidden_rows_kernel": _hidden_rows,
}


class Product(NamedTuple):
    """GEMMs of one size that a launch computes: ``[m, k] x [k, n]``, one for each of ``batch`` experts (1: for all)."""

    m: float
    n: int
    k: float
    batch: int


def _rows_product(a: Mapping[str, Any], rows: float) -> Product:
    grouped = a["GROUPED"]
    return Product((rows if grouped else a["slots"]) * a["M"], a["N"], a["K"], a["EXPERTS"] if grouped else 1)


def _outer_product(a: Mapping[str, Any], rows: float) -> Product:
    grouped = a["GROUPED"]
    return Product(a["M"], a["N"], (rows if grouped else a["g"].shape[0]) * a["S"], a["EXPERTS"] if grouped else 1)


def _blocks_product(a: Mapping[str, Any], _: float) -> Product:
    return Product(a["M"], a["N"], a["K"], a["experts"])


def _weights_product(a: Mapping[str, Any], _: float) -> Product:
    """The half, as if it were as wide as the weight, and the weight."""
    return Product(a["M"] * a["CELLS"], a["N"], a["S"] * (1 + a["K"] / a["N"]), a["offsets"].shape[0] - 1)


def _fused_product(a: Mapping[str, Any], rows: float) -> Product:
    return Product(rows, math.prod(a["N_SIZES"]), math.prod(a["K_SIZES"]), a["EXPERTS"])


def _gradient_product(a: Mapping[str, Any], rows: float) -> Product:
    return Product(math.prod(a["K_SIZES"]), math.prod(a["N_SIZES"]), rows, a["offsets"].shape[0] - 1)


def _hidden_products(a: Mapping[str, Any]) -> int:
    return hidden.PRODUCTS["rows" if "grad" in a else "forward", a["GATED"]]


def _hidden_product(a: Mapping[str, Any], _: float) -> Product:
    """Rows of chosen experts times the blocks of every group, those of one row after the other."""
    rows = a["index"].numel() * a["F"] // a["B"]
    return Product(rows, a["B"], a["B"] * _hidden_products(a), 1)


def _hidden_blocks_product(a: Mapping[str, Any], _: float) -> Product:
    """Slots through blocks and back, as in the rows' gradients, and their products with one another."""
    gradients = 3 if a["GATED"] else 2
    through = hidden.PRODUCTS["forward", a["GATED"]]
    return Product(a["B"], a["B"] * (gradients + through), a["pair_of_slot"].numel() * a["F"] // a["B"], 1)


# What a launch computes, from its arguments and the rows of one expert; kernels that are not here multiply nothing.
PRODUCTS: dict[str, Callable[[Mapping[str, Any], float], Product]] = {
    "rows_kernel": _rows_product,
    "outer_kernel": _outer_product,
    "blocks_kernel": _blocks_product,
    "weights_kernel": _weights_product,
    "fused_kernel": _fused_product,
    "left_gradient_kernel": _gradient_product,
    "right_gradient_kernel": _gradient_product,
    "hidden_forward_kernel": _hidden_product,
    "hidden_rows_kernel": _hidden_product,
    "hidden_blocks_kernel": _hidden_blocks_product,
}


def launches(problem: Problem, architecture: str) -> list[Launch]:
    """What a problem starts on an architecture: with the tiles that suit it, and with every other in turn if asked."""
    found: list[Launch] = []
    for entry in (None, *(range(most_tiles(architecture)) if problem.every_tile else ())):
        with recorded(architecture, entry) as started:
            problem.run()
        found += started
    return found
