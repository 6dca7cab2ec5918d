"""The shipped kernels, as problems: the launches of the ops at the sizes of a T5-base feed-forward layer and embedding.

`LARGE_SIZES` are for wider layers and more experts, see `Sizes`.

Problems run on ``meta`` tensors while launches are recorded, so neither a GPU nor memory is needed. Kernels that an op
launches at these sizes are found automatically; one that is launched only at other sizes needs its own problem in
`problems`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mpoe_kernels.embedding import triton as embedding
from mpoe_kernels.embedding.call import EmbeddingBackwardCall, EmbeddingCall
from mpoe_kernels.hidden_experts.call import HiddenBackwardCall, HiddenCall
from mpoe_kernels.hidden_experts.triton import launch as hidden
from mpoe_kernels.linear.call import BackwardCall, ForwardCall, GatedCall
from mpoe_kernels.linear.triton import kernels as linear
from mpoe_kernels.linear.triton.configs import most_tiles
from mpoe_kernels.linear.triton.cost import MOST_EXPERTS, ON_CHIP, ON_CHIP_FROM_HALF, WIDE, WIDE_ARCHITECTURES
from mpoe_kernels.linear.triton.fused_cost import fused_reasons, half_fits
from mpoe_kernels.linear.triton.fused_tiles import MOST_BOND
from mpoe_kernels.linear.triton.gated import forward as gated_forward
from mpoe_kernels.mpo.shape import MPOShape
from mpoe_kernels.planner import BlockDims, contractions
from mpoe_kernels.planner.program import PHASES
from mpoe_kernels.routing import triton as routing
from mpoe_kernels.routing.call import CombineBackwardCall, CombineCall, DispatchBackwardCall, DispatchCall, RouteCall
from mpoe_kernels.triton.start import Launch, recorded, target_of


class Sizes(NamedTuple):
    """Sizes of a model.

    Attributes:
        name: description; empty for T5-base, on which every shipped tile is tried.
        model, hidden: widths of a feed-forward layer.
        vocabulary: rows of the embedding.
        experts: numbers of experts; the first one is used where one is enough.
    """

    name: str
    model: int
    hidden: int
    vocabulary: int
    experts: tuple[int, ...]


T5_BASE = Sizes("", 768, 3072, 32128, (8, 64))
WIDE_LAYER = Sizes("d = 4,096", 4096, 14336, 128256, (8, 64))
MANY_EXPERTS = T5_BASE._replace(name="E = 1,024", experts=(1024,))
LARGE_SIZES = (WIDE_LAYER, MANY_EXPERTS)
_, MODEL, HIDDEN, VOCABULARY, EXPERTS = T5_BASE
ON_CHIP_NAMES = (ON_CHIP, ON_CHIP_FROM_HALF)
TOKENS = (4096, 64, 8)  # training, a small batch, decoding
FEW_SHAPES = ("paper 64", "separable")  # on which every kernel of the products is started
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Problem:
    """A computation of the ops.

    Attributes:
        name: description.
        run: launches its kernels on ``meta`` tensors.
        every_tile: whether to try all shipped tiles on it, not only the suitable ones.
    """

    name: str
    run: Callable[[], object]
    every_tile: bool = False


def shapes(sizes: Sizes = T5_BASE) -> dict[str, tuple[MPOShape, MPOShape]]:
    """Shapes of the up and the down projection by name."""
    model, hidden = sizes.model, sizes.hidden
    found = {"separable": (up := MPOShape.separable(model, hidden), up.mirrored())}
    for bond in (16, 32, 64, 128, None):
        pair = (MPOShape.paper(*widths, max_bond=bond) for widths in ((model, hidden), (hidden, model)))
        found[f"paper {bond or 'full'}"] = (next(pair), next(pair))
    found["light 64"] = (MPOShape.light(model, hidden, 64), MPOShape.light(hidden, model, 64))
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
    """Names of the candidates: the planner's strategies and the fused kernels."""
    found = [plan.strategy for plan in contractions(dims, experts, tokens, dtype, phase)]
    if dtype.itemsize == 2:
        found.append(WIDE)
    if max(dims.a, dims.b) > MOST_BOND or dims.is_separable:
        return found
    return [*found, ON_CHIP, *([ON_CHIP_FROM_HALF] if half_fits(dims, experts) else [])]


