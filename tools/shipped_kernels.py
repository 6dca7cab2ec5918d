"""Calls of the ops that between them launch every Triton kernel in every configuration that ships.

They run on tensors without memory while launches are recorded, so neither a GPU nor memory is needed. A kernel that is
launched only at other sizes needs its own problem in `problems`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mpoe_kernels.contract import BlockDims, contractions
from mpoe_kernels.contract.program import PHASES
from mpoe_kernels.hidden_experts import triton as hidden
from mpoe_kernels.hidden_experts.op import HiddenBackwardCall, HiddenCall
from mpoe_kernels.linear.op import BackwardCall, ForwardCall
from mpoe_kernels.linear.triton import fused_launch, grouped
from mpoe_kernels.linear.triton.candidates import MOST_EXPERTS, ON_CHIP, fused_reasons
from mpoe_kernels.mpo.shape import MPOShape
from mpoe_kernels.neurons import triton as neurons
from mpoe_kernels.neurons.op import NeuronBackwardCall, NeuronCall
from mpoe_kernels.routing import triton as routing
from mpoe_kernels.routing.op import CombineBackwardCall, CombineCall, DispatchBackwardCall, DispatchCall, RouteCall
from mpoe_kernels.testing.launches import Launch, recorded
from mpoe_kernels.triton import architecture

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOKENS = (4096, 64, 8)  # training, a small batch, decoding
TILES = 4  # length of the longest table of tiles


class Sizes(NamedTuple):
    """Sizes of a model.

    Attributes:
        name: description; empty for T5-base, on which every shipped tile is tried.
        model, hidden: widths of a feed-forward layer.
        experts: numbers of experts; the first one is used where one is enough.
    """

    name: str
    model: int
    hidden: int
    experts: tuple[int, ...]


T5_BASE = Sizes("", 768, 3072, (8, 64))
LARGE_SIZES = (Sizes("d = 4,096", 4096, 14336, (8, 64)), Sizes("E = 1,024", 768, 3072, (1024,)))


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

    def launches(self, name: str) -> list[Launch]:
        """On an architecture: with the suitable tiles, and with all others in turn if requested."""
        found: list[Launch] = []
        for tile in (None, *(range(TILES) if self.every_tile else ())):
            with recorded(name, tile) as started:
                self.run()
            found += started
        return found


def shapes(sizes: Sizes = T5_BASE) -> dict[str, tuple[BlockDims, BlockDims]]:
    """Blocks of the up and the down projection by name."""
    up, down = (sizes.model, sizes.hidden), (sizes.hidden, sizes.model)
    separable = MPOShape.separable(*up)
    found = {
        "separable": (separable, separable.mirrored()),
        "light 64": (MPOShape.light(*up, 64), MPOShape.light(*down, 64)),
    }
    for bond in (16, 32, 64, 128, None):
        found[f"paper {bond or 'full'}"] = MPOShape.paper(*up, max_bond=bond), MPOShape.paper(*down, max_bond=bond)
    return {name: (BlockDims.of_shape(one), BlockDims.of_shape(other)) for name, (one, other) in found.items()}


def _empty(*size: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def _integers(*size: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return _empty(*size, dtype=dtype)


def run_linear(
    dims: BlockDims,
    experts: int,
    tokens: int,
    dtype: torch.dtype,
    phase: str,
    strategy: str,
    activation: str = "none",
    placed: bool = False,
    mask_central: bool = False,
) -> None:
    """The grouped product of gathered rows, as a layer calls it in training.

    Args:
        dims, experts, tokens, dtype: the problem.
        phase: ``forward`` or ``backward``.
        strategy: one of the planner's, or `ON_CHIP`, which does nothing where weights do not fit on chip.
        activation: with one, there is a bias.
        placed: as called for the last product of a layer without gradients, which scatters rows to their tokens.
        mask_central: without the gradient of the central block.
    """
    on_chip = strategy == ON_CHIP
    kernels = fused_launch if on_chip else grouped
    if on_chip and fused_reasons(dims, dtype, architecture.target_of(torch.device("meta"))):
        return
    common: dict[str, Any] = {
        "x": _empty(tokens, dims.in_features, dtype=dtype),
        "left": _empty(experts, dims.iL, dims.jL, dims.a, dtype=dtype),
        "central": _empty(dims.a, dims.iC, dims.jC, dims.b, dtype=dtype),
        "right": _empty(experts, dims.b, dims.iR, dims.jR, dtype=dtype),
        "expert_offsets": _integers(experts + 1, dtype=torch.int32),
        "bias": _empty(dims.out_features, dtype=dtype) if activation != "none" else None,
        "row_index": None if placed else _integers(tokens),
        "slot_of_token": None,  # the sum by token is one of routing's kernels
        "in_features": dims.in_features,
        "out_features": dims.out_features,
        "activation": activation,
        "strategy": "rebuild" if on_chip else strategy,
        "backend": "triton",
    }
    if phase == "forward":
        call = ForwardCall(**common, save=not placed)
        if placed:
            call = replace(call, out_index=_integers(tokens), gates=_empty(tokens, dtype=torch.float32))
        kernels.forward(call)
        return
    grad, saved = (_empty(tokens, dims.out_features, dtype=dtype) for _ in range(2))
    h = _empty(tokens * dims.jC if strategy == "separable" else 0, dims.b, dtype=dtype)
    need = [True, True, not mask_central, True, activation != "none"]
    backward = BackwardCall(**common, grad=grad, h=h, saved=saved, need=need)
    kernels.backward(backward)


def strategies(dims: BlockDims, experts: int, tokens: int, dtype: torch.dtype, phase: str) -> list[str]:
    """Names of the candidates: the planner's strategies, and the fused kernels."""
    found = [plan.strategy for plan in contractions(dims, experts, tokens, dtype, phase)]
    return found if dims.is_separable else [*found, ON_CHIP]


