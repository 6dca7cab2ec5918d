"""Products by PyTorch's grouped GEMMs, as a GPU would run them, compared with the float64 reference."""

from __future__ import annotations

import pytest
import torch
from mpoe_bench.cases import random_blocks, relative_error
from torch import Tensor

from mpoe_kernels import MPOBlocks, MPOShape
from mpoe_kernels.contract import ALL_GRADIENTS, contraction
from mpoe_kernels.contract.orders import INDICES, BlockDims
from mpoe_kernels.linear import grouped
from mpoe_kernels.linear.eager import candidates
from mpoe_kernels.linear.eager.library import Library
from mpoe_kernels.linear.eager.rows import Named, select_experts
from mpoe_kernels.linear.op import BackwardCall, ForwardCall
from mpoe_kernels.reference import grouped_mpo_linear_reference
from tests.cases import SMALL_SHAPES

PARTS = ("left", "central", "right")
CASES = [
    (name, strategy)
    for name in (
        "paper",
        "light",
        "separable",
        "separable_mirrored",
        "padded",
        "uneven_bonds",
        "one_core",
        "centre_last",
    )
    for strategy in ("rebuild", "half_left", "half_right", "chain", "separable")
    if strategy != "separable" or name.startswith("separable")
]


class Problem:
    """Six experts, two of them idle; some slots come after the last expert's."""

    slots: Tensor | None = None

    def __init__(self, name: str, dtype: torch.dtype, gather: bool, activation: str = "none") -> None:
        torch.manual_seed(0)
        shape, self.experts, self.activation = SMALL_SHAPES[name], 6, activation
        self.offsets = torch.tensor([0, 4, 4, 7, 15, 15, 17], dtype=torch.int32)
        self.blocks = random_blocks(shape, self.experts, dtype)
        self.index = torch.randint(0, 9, (20,)) if gather else None
        self.x = torch.randn(9 if gather else 20, shape.in_features).to(dtype)
        self.bias = torch.randn(shape.out_features).to(dtype)
        self.grad = torch.randn(20, shape.out_features).to(dtype)
        self.grad[17:] = 0

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.x, *(getattr(self.blocks, name).detach() for name in PARTS), self.bias)

    def truth(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        x, left, central, right, bias = (t.detach().double().requires_grad_() for t in self.tensors())
        blocks = MPOBlocks(left, central, right, self.blocks.in_features, self.blocks.out_features)
        activation = None if self.activation == "none" else self.activation
        y = grouped_mpo_linear_reference(x, blocks, self.offsets, bias, row_index=self.index, activation=activation)
        return y, torch.autograd.grad(y, (x, left, central, right, bias), self.grad.double())

    def results(self, strategy: str, need: tuple[bool, ...] = (True,) * 5) -> tuple[Tensor, tuple[Tensor, ...]]:
        x, left, central, right, bias = self.tensors()
        for t in (left, right):  # an idle expert's blocks must never be read
            t[[1, 4]] = torch.nan
        common = (
            *(x, left, central, right, self.offsets, bias, self.index),
            *(self.blocks.in_features, self.blocks.out_features, self.activation, strategy, "auto"),
        )
        library = Library()
        y, h, z = grouped.forward(ForwardCall(*common, save=True), library)
        saved = y if self.activation == "relu" else z
        call = BackwardCall(*common, grad=self.grad, h=h, saved=saved, need=list(need), slot_of_token=self.slots)
        return y, grouped.backward(call, library)


def inverse(index: Tensor, tokens: int) -> Tensor:
    """The slots that read each row, padded with -1 to the largest number of slots."""
    lists = [(index == token).nonzero()[:, 0].tolist() for token in range(tokens)]
    most = max(map(len, lists))
    return torch.tensor([found + [-1] * (most - len(found)) for found in lists])


def close(result: Tensor, truth: Tensor, dtype: torch.dtype) -> bool:
    return relative_error(result.double(), truth) <= (0.05 if dtype == torch.bfloat16 else 2e-6)


def test_slots_of_tokens_give_the_same_gradient_of_x() -> None:
    problem = Problem("light", torch.float32, gather=True)
    _, gradients = problem.results("chain")
    problem.slots = inverse(problem.index, 9)
    assert problem.slots.shape[1] > 1
    assert close(problem.results("chain")[1][0], gradients[0].double(), torch.float32)
    problem.index = torch.arange(20).roll(3)
    problem.x = torch.randn(20, problem.x.shape[1])
    problem.slots = problem.index.argsort()[:, None]
    assert close(problem.results("chain")[1][0], problem.truth()[1][0], torch.float32)


@pytest.mark.parametrize(
    ("name", "strategy", "experts_at_once"),
    [(*case, None) for case in CASES] + [(*case, 2) for case in CASES if case[1] not in ("chain", "separable")],
)
def test_results_and_gradients(name: str, strategy: str, experts_at_once: int | None, monkeypatch) -> None:
    """All experts at once, and, where weights are built, two at a time."""
    if experts_at_once is not None:
        monkeypatch.setattr("mpoe_kernels.linear.grouped.experts_at_once", lambda *_, **__: experts_at_once)
    problem = Problem(name, torch.float32, gather=experts_at_once is not None)
    y, gradients = problem.results(strategy)
    truth, exact = problem.truth()
    assert close(y, truth, torch.float32)
    assert y[17:].eq(0).all()
    for found, wanted in zip(gradients, exact, strict=True):
        assert found.shape == wanted.shape
        assert close(found, wanted, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
def test_activations(activation: str, dtype: torch.dtype) -> None:
    if activation == "relu" and dtype == torch.bfloat16:
        activation = "none"  # with so few rows, one value rounded to the other side of zero is a large error
    problem = Problem("paper", dtype, gather=True, activation=activation)
    y, gradients = problem.results("half_left")
    truth, exact = problem.truth()
    assert close(y, truth, dtype)
    for found, wanted in zip(gradients[1:], exact[1:], strict=True):
        assert close(found, wanted, dtype)


@pytest.mark.parametrize("alone", range(5))
def test_each_gradient_alone(alone: int) -> None:
    problem = Problem("light", torch.float32, gather=False, activation="relu")
    need = tuple(place == alone for place in range(5))
    _, gradients = problem.results("chain", need)
    assert [g.numel() > 0 for g in gradients] == list(need)
    assert close(gradients[alone], problem.truth()[1][alone], torch.float32)


def test_no_slots() -> None:
    problem = Problem("separable", torch.float32, gather=False)
    problem.x, problem.grad = problem.x[:0], problem.grad[:0]
    problem.offsets = torch.zeros(7, dtype=torch.int32)
    y, gradients = problem.results("separable")
    assert y.shape == (0, problem.blocks.out_features)
    assert all(g.eq(0).all() for g in gradients)


def test_the_same_bits_every_time() -> None:
    first, second = (Problem("paper", torch.bfloat16, gather=True).results("rebuild") for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(one, other) for one, other in zip(first[1], second[1], strict=True))


def test_a_nan_row_stays_its_token_s() -> None:
    problem = Problem("light", torch.float32, gather=False, activation="silu")
    problem.x[5] = torch.nan
    y, (dx, *_) = problem.results("chain")
    assert y[5].isnan().all()
    others = [row for row in range(20) if row != 5]
    assert y[others].isfinite().all()
    assert dx[others].isfinite().all()


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_on_a_gpu_eager_offers_them_where_they_do_not_wait(phase: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under separate names; PyTorch has a kernel for bfloat16 and two generations of GPUs."""
    dims, card = BlockDims.of_shape(SMALL_SHAPES["separable"]), {"capability": (9, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: card["capability"])

    def offered(strategy: str, dtype: torch.dtype, device: str) -> list[tuple[str, bool]]:
        plan = contraction(strategy, dims, 8, 64, dtype, phase, ALL_GRADIENTS, device)
        return [(candidate.name, candidate.waits) for candidate in candidates(plan)]

    for strategy in ("separable", "rebuild"):
        alone, able = [(strategy, True)], (f"{strategy} by grouped GEMMs", False)
        for card["capability"] in ((9, 0), (10, 0)):
            assert offered(strategy, torch.bfloat16, "cuda:0") == [*alone, able]
            assert offered(strategy, torch.float32, "cuda:0") == offered(strategy, torch.bfloat16, "cpu") == alone
        for card["capability"] in ((8, 0), (8, 9), (12, 0)):
            assert offered(strategy, torch.bfloat16, "cuda:0") == alone
    monkeypatch.setattr(torch.version, "hip", "6.4")
    card["capability"] = (9, 4)
    assert offered("rebuild", torch.bfloat16, "cuda:0") == [("rebuild", True)]


@pytest.mark.parametrize(("first", "second"), [(("iL",), ("jL", "a")), (("a",), ("iL", "jL")), (("jL",), ("iL", "a"))])
def test_scattered_experts_are_taken_from_the_stack(first: tuple[str, ...], second: tuple[str, ...]) -> None:
    """They are copied only where a GEMM cannot read the blocks as they are: with the middle axis alone on one side."""
    stacked = torch.randn(5, 3, 2, 4)
    named = Named(stacked, ("iL", "jL", "a"), [0, 2, 3])
    for expert, block in zip((0, 2, 3), named.each(first, second), strict=True):
        assert torch.equal(block, Named(stacked[expert : expert + 1], named.axes).matrices(first, second)[0])
        is_view = block.untyped_storage().data_ptr() == stacked.untyped_storage().data_ptr()
        assert is_view == (first != ("jL",))
    assert torch.equal(named.alone().data, stacked[[0, 2, 3]])


@pytest.mark.parametrize(("experts", "is_view"), [([2], True), ([1, 2, 3], True), ([0, 2, 3], False), ([1, 3], False)])
def test_consecutive_experts_are_not_copied(experts: list[int], is_view: bool) -> None:
    stacked = torch.randn(5, 3)
    found = select_experts(stacked, experts)
    assert torch.equal(found, stacked[experts])
    assert (found.untyped_storage().data_ptr() == stacked.untyped_storage().data_ptr()) == is_view


@pytest.mark.parametrize("experts", [2, 8, 64])
@pytest.mark.parametrize("built", [("LC", "W"), ("CR", "W"), ("LC",), ("CR",)])
def test_what_is_built_and_its_copy_fit_two_weights_or_a_quarter(built: tuple[str, ...], experts: int) -> None:
    for bond in (16, 64, None):
        dims = BlockDims.of_shape(MPOShape.paper(768, 3072, max_bond=bond))
        at_once = grouped.experts_at_once(dims, built, experts)
        taken = 2 * at_once * max(dims.elements(INDICES[name]) for name in built)
        assert at_once == 1 or taken <= max(2, experts // 4) * dims.weight_elements
    assert grouped.experts_at_once(dims, (), experts) == experts