def _common(
    dims: BlockDims, experts: int, tokens: int, dtype: torch.dtype, candidate: str, activation: str, indexed: bool
) -> dict[str, Any]:
    """The common arguments of forward and backward calls."""
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
        "strategy": "rebuild" if candidate in (WIDE, *ON_CHIP_NAMES) else candidate,
        "backend": "triton",
    }


def _on_chip(dims: BlockDims, dtype: torch.dtype, candidate: str) -> bool:
    """Whether the candidate keeps weights on chip and the device supports it; otherwise it runs step by step."""
    return candidate in ON_CHIP_NAMES and not fused_reasons(dims, dtype, target_of(torch.device("meta")))


def _wide(candidate: str) -> bool:
    """Whether the candidate uses wide tiles and the device supports them."""
    return candidate == WIDE and target_of(torch.device("meta")).architecture in WIDE_ARCHITECTURES


def forward_work(
    dims: BlockDims,
    experts: int,
    tokens: int,
    dtype: torch.dtype,
    strategy: str,
    activation: str = "none",
    indexed: bool = True,
    placed: bool = False,
) -> Callable[[], object]:
    """Computes the grouped product of ``tokens`` rows, gathered if ``indexed``, as called by a layer in training.

    ``placed``: as called for the last product of a layer without gradients, which scatters rows to their tokens.
    """
    call = ForwardCall(**_common(dims, experts, tokens, dtype, strategy, activation, indexed), save=not placed)
    if placed:
        places, gates = _integers(tokens), _empty(tokens, dtype=torch.float32)
        call = replace(call, slot_of_token=_integers(tokens, 1), out_index=places, gates=gates)
    if _on_chip(dims, dtype, strategy):
        return partial(linear.forward_on_chip, call, half=strategy == ON_CHIP_FROM_HALF)
    return partial(linear.forward_by_steps, call, wide=_wide(strategy))


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
    return partial(linear.backward_by_steps, call, wide=_wide(strategy))


def combine_work(dims: BlockDims, experts: int, tokens: int, dtype: torch.dtype) -> Callable[[], object]:
    """Scatters the rows of a last product to their tokens, with one expert each."""
    rows, gates = _empty(tokens, dims.out_features, dtype=dtype), _empty(tokens, 1, dtype=torch.float32)
    where = _integers(experts + 1, dtype=torch.int32), _integers(tokens), _integers(tokens, 1)
    return partial(routing.combine, CombineCall(rows, *where, gates, "triton"))


def gated_work(
    dims: BlockDims, experts: int, tokens: int, dtype: torch.dtype, strategy: str, save: bool = True
) -> Callable[[], object]:
    """Computes both projections of a gated network together, from gathered rows, as called by a layer in training."""
    common = _common(dims, experts, tokens, dtype, strategy, "silu", True)
    left, central, right = _blocks(dims, experts, dtype)
    call = GatedCall(**common, gate_left=left, gate_central=central, gate_right=right, save=save)
    return partial(gated_forward, call)


WORK: dict[str, Callable[..., Callable[[], object]]] = {"forward": forward_work, "backward": backward_work}


def run(phase: str, *problem: Any, **options: Any) -> None:
    """Run the work of a phase."""
    WORK[phase](*problem, **options)()


def _linear(dtype: torch.dtype, few: bool, sizes: Sizes) -> Iterator[Problem]:
    """Every strategy that the planner may choose, up (with ReLU and bias) and down (without)."""
    for name, pair in shapes(sizes).items():
        if few and name not in FEW_SHAPES:
            continue
        for direction, activation, shape in zip(("up", "down"), ("relu", "none"), pair, strict=True):
            dims = dims_of(shape)
            for experts, tokens in ((e, t) for e in sizes.experts[: 1 if few else None] for t in TOKENS):
                label = f"{name} {direction} E={experts} T={tokens}"
                problem = (dims, experts, tokens, dtype)
                for phase in PHASES:
                    for strategy in strategies(*problem, phase):
                        work = partial(run, phase, *problem, strategy, activation)
                        every_tile = not few and (experts, tokens) == (sizes.experts[0], TOKENS[0])
                        yield Problem(f"{label} {phase} {strategy}", work, every_tile)