def _linear(dtype: torch.dtype, few: bool, sizes: Sizes) -> Iterator[Problem]:
    """Every strategy that may be chosen, up (with ReLU and bias) and down (without); some with what is rarer."""
    rarer: dict[str, dict[str, dict[str, Any]]] = {
        "forward": {"placed": {"placed": True}},
        "backward": {"masked": {"mask_central": True}},
    }
    others = {phase: {name: {"activation": name} for name in ("gelu", "gelu_tanh", "silu")} for phase in PHASES}
    for (name, pair), (experts, tokens) in product(
        shapes(sizes).items(), product(sizes.experts[: 1 if few else None], TOKENS)
    ):
        if few and name not in ("paper 64", "separable"):
            continue
        first = not few and (experts, tokens) == (sizes.experts[0], TOKENS[0])
        for direction, activation, dims in zip(("up", "down"), ("relu", "none"), pair, strict=True):
            for phase in PHASES:
                for strategy in strategies(dims, experts, tokens, dtype, phase):
                    options = {"": {"activation": activation}}
                    if name in ("paper 64", "separable") and direction == "down":
                        options |= rarer[phase]
                    if name in ("paper 32", "separable") and first and direction == "up":
                        options |= others[phase]
                    for more, given in options.items():
                        label = f"{name} {direction} {phase} {strategy} {more} E={experts} T={tokens}"
                        work = partial(run_linear, dims, experts, tokens, dtype, phase, strategy, **given)
                        yield Problem(label, work, first)


