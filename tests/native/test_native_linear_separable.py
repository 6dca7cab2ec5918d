"""The compiled kernels' strategy ``separable``: few and many slots, long sums, every instruction set."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable

import pytest
import torch
from mpoe_bench.cases import expert_choice, random_blocks
from torch import Tensor

from mpoe_kernels import MPOBlocks, MPOShape, grouped_mpo_linear, route
from mpoe_kernels.native_library import NATIVE_LIBRARY
from mpoe_kernels.reference import grouped_mpo_linear_reference
from tests.assertions import assert_calibrated, poisoned_memory, torch_threads
from tests.cases import pairwise

DTYPES = (torch.float32, torch.bfloat16)
NAMES = ("y", "dx", "dleft", "dcentral", "dright", "dbias")
# Of csrc/cpu/linear/separable.h: above them, a forward or a backward packs central as a whole.
FEW_SLOTS, FEW_GRADIENTS = 128, 64
# Several pieces of k and column strips, with remainders; odd bonds, which bfloat16 pads; missing rows and columns.
SHAPES = {
    "even": MPOShape((48, 11, 1), (1, 37, 40), max_bond=(40, 36)),
    "mirrored": MPOShape((48, 11, 1), (1, 37, 40), max_bond=(40, 36)).mirrored(),
    "odd": MPOShape((17, 9, 1), (1, 5, 21), max_bond=(15, 19)),
    "padded": MPOShape((40, 9, 1), (1, 7, 36), max_bond=(25, 30), in_features=357, out_features=249),
}


@pytest.fixture(autouse=True)
def _native(native_library: None) -> None:
    assert not NATIVE_LIBRARY.reasons


def run(
    function: object,
    blocks: MPOBlocks,
    x: Tensor,
    bias: Tensor,
    rows: Tensor,
    offsets: Tensor,
    dtype: torch.dtype,
    **options: object,
) -> list[Tensor]:
    """The result and its gradients, from leaves of ``dtype``."""
    given = (x, blocks.left, blocks.central, blocks.right, bias)
    x, left, central, right, bias = (t.detach().to(dtype).requires_grad_() for t in given)
    moved = MPOBlocks(left, central, right, blocks.in_features, blocks.out_features)
    y = function(x, moved, offsets, bias, row_index=rows, **options)  # type: ignore[operator]
    grad = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).sin().view(y.shape)
    return [y, *torch.autograd.grad(y, (x, left, central, right, bias), grad.to(x.dtype))]


def check(
    shape: MPOShape, dtype: torch.dtype, tokens: int, kind: str, activation: str | None = "gelu", experts: int = 5
) -> None:
    """Check against float64, in poisoned memory; without a graph nothing is saved and y has the same bits."""
    blocks = random_blocks(shape, experts, dtype)
    x, bias = torch.randn(tokens, shape.in_features).to(dtype), torch.randn(shape.out_features).to(dtype)
    routing = route(expert_choice(kind, tokens, experts), experts)
    rows, offsets = routing.token_of_slot, routing.expert_offsets
    given, native = (blocks, x, bias, rows, offsets), {"backend": "native", "strategy": "separable"}
    with poisoned_memory():
        actual = run(grouped_mpo_linear, *given, dtype, activation=activation, **native)
        alone = grouped_mpo_linear(x, blocks, offsets, bias, row_index=rows, activation=activation, **native)
    assert torch.equal(alone, actual[0])
    truth = run(grouped_mpo_linear_reference, *given, torch.float64, activation=activation)
    same = run(grouped_mpo_linear_reference, *given, dtype, activation=activation)
    for name, a, t, s in zip(NAMES, actual, truth, same, strict=True):
        assert_calibrated(a, t, s, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("slots", [8, 17, 24, 33, 48, 100])
def test_long_sums_of_few_slots(slots: int, dtype: torch.dtype) -> None:
    """Sums with more terms than one piece (kFewSums), so the last piece is shorter."""
    check(MPOShape((48, 31, 1), (1, 5, 24), max_bond=(40, 36)), dtype, slots, "zipf", experts=3)


TOKENS = (1, 2, 3, 8, FEW_GRADIENTS, FEW_GRADIENTS + 1, FEW_SLOTS, FEW_SLOTS + 1, 400)


@pytest.mark.parametrize(("tokens", "name", "dtype"), pairwise(TOKENS, list(SHAPES), DTYPES))
def test_few_and_many_slots(tokens: int, name: str, dtype: torch.dtype) -> None:
    check(SHAPES[name], dtype, tokens, "zipf")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["all_to_one", "some_idle"])
@pytest.mark.parametrize("activation", [None, "gelu_new", "silu"])
def test_loads_and_activations(activation: str | None, kind: str, dtype: torch.dtype) -> None:
    check(SHAPES["even"], dtype, 40, kind, activation)


@pytest.mark.parametrize("dtype", DTYPES)
def test_more_slots_than_central_sums_at_a_time(dtype: torch.dtype) -> None:
    """kRows = 1,024 in csrc/cpu/linear/separable_backward.cpp: three parts, the last one small and odd."""
    check(MPOShape((5, 4, 1), (1, 3, 6), max_bond=(5, 6)), dtype, 2061, "uniform")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("experts", [1, 2])
@pytest.mark.parametrize("name", ["even", "padded"])
def test_blocks_whose_gradient_several_threads_share(name: str, experts: int, dtype: torch.dtype) -> None:
    """With few experts, one expert's 36 to 48 rows of dleft and dright are cut into panels of 32."""
    with torch_threads(2):
        check(SHAPES[name], dtype, 33, "uniform", experts=experts)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("needed", [("x",), ("left",), ("central",), ("right",), ("x", "right"), ("left", "central")])
