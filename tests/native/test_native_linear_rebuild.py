"""The compiled kernels' strategies for any shape: blocks and chunks of every size, against float64."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mpoe_bench.cases import expert_choice, random_blocks
from torch import Tensor

from mpoe_kernels import MPOBlocks, MPOShape, route
from mpoe_kernels.contract import BlockDims
from mpoe_kernels.linear.native import linear_backward, linear_forward
from mpoe_kernels.linear.op import BackwardCall, ForwardCall
from mpoe_kernels.native_library import NATIVE_LIBRARY
from mpoe_kernels.reference import grouped_mpo_linear_reference
from tests.assertions import assert_calibrated, poisoned_memory, torch_threads
from tests.cases import SMALL_SHAPES, pairwise

STRATEGIES = ("rebuild", "half_left", "half_right", "chain")
DTYPES = (torch.float32, torch.bfloat16)
NAMES = ("dx", "dleft", "dcentral", "dright", "dbias")
# Several blocks in k and in n, with a smaller last one; bonds that do not fill a granule; both orders of half_left.
LARGER_SHAPES = {
    "many_blocks": MPOShape((16, 9, 16), (16, 7, 16), max_bond=40),
    "many_blocks_mirrored": MPOShape((16, 7, 24), (16, 9, 16), max_bond=40),
    "wide_left": MPOShape((24, 3, 4), (16, 5, 2), max_bond=33),
    "wide_right": MPOShape((4, 3, 24), (4, 5, 24), max_bond=33),
    "cropped": MPOShape((6, 5, 4), (4, 6, 7), max_bond=20, in_features=101, out_features=123),
    "few_rows": MPOShape((4, 9, 3), (4, 37, 8), max_bond=(11, 13)),
    "few_rows_central_first": MPOShape((2, 60, 4), (4, 4, 8), max_bond=8),
    "cropped_right_first": MPOShape((4, 5, 6), (7, 6, 4), max_bond=20, in_features=101, out_features=123),
}

# One shape for each order of contracting x with the three blocks: initials of left, central and right.
CHAIN_ORDERS = {
    "LCR": ((2, 2, 2), (2, 2, 3)),
    "RCL": ((2, 2, 2), (3, 2, 2)),
    "CLR": ((2, 12, 2), (2, 2, 2)),
    "CRL": ((2, 12, 2), (3, 2, 2)),
    "RLC": ((3, 2, 5), (2, 8, 2)),
    "LRC": ((3, 2, 3), (2, 8, 2)),
}


@pytest.fixture(autouse=True)
def _native(native_library: None) -> None:
    assert not NATIVE_LIBRARY.reasons


class Case:
    """One product; `forward` and `backward` by a kernel, `exact` by the reference in any dtype."""

    def __init__(
        self,
        shape: MPOShape,
        dtype: torch.dtype,
        tokens: int,
        *,
        experts: int = 3,
        top_k: int = 1,
        kind: str = "zipf",
        activation: str = "gelu",
        gathered: bool = True,
        with_bias: bool = True,
        capacity: int | None = None,
    ) -> None:
        self.shape, self.dtype, self.activation = shape, dtype, activation
        self.routing = route(expert_choice(kind, tokens, experts, min(top_k, experts)), experts, capacity)
        slots = self.routing.token_of_slot.shape[0]
        self.rows = self.routing.token_of_slot if gathered else None
        self.x = torch.randn(tokens if gathered else slots, shape.in_features).to(dtype)
        self.bias = torch.randn(shape.out_features).to(dtype) if with_bias else None
        self.blocks = random_blocks(shape, experts, dtype)
        # All of one sign, otherwise the bias gradient may be a small difference of large numbers.
        self.grad = (torch.rand(slots, shape.out_features) + 0.5).to(dtype)
        self.last = int(self.routing.expert_offsets[-1])
        self.found: dict[torch.dtype, tuple[Tensor, tuple[Tensor, ...]]] = {}

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.blocks.left, self.blocks.central, self.blocks.right

    @property
    def common(self) -> tuple[Any, ...]:
        """The first arguments of every call, up to the strategy."""
        sizes = (self.shape.in_features, self.shape.out_features)
        return self.x, *self.parts, self.routing.expert_offsets, self.bias, self.rows, *sizes, self.activation

    def forward(self, strategy: str) -> tuple[Tensor, Tensor]:
        y, _, saved = linear_forward(ForwardCall(*self.common, strategy, "native", save=True))
        return y, y if self.activation == "relu" else saved

    def backward(self, strategy: str, saved: Tensor, need: list[bool] | None = None) -> tuple[Tensor, ...]:
        need = need or [True] * 4 + [self.bias is not None]
        own = (self.grad, self.x.new_empty(0), saved, need)
        return linear_backward(BackwardCall(*self.common, strategy, "native", *own))

    def exact(self, dtype: torch.dtype) -> tuple[Tensor, tuple[Tensor, ...]]:
        if dtype not in self.found:
            self.found[dtype] = self._exact(dtype)
        return self.found[dtype]

    def _exact(self, dtype: torch.dtype) -> tuple[Tensor, tuple[Tensor, ...]]:
        leaves = [t.detach().to(dtype).requires_grad_() for t in (self.x, *self.parts)]
        bias = None if self.bias is None else self.bias.to(dtype).requires_grad_()
        blocks = MPOBlocks(*leaves[1:], self.shape.in_features, self.shape.out_features)
        offsets = self.routing.expert_offsets
        y = grouped_mpo_linear_reference(
            leaves[0], blocks, offsets, bias, row_index=self.rows, activation=self.activation
        )
        inputs = leaves if bias is None else [*leaves, bias]
        if not y.requires_grad:
            return y, tuple(torch.zeros_like(t) for t in inputs)
        found = torch.autograd.grad(y, inputs, self.grad.to(dtype), allow_unused=True)
        return y, tuple(torch.zeros_like(t) if g is None else g for t, g in zip(inputs, found, strict=True))

    def check(self, strategy: str) -> None:
        (truth, gradients), (same, same_gradients) = self.exact(torch.float64), self.exact(self.dtype)
        with poisoned_memory():
            y, saved = self.forward(strategy)
        assert_calibrated(y, truth, same, f"y ({strategy})")
        assert bool((y[self.last :] == 0).all())
        with poisoned_memory():
            results = self.backward(strategy, saved)
        for name, actual, exact, rounded in zip(NAMES, results, gradients, same_gradients, strict=False):
            assert_calibrated(actual, exact, rounded, f"{name} ({strategy})")


@settings(max_examples=50, deadline=None)
@given(
    name=st.sampled_from(list(SMALL_SHAPES)),
    dtype=st.sampled_from(DTYPES),
    strategy=st.sampled_from(STRATEGIES),
    tokens=st.integers(0, 40),
    top_k=st.integers(1, 2),
    kind=st.sampled_from(["uniform", "zipf", "all_to_one", "some_idle"]),
    activation=st.sampled_from(["none", "gelu", "gelu_tanh", "silu"]),
    gathered=st.booleans(),
    with_bias=st.booleans(),
    capacity=st.none() | st.integers(1, 5),
    seed=st.integers(0, 2**31),
)
def test_small_shapes(name: str, dtype: torch.dtype, strategy: str, tokens: int, seed: int, **options: object) -> None:
    torch.manual_seed(seed)
    Case(SMALL_SHAPES[name], dtype, tokens, **options).check(strategy)  # type: ignore[arg-type]


@settings(max_examples=40, deadline=None)
@given(
    factors=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=3),
    bond=st.none() | st.integers(1, 24),
    dtype=st.sampled_from(DTYPES),
    strategy=st.sampled_from(STRATEGIES),
    tokens=st.integers(1, 30),
    seed=st.integers(0, 2**31),
)
def test_any_factors(
    factors: list[tuple[int, int]], bond: int | None, dtype: torch.dtype, strategy: str, tokens: int, seed: int
) -> None:
    torch.manual_seed(seed)
    rows, columns = zip(*factors, strict=True)
    Case(MPOShape(rows, columns, max_bond=bond), dtype, tokens).check(strategy)


@cache
def rows_of_a_tile_and_more(name: str, dtype: torch.dtype) -> Case:
    """One case for all strategies: the float64 reference takes longer than any of them."""
    torch.manual_seed(0)
    return Case(LARGER_SHAPES[name], dtype, 70, activation="silu", kind="some_idle", experts=4)


@pytest.mark.parametrize(("name", "strategy", "dtype"), pairwise(list(LARGER_SHAPES), STRATEGIES, DTYPES))
def test_many_blocks(name: str, dtype: torch.dtype, strategy: str) -> None:
    rows_of_a_tile_and_more(name, dtype).check(strategy)
    Case(LARGER_SHAPES[name], dtype, 7, activation="relu", gathered=False, with_bias=False).forward(strategy)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("name", "tokens"),
    [("many_blocks", 50), ("wide_right", 50), ("cropped", 50), ("few_rows", 1), ("few_rows_central_first", 3)],
)
def test_threads_change_no_bit(name: str, tokens: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    case = Case(LARGER_SHAPES[name], dtype, tokens, experts=5, top_k=2)
    for strategy in STRATEGIES:
        results = []
        for count in (1, 2, 3):
            with torch_threads(count):
                y, saved = case.forward(strategy)
                gradients = case.backward(strategy, saved)
                results.append((y, *gradients))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True)), strategy


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("skipped", range(5))
def test_what_is_not_needed_is_not_computed(strategy: str, skipped: int) -> None:
    """Leaving one gradient out (such as a masked central one) changes no bit of the others."""
    torch.manual_seed(0)
    case = Case(LARGER_SHAPES["many_blocks"], torch.float32, 20)
    _, saved = case.forward(strategy)
    need = [k != skipped for k in range(5)]
    everything, fewer = case.backward(strategy, saved), case.backward(strategy, saved, need)
    for k, (a, b) in enumerate(zip(everything, fewer, strict=True)):
        assert b.numel() == 0 if k == skipped else torch.equal(a, b), NAMES[k]


@pytest.mark.parametrize(("tokens", "strategy", "dtype"), pairwise((1, 2, 3, 8, 11, 40, 41), STRATEGIES, DTYPES))
def test_few_tokens(tokens: int, strategy: str, dtype: torch.dtype) -> None:
    """A chain packs central piece by piece for up to 64 rows, in a backward 128: 12 of each slot, or 8 if it is first.

    After left, for 481 columns, it has to be fewer rows.
    """
    torch.manual_seed(0)
    Case(LARGER_SHAPES["few_rows"], dtype, tokens).check(strategy)
    Case(LARGER_SHAPES["few_rows_central_first"], dtype, tokens).check(strategy)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", CHAIN_ORDERS)
def test_every_chain_order(order: str, dtype: torch.dtype) -> None:
    shape = MPOShape(*CHAIN_ORDERS[order], max_bond=5)
    assert BlockDims(
        **shape.block_dims, in_features=shape.in_features, out_features=shape.out_features
    ).chain_order == tuple(order)
    Case(shape, dtype, 21).check("chain")


def test_no_slots_and_idle_experts() -> None:
    for strategy in STRATEGIES:
        empty = Case(SMALL_SHAPES["light"], torch.float32, 0)
        y, saved = empty.forward(strategy)
        assert y.shape == (0, empty.shape.out_features)
        with poisoned_memory():
            results = empty.backward(strategy, saved)
        assert all(bool((t == 0).all()) for t in results)


ISAS = ("generic", "avx2", "avx512", "avx512bf16", "amx")


# tools/native_sanitizers.sh also runs these kernels with every instruction set under sanitizers.
@pytest.mark.parametrize(
    "isa", [pytest.param(isa, marks=pytest.mark.slow if isa == "avx2" else pytest.mark.exhaustive) for isa in ISAS]
)
def test_every_instruction_set_of_this_machine(isa: str) -> None:
    best = NATIVE_LIBRARY.info["isa_detected"]  # what the tests use anyway
    if ISAS.index(isa) >= ISAS.index(best):
        pytest.skip(f"this machine's best is {best}")
    environment = os.environ | {"MPOE_CPU_ISA": isa}
    tests = [f"{__file__}::{name}" for name in ("test_many_blocks", "test_small_shapes", "test_any_factors")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