def _routing(dtype: torch.dtype, few: bool, sizes: Sizes) -> Iterator[Problem]:
    """At every power of two of pairs that one program sorts, and beyond."""
    loads, model = sizes.experts[:1] if few else sizes.experts, sizes.model
    tokens_of = {1: (4096, *(1 << bit for bit in range(4, routing.FEW.bit_length()))), 2: TOKENS, 8: TOKENS}
    for experts, (top_k, counts) in product((*loads, MOST_EXPERTS), tokens_of.items()):
        for tokens in counts:
            label, slots = f"routing E={experts} T={tokens} K={top_k}", tokens * top_k
            index, offsets = _integers(tokens, top_k), _integers(experts + 1, dtype=torch.int32)
            token_of_slot, slot_of_token = _integers(slots), _integers(tokens, top_k)
            rows, gates = _empty(tokens, model, dtype=dtype), _empty(tokens, top_k, dtype=torch.float32)
            sorted_rows, where = _empty(slots, model, dtype=dtype), (offsets, token_of_slot, slot_of_token)
            for raw in (False, True):
                logits = _empty(tokens, experts, dtype=torch.float32)
                yield Problem(f"{label} gate", partial(routing.gate, logits, top_k, raw))
            for capacity, mask in ((None, None), (slots // experts + 1, _empty(tokens, dtype=torch.bool))):
                call: Any = RouteCall(index, experts, capacity, mask, "triton")
                yield Problem(f"{label} route", partial(routing.route, call))
            call = DispatchCall(rows, *where, "triton")
            yield Problem(f"{label} dispatch", partial(routing.dispatch, call))
            call = DispatchBackwardCall(sorted_rows, slot_of_token, "triton")
            yield Problem(f"{label} dispatch backward", partial(routing.dispatch_backward, call))
            call = CombineCall(sorted_rows, *where, gates, "triton")
            yield Problem(f"{label} combine", partial(routing.combine, call))
            call = CombineBackwardCall(rows, sorted_rows, token_of_slot, slot_of_token, gates, True, True, "triton")
            yield Problem(f"{label} combine backward", partial(routing.combine_backward, call))


class HiddenSize(NamedTuple):
    """Experts on the hidden side: their number, those of a token, whether groups own blocks, a block's side."""

    experts: int
    top_k: int
    per_group: bool
    block: int = 64


HIDDEN_SIZES = (HiddenSize(8, 2, True), HiddenSize(64, 2, False), HiddenSize(8, 4, True, 128), HiddenSize(64, 8, True))


def run_hidden(
    size: HiddenSize, hidden_units: int, tokens: int, dtype: torch.dtype, gated: bool, activation: str, phase: str
) -> None:
    """`hidden_experts` between the products of the layer, with biases, or all its gradients."""
    blocks = (size.experts, hidden_units // size.block if size.per_group else 1, size.block, size.block)
    inputs: dict[str, Any] = {
        "u": _empty(tokens, hidden_units, dtype=dtype),
        "gates": _empty(tokens, size.top_k, dtype=torch.float32),
        "top_k_index": _integers(tokens, size.top_k),
        "right": _empty(*blocks, dtype=dtype),
        "left": _empty(*blocks, dtype=dtype),
        "bias": _empty(size.experts, hidden_units, dtype=dtype),
        "u_gate": _empty(tokens, hidden_units, dtype=dtype) if gated else None,
        "right_gate": _empty(*blocks, dtype=dtype) if gated else None,
        "activation": activation,
        "backend": "triton",
    }
    if phase == "forward":
        hidden.forward(HiddenCall(**inputs))
    else:
        grad = _empty(tokens, hidden_units, dtype=dtype)
        hidden.backward(HiddenBackwardCall(**inputs, grad=grad, need=[True] * 7))


def _hidden(dtype: torch.dtype, few: bool, sizes: Sizes) -> Iterator[Problem]:
    """Gated and not, on every tile."""
    found = HIDDEN_SIZES[: 2 if few else None]
    if sizes != T5_BASE:
        found = tuple(size._replace(experts=experts) for experts in sizes.experts for size in found)
    for size, (gated, activation), phase, tokens in product(found, ((False, "gelu"), (True, "silu")), PHASES, TOKENS):
        label = f"hidden {size.block} E={size.experts} {'gated ' if gated else ''}{phase} T={tokens}"
        work = partial(run_hidden, size, sizes.hidden, tokens, dtype, gated, activation, phase)
        yield Problem(label, work, not few and tokens == TOKENS[0])


class NeuronSize(NamedTuple):
    """Experts of their own neurons: their number, those of a token, neurons of each."""

    experts: int
    top_k: int
    neurons: int


NEURON_SIZES = (NeuronSize(8, 2, 64), NeuronSize(8, 2, 512), NeuronSize(64, 8, 128), NeuronSize(64, 16, 8))


def run_neurons(size: NeuronSize, width: int, tokens: int, dtype: torch.dtype, gated: bool, phase: str) -> None:
    """`neuron_experts` beside a layer of that width, with biases, or all its gradients."""
    weights = (size.experts, size.neurons, width)
    inputs: dict[str, Any] = {
        "x": _empty(tokens, width, dtype=dtype),
        "gates": _empty(tokens, size.top_k, dtype=torch.float32),
        "top_k_index": _integers(tokens, size.top_k),
        "up": _empty(*weights, dtype=dtype),
        "down": _empty(*weights, dtype=dtype),
        "bias": _empty(size.experts, size.neurons, dtype=dtype),
        "gate_up": _empty(*weights, dtype=dtype) if gated else None,
        "activation": "silu" if gated else "gelu",
        "backend": "triton",
    }
    if phase == "forward":
        neurons.forward(NeuronCall(**inputs))
    else:
        grad = _empty(tokens, width, dtype=dtype)
        neurons.backward(NeuronBackwardCall(**inputs, grad=grad, need=[True] * 6))


def _neurons(dtype: torch.dtype, few: bool, sizes: Sizes) -> Iterator[Problem]:
    """Gated and not, on every tile."""
    found = NEURON_SIZES[: 2 if few else None]
    if sizes != T5_BASE:
        found = tuple(size._replace(experts=experts) for experts in sizes.experts for size in found)
    for size, gated, phase, tokens in product(found, (False, True), PHASES, TOKENS):
        label = f"neurons {size.neurons} E={size.experts} {'gated ' if gated else ''}{phase} T={tokens}"
        work = partial(run_neurons, size, sizes.model, tokens, dtype, gated, phase)
        yield Problem(label, work, not few and tokens == TOKENS[0])


def problems(dtype: torch.dtype, few: bool = False, sizes: Sizes = T5_BASE) -> Iterator[Problem]:
    """All shipped problems in one dtype; ``few``: enough of them to launch every kernel.

    Every tile is tried only on T5-base's sizes; on others, only suitable tiles.
    """
    for family in (_linear, _routing, _hidden, _neurons):
        for problem in family(dtype, few, sizes):
            yield problem if sizes == T5_BASE else replace(problem, every_tile=False)