def test_any_gradients_of_few_slots(needed: tuple[str, ...], dtype: torch.dtype) -> None:
    """Each has the same bits as if all were needed."""
    blocks, x = random_blocks(SHAPES["even"], 3, dtype), torch.randn(3, SHAPES["even"].in_features).to(dtype)
    leaves = {"x": x, "left": blocks.left, "central": blocks.central, "right": blocks.right}

    def gradients(names: Iterable[str]) -> dict[str, Tensor]:
        parts = {name: t.detach().clone().requires_grad_(name in names) for name, t in leaves.items()}
        moved = MPOBlocks(parts["left"], parts["central"], parts["right"], blocks.in_features, blocks.out_features)
        y = grouped_mpo_linear(parts["x"], moved, torch.tensor([0, 2, 2, 3]), backend="native", strategy="separable")
        with poisoned_memory():
            y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape).to(dtype))
        return {name: parts[name].grad for name in names}

    everything = gradients(leaves)
    for name, gradient in gradients(needed).items():
        assert torch.equal(gradient, everything[name]), name


@pytest.mark.parametrize("tokens", [3, FEW_SLOTS + 20])
def test_long_sums_are_as_accurate_as_the_library(tokens: int) -> None:
    """The central step sums 16,384 products."""
    check(MPOShape((64, 256, 1), (1, 3, 8)), torch.float32, tokens, "uniform", None)


@pytest.mark.parametrize(
    "isa",
    [
        pytest.param("generic", marks=pytest.mark.slow),
        *(pytest.param(isa, marks=pytest.mark.exhaustive) for isa in ("avx2", "avx512", "avx512bf16", "amx")),
    ],
)
def test_every_instruction_set_of_this_machine(isa: str) -> None:
    info = "from mpoe_kernels.native_library import NATIVE_LIBRARY as n; i = n.info"
    info += "; print(i['isa_used'], i['isa_detected'])"
    environment = os.environ | {"MPOE_CPU_ISA": isa}
    found = subprocess.run([sys.executable, "-c", info], env=environment, capture_output=True, text=True, check=True)
    used, best = found.stdout.split()
    if used != isa or used == best:
        pytest.skip(f"this machine's best is {best}, what the tests use anyway")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
