"""Inf and NaN stay with their token and their expert: nobody else multiplies by them, not even with a gate of zero."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from mpoe_bench.cases import random_blocks
from torch import Tensor

from mpoe_kernels import MPOBlocks, grouped_mpo_linear, hidden_experts, mpo_ffn, neuron_experts, route, use_backend
from tests.cases import SMALL_SHAPES

from .backend_cases import on_every_backend, strategies_of, supports

TOKENS = 6
# Of every token; token 5 has none. With two experts each token that has one chooses both or one of them.
CHOICES = {
    3: torch.tensor([[0, 1], [1, 2], [2, 0], [0, 1], [2, 1], [-1, -1]]),
    2: torch.tensor([[0, -1], [1, -1], [0, -1], [1, -1], [1, -1], [-1, -1]]),
}
VALUES = {"nan": float("nan"), "inf": float("inf"), "large": 3e4}


@dataclass
class Case:
    """A function of tensors ``[T, ...]`` and ``[E, ...]``.

    Attributes:
        call: the function, to rows ``[T, ...]``.
        of_tokens, of_experts: its differentiable arguments, in the order in which it takes them.
        index: ``[T, K]``, experts of every token.
    """

    call: Callable[..., Tensor]
    of_tokens: dict[str, Tensor]
    of_experts: dict[str, Tensor]
    index: Tensor

    def run(self) -> dict[str, Tensor]:
        """``y`` and the gradients."""
        leaves = {name: t.clone().requires_grad_() for name, t in {**self.of_tokens, **self.of_experts}.items()}
        y = self.call(*leaves.values())
        grads = torch.autograd.grad(y, list(leaves.values()), torch.ones_like(y))
        return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}

    def others_are_untouched(self, spoil: Callable[[], None], tokens: set[int], experts: set[int]) -> None:
        """Everything of other tokens and experts has the bits that it has without."""
        clean = self.run()
        spoil()
        found = self.run()
        for name in ("y", *self.of_tokens):
            for token in set(range(TOKENS)) - tokens:
                assert torch.equal(found[name][token], clean[name][token]), (name, token)
        for name, stack in self.of_experts.items():
            for expert in set(range(len(stack))) - experts:
                assert torch.equal(found[name][expert], clean[name][expert]), (name, expert)

    def check(self, value: float) -> None:
        for token, chosen in enumerate(self.index.tolist()):
            for rows in self.of_tokens.values():
                kept = rows.clone()
                self.others_are_untouched(lambda: rows[token].fill_(value), {token}, set(chosen))  # noqa: B023
                rows.copy_(kept)
        for expert in range(len(next(iter(self.of_experts.values())))):
            tokens = {t for t, chosen in enumerate(self.index.tolist()) if expert in chosen}
            for stack in self.of_experts.values():
                kept = stack.clone()
                self.others_are_untouched(lambda: stack[expert].fill_(value), tokens, {expert})  # noqa: B023
                stack.copy_(kept)


def hidden(experts: int, dtype: torch.dtype, gated: bool, groups: int) -> Case:
    index, features, size = CHOICES[experts], 12, 4
    blocks = {name: torch.randn(experts, groups, size, size).to(dtype) for name in ("right", "left", "right_gate")}
    rows = {"u": torch.randn(TOKENS, features).to(dtype), "gates": torch.rand(TOKENS, 2)}
    if not gated:
        del blocks["right_gate"]

        def plain(u: Tensor, gates: Tensor, right: Tensor, left: Tensor) -> Tensor:
            return hidden_experts(u, gates, index, right, left, activation="silu")

        return Case(plain, rows, blocks, index)

    def call(u: Tensor, gates: Tensor, u_gate: Tensor, right: Tensor, left: Tensor, right_gate: Tensor) -> Tensor:
        return hidden_experts(u, gates, index, right, left, activation="silu", u_gate=u_gate, right_gate=right_gate)

    return Case(call, {**rows, "u_gate": torch.randn(TOKENS, features).to(dtype)}, blocks, index)


def neurons(experts: int, dtype: torch.dtype, gated: bool) -> Case:
    index, shapes = CHOICES[experts], {"up": (5, 12), "down": (5, 7), "bias": (5,), "gate_up": (5, 12)}
    weights = {name: torch.randn(experts, *shape).to(dtype) for name, shape in shapes.items()}
    if not gated:
        del weights["gate_up"]

    def call(x: Tensor, gates: Tensor, up: Tensor, down: Tensor, bias: Tensor, gate_up: Tensor | None = None) -> Tensor:
        return neuron_experts(x, gates, index, up, down, bias, activation="silu", gate_up=gate_up)

    return Case(call, {"x": torch.randn(TOKENS, 12).to(dtype), "gates": torch.rand(TOKENS, 2)}, weights, index)


def linear(name: str, dtype: torch.dtype, strategy: str) -> Case:
    """Rows gathered from tokens; the shared core, whose gradient every token reaches, is none of the arguments."""
    shape, index = SMALL_SHAPES[name], CHOICES[3]
    routing = route(index.clamp_min(0), 3, token_mask=index[:, 0] >= 0)
    blocks = random_blocks(shape, 3, dtype)

    def call(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
        given = MPOBlocks(left, blocks.central, right, shape.in_features, shape.out_features)
        where = {"row_index": routing.token_of_slot, "slot_of_token": routing.slot_of_token}
        y = grouped_mpo_linear(x, given, routing.expert_offsets, activation="silu", strategy=strategy, **where)
        padded = torch.cat([y, y.new_zeros(1, y.shape[1])])
        return padded[routing.slot_of_token]  # -1: zeros

    x = torch.randn(TOKENS, shape.in_features).to(dtype)
    return Case(call, {"x": x}, {"left": blocks.left, "right": blocks.right}, index)


def ffn(dtype: torch.dtype) -> Case:
    shape, index = SMALL_SHAPES["separable"], CHOICES[3]
    routing = route(index.clamp_min(0), 3, token_mask=index[:, 0] >= 0)
    up, down = random_blocks(shape, 3, dtype), random_blocks(shape.mirrored(), 3, dtype)

    def call(x: Tensor, gates: Tensor, left: Tensor, right: Tensor) -> Tensor:
        given = MPOBlocks(left, up.central, right, shape.in_features, shape.out_features)
        return mpo_ffn(x, routing, gates, given, down, activation="gelu")

    rows = {"x": torch.randn(TOKENS, shape.in_features).to(dtype), "gates": torch.rand(TOKENS, 2)}
    return Case(call, rows, {"left": up.left, "right": up.right}, index)


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@on_every_backend
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("experts", CHOICES)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("groups", [1, 3])
def test_hidden_experts(backend: str, value: str, dtype: str, experts: int, gated: bool, groups: int) -> None:
    if not supports(backend, "hidden_experts", DTYPES[dtype]):
        pytest.skip("no such kernel")
    with use_backend(backend):
        hidden(experts, DTYPES[dtype], gated, groups).check(VALUES[value])


@on_every_backend
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("experts", CHOICES)
@pytest.mark.parametrize("gated", [False, True])
def test_neuron_experts(backend: str, value: str, dtype: str, experts: int, gated: bool) -> None:
    if not supports(backend, "neuron_experts", DTYPES[dtype]):
        pytest.skip("no such kernel")
    with use_backend(backend):
        neurons(experts, DTYPES[dtype], gated).check(VALUES[value])


@on_every_backend
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["separable", "light", "paper", "padded"])
def test_linear(backend: str, value: str, dtype: str, name: str) -> None:
    strategies = strategies_of(backend, SMALL_SHAPES[name], DTYPES[dtype])
    if not strategies:
        pytest.skip("no such kernel")
    with use_backend(backend):
        for strategy in strategies:
            linear(name, DTYPES[dtype], strategy).check(VALUES[value])


@on_every_backend
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_ffn(backend: str, value: str, dtype: str) -> None:
    if not strategies_of(backend, SMALL_SHAPES["separable"], DTYPES[dtype]):
        pytest.skip("no such kernel")
    with use_backend(backend):
        ffn(DTYPES[dtype]).check(VALUES[value])