def _placed(dtype: torch.dtype, few: bool, sizes: Sizes) -> Iterator[Problem]:
    """Every strategy of the last product without gradients, on two shapes."""
    for name in FEW_SHAPES:
        dims = dims_of(shapes(sizes)[name][1])
        for tokens in TOKENS:
            problem = (dims, sizes.experts[0], tokens, dtype)
            for strategy in strategies(*problem, "forward"):
                work = partial(run, "forward", *problem, strategy, indexed=False, placed=True)
                yield Problem(f"{name} placed T={tokens} {strategy}", work, not few and tokens == TOKENS[0])


def _activations(dtype: torch.dtype, few: bool, sizes: Sizes) -> Iterator[Problem]:
    """The other activations, and a masked central gradient, on one shape each."""
    for name in () if few else ("separable", "paper 32"):
        dims = dims_of(shapes(sizes)[name][0])
        strategy = "separable" if dims.is_separable else ON_CHIP
        problem = (dims, sizes.experts[0], TOKENS[0], dtype, strategy)
        for activation in ("gelu", "gelu_tanh", "silu"):
            yield Problem(f"{name} {activation} forward", partial(run, "forward", *problem, activation))
            yield Problem(f"{name} {activation} backward", partial(run, "backward", *problem, activation))
        yield Problem(f"{name} masked backward", partial(run, "backward", *problem, "relu", True))


def _gated(dtype: torch.dtype, few: bool, sizes: Sizes) -> Iterator[Problem]:
    """Both projections of gated networks."""
    for name in ("separable",) if few else ("separable", "paper 32", "paper full"):
        dims = dims_of(shapes(sizes)[name][0])
        for tokens in TOKENS:
            problem = (dims, sizes.experts[0], tokens, dtype)
            for plan in contractions(*problem, "forward"):
                work = gated_work(*problem, plan.strategy)
                yield Problem(f"{name} gated T={tokens} {plan.strategy}", work, not few and tokens == TOKENS[0])


