"""Products by PyTorch's grouped GEMMs, as a GPU would run them, compared with the float64 reference."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from mpoe_kernels import MPOShape
from mpoe_kernels.contract import ALL_GRADIENTS, contraction
from mpoe_kernels.contract.orders import INDICES, BlockDims
from mpoe_kernels.linear import grouped
from mpoe_kernels.linear.eager import candidates
from mpoe_kernels.linear.eager.library import Library
from mpoe_kernels.linear.op import BackwardCall, ForwardCall
from tests.cases import SMALL_SHAPES
from tests.linear_problem import LinearProblem

NAMES = ("paper", "light", "separable", "separable_mirrored", "padded", "uneven_bonds", "one_core", "centre_last")
CASES = [
    (name, strategy)
    for name in NAMES
    for strategy in ("rebuild", "half_left", "half_right", "chain", "separable")
    if strategy != "separable" or name.startswith("separable")
]
ALL = [True] * 5


@dataclass
class Problem(LinearProblem):
    """Six experts, some of them idle; some slots come after the last expert's.

    Attributes:
        inverse: whether the backward is told which slots read a token.
    """

    tokens: int = 9
    experts: int = 6
    kind: str = "some_idle"
    activation: str = "none"
    inverse: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.idle = [e for e, load in enumerate(self.routing.expert_offsets.diff().tolist()) if not load]
        self.grad[self.filled :] = 0

    def results(self, strategy: str, need: list[bool] = ALL) -> tuple[Tensor, tuple[Tensor, ...]]:
        left, central, right = (block.clone() for block in self.blocks)
        for t in (left, right):  # an idle expert's blocks must never be read
            t[self.idle] = torch.nan
        common = (
            *(self.x, left, central, right, self.routing.expert_offsets, self.bias, self.row_index),
            *(*self.sizes, self.activation, strategy, "auto"),
        )
        library = Library()
        y, h, z = grouped.forward(ForwardCall(*common, save=True), library)
        saved, slots = y if self.activation == "relu" else z, self.slot_of_token if self.inverse else None
        call = BackwardCall(*common, grad=self.grad, h=h, saved=saved, need=need, slot_of_token=slots)
        return y, grouped.backward(call, library)

    def run(self, strategy: str, backward_strategy: str | None = None) -> list[Tensor]:
        y, gradients = self.results(strategy)
        return [y, *gradients]


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(("name", "strategy"), CASES)
def test_results_and_gradients(name: str, strategy: str, inverse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With weights of all experts at once, or, where weights are built, of two at a time."""
    if inverse and strategy not in ("chain", "separable"):
        monkeypatch.setattr("mpoe_kernels.linear.grouped.experts_at_once", lambda *_, **__: 2)
    Problem(SMALL_SHAPES[name], gathered=inverse, inverse=inverse).check(strategy, factor=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
def test_activations(activation: str, dtype: torch.dtype) -> None:
    Problem(SMALL_SHAPES["paper"], dtype, activation=activation).check("half_left", factor=4)


@pytest.mark.parametrize("alone", range(5))
def test_each_gradient_alone(alone: int) -> None:
    problem = Problem(SMALL_SHAPES["light"], activation="relu", gathered=False)
    need = [place == alone for place in range(5)]
    _, gradients = problem.results("chain", need)
    assert [g.numel() > 0 for g in gradients] == need
    assert torch.equal(gradients[alone], problem.results("chain")[1][alone])


def test_no_slots() -> None:
    Problem(SMALL_SHAPES["separable"], tokens=0).check("separable")


def test_a_nan_row_stays_its_token_s() -> None:
    problem = Problem(SMALL_SHAPES["light"], gathered=False, activation="silu")
    problem.x[2] = torch.nan
    y, (dx, *_) = problem.results("chain")
    assert y[2].isnan().all()
    others = [row for row in range(len(y)) if row != 2]
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


@pytest.mark.parametrize("experts", [2, 8, 64])
@pytest.mark.parametrize("built", [("LC", "W"), ("CR", "W"), ("LC",), ("CR",)])
def test_what_is_built_and_its_copy_fit_two_weights_or_a_quarter(built: tuple[str, ...], experts: int) -> None:
    for bond in (16, 64, None):
        dims = BlockDims.of_shape(MPOShape.paper(768, 3072, max_bond=bond))
        at_once = grouped.experts_at_once(dims, built, experts)
        taken = 2 * at_once * max(dims.elements(INDICES[name]) for name in built)
        assert at_once == 1 or taken <= max(2, experts // 4) * dims.weight_elements
    assert grouped.experts_at_once(dims, (), experts) == experts