def _routing(dtype: torch.dtype, few: bool, sizes: Sizes) -> Iterator[Problem]:
    loads, model = sizes.experts[:1] if few else sizes.experts, sizes.model
    for experts, tokens, top_k in ((e, t, k) for e in (*loads, MOST_EXPERTS) for t in TOKENS for k in (1, 2)):
        label, slots = f"routing E={experts} T={tokens} K={top_k}", tokens * top_k
        index, offsets = _integers(tokens, top_k), _integers(experts + 1, dtype=torch.int32)
        token_of_slot, slot_of_token = _integers(slots), _integers(tokens, top_k)
        mask = _empty(tokens, dtype=torch.bool)
        rows, gates = _empty(tokens, model, dtype=dtype), _empty(tokens, top_k, dtype=torch.float32)
        sorted_rows = _empty(slots, model, dtype=dtype)
        where = (offsets, token_of_slot, slot_of_token)
        for capacity, token_mask in ((None, None), (slots // experts + 1, mask)):
            call: Any = RouteCall(index, experts, capacity, token_mask, "triton")
            yield Problem(f"{label} route", partial(routing.route, call))
        call = DispatchCall(rows, *where, "triton")
        yield Problem(f"{label} dispatch", partial(routing.dispatch, call))
        call = DispatchBackwardCall(sorted_rows, slot_of_token, "triton")
        yield Problem(f"{label} dispatch backward", partial(routing.dispatch_backward, call))
        call = CombineCall(sorted_rows, *where, gates, "triton")
        yield Problem(f"{label} combine", partial(routing.combine, call))
        call = CombineBackwardCall(rows, sorted_rows, token_of_slot, slot_of_token, gates, True, True, "triton")
        yield Problem(f"{label} combine backward", partial(routing.combine_backward, call))


def _embedding(dtype: torch.dtype, few: bool, sizes: Sizes) -> Iterator[Problem]:
    """A few rows are gathered, many are read from a rebuilt table."""
    table = sizes.vocabulary, sizes.model
    blocks = _blocks(dims_of(MPOShape.paper(*table, max_bond=64)), 1, dtype)
    for ids in (_integers(TOKENS[-1]), _integers(TOKENS[0])):
        tokens = ids.shape[0]
        call = (ids, *blocks, *table, "triton")
        yield Problem(f"embedding T={tokens}", partial(embedding.forward, EmbeddingCall(*call)), not few)
        grad = _empty(tokens, sizes.model, dtype=dtype)
        work = partial(embedding.backward, EmbeddingBackwardCall(*call, grad))
        yield Problem(f"embedding T={tokens} backward", work, not few)


class HiddenSize(NamedTuple):
    """Experts on the hidden side.

    Attributes:
        experts, top_k: number of experts, and experts per token.
        per_group: whether groups own their blocks.
        block: side of a block.
        hidden: units.
    """

    experts: int
    top_k: int
    per_group: bool
    block: int = 64
    hidden: int = HIDDEN


HIDDEN_SIZES = (HiddenSize(8, 2, True), HiddenSize(64, 2, False), HiddenSize(8, 4, True, 128), HiddenSize(64, 8, True))


def hidden_inputs(size: HiddenSize, tokens: int, dtype: torch.dtype, gated: bool) -> dict[str, Any]:
    """Arguments of `hidden_experts` by name, with biases."""
    blocks = (size.experts, size.hidden // size.block if size.per_group else 1, size.block, size.block)
    return {
        "u": _empty(tokens, size.hidden, dtype=dtype),
        "gates": _empty(tokens, size.top_k, dtype=torch.float32),
        "top_k_index": _integers(tokens, size.top_k),
        "right": _empty(*blocks, dtype=dtype),
        "left": _empty(*blocks, dtype=dtype),
        "bias": _empty(size.experts, size.hidden, dtype=dtype),
        "u_gate": _empty(tokens, size.hidden, dtype=dtype) if gated else None,
        "right_gate": _empty(*blocks, dtype=dtype) if gated else None,
    }


def run_hidden(size: HiddenSize, tokens: int, dtype: torch.dtype, gated: bool, activation: str, phase: str) -> None:
    """`hidden_experts` between the products of the layer, or all its gradients."""
    inputs = {**hidden_inputs(size, tokens, dtype, gated), "activation": activation, "backend": "triton"}
    if phase == "forward":
        hidden.forward(HiddenCall(**inputs))
    else:
        grad, need = _empty(tokens, size.hidden, dtype=dtype), [True] * 7
        hidden.backward(HiddenBackwardCall(**inputs, grad=grad, need=need))


def hidden_sizes(sizes: Sizes) -> tuple[HiddenSize, ...]:
    """The cases of `HIDDEN_SIZES` for other sizes; with many experts both with blocks per group and with shared
    ones."""
    found = tuple(size._replace(hidden=sizes.hidden) for size in HIDDEN_SIZES)
    if sizes.experts == EXPERTS:
        return found
    return tuple(size._replace(experts=experts) for experts in sizes.experts for size in found)


def _hidden(dtype: torch.dtype, few: bool, sizes: Sizes) -> Iterator[Problem]:
    """Gated and not, on every tile."""
    for size in hidden_sizes(sizes)[: 2 if few else None]:
        for gated, activation in ((False, "gelu"), (True, "silu")):
            for phase in PHASES:
                label = f"hidden {size.block} E={size.experts} {'gated ' if gated else ''}{phase}"
                for tokens in TOKENS:
                    work = partial(run_hidden, size, tokens, dtype, gated, activation, phase)
                    yield Problem(f"{label} T={tokens}", work, not few and tokens == TOKENS[0])


def problems(dtype: torch.dtype, few: bool = False, sizes: Sizes = T5_BASE) -> Iterator[Problem]:
    """All shipped problems in one dtype; ``few``: enough of them to launch every kernel.

    Every tile is tried only on T5-base's sizes; on others, only suitable tiles.
    """
    for family in (_linear, _placed, _activations, _gated, _routing, _embedding, _hidden):
        for problem in family(dtype, few, sizes):
            yield problem if sizes is T5_BASE else replace(problem, every_tile=False)


def launches(problem: Problem, architecture: str) -> list[Launch]:
    """The launches of a problem on an architecture: with the suitable tiles, and with all others in turn if
    requested."""
    found: list[Launch] = []
    for entry in (None, *(range(most_tiles(architecture)) if problem.every_tile else ())):
        with recorded(architecture, entry) as started:
            problem.run()
        found += started
    return found
