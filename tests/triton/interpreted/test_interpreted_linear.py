"""Every strategy of the grouped product, forward and backward, against the float64 reference."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable

import pytest
import torch
from _pytest.mark.structures import ParameterSet
from mpoe_bench.cases import expert_choice, random_blocks
from torch import Tensor

from mpoe_kernels import MPOBlocks, grouped_mpo_linear, mpo_ffn, route
from mpoe_kernels.contract import BlockDims, program_of
from mpoe_kernels.linear.gpu.products import BlockGradients
from mpoe_kernels.linear.triton import configs, gemm_launches
from mpoe_kernels.linear.triton.configs import Tile
from mpoe_kernels.reference import grouped_mpo_linear_reference, mpo_ffn_reference
from mpoe_kernels.testing.launches import recorded
from tests.assertions import assert_calibrated
from tests.cases import SMALL_SHAPES
from tests.linear_problem import NAMES, planned_strategies
from tests.linear_scenarios import LinearScenarios

from .linear_runs import Case, strategies_of

PAIRS = [(name, strategy) for name, shape in SMALL_SHAPES.items() for strategy in strategies_of(shape)]
IN_BFLOAT16 = ("paper", "light", "separable", "padded", "uneven_bonds")
# Some shapes are tested with every strategy, the others with these, which build something and keep it.
OF_EVERY_SHAPE = ("half_left", "rebuild on chip")


def pairs(names: Iterable[str], complete: Container[str]) -> list[ParameterSet]:
    """Shapes and strategies; pairs that are not in the default suite are marked `exhaustive`."""
    return [
        pytest.param(*pair, marks=[] if pair[0] in complete or pair[1] in OF_EVERY_SHAPE else pytest.mark.exhaustive)
        for pair in PAIRS
        if pair[0] in names
    ]


@pytest.mark.parametrize(("name", "strategy"), pairs(SMALL_SHAPES, ("light", "separable")))
def test_float32(name: str, strategy: str) -> None:
    Case(SMALL_SHAPES[name]).check(strategy)


@pytest.mark.parametrize(("name", "strategy"), pairs(IN_BFLOAT16, ("light",)))
def test_bfloat16(name: str, strategy: str) -> None:
    Case(SMALL_SHAPES[name], torch.bfloat16).check(strategy)


class TestScenarios(LinearScenarios):
    problem = Case
    strategies = staticmethod(strategies_of)


@pytest.mark.parametrize("name", [pytest.param("light", marks=pytest.mark.exhaustive), "separable"])
def test_each_gradient_alone_and_the_masked_central_core(name: str) -> None:
    """Against float64, not bit for bit: other products run than for all gradients, in other tiles."""
    shape = SMALL_SHAPES[name]
    case = Case(shape, tokens=3, experts=2, capacity=2)
    truth, same = case.reference(torch.float64)[1:], case.reference(case.dtype)[1:]
    for strategy in strategies_of(shape):
        y, h, z = case.forward(strategy)
        for wanted in (*({k} for k in range(5)), {0, 1, 3, 4}):
            grads = case.backward(strategy, y, h, z, [k in wanted for k in range(5)])
            for k in range(5):
                if k in wanted:
                    assert_calibrated(grads[k], truth[k], same[k], f"{NAMES[k + 1]} ({strategy}, {wanted})")
                else:
                    assert grads[k].numel() == 0


def test_masked_backward_launches_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """The central gradient is not computed and then discarded: it has no launches."""
    case = Case(SMALL_SHAPES["paper"], torch.bfloat16)  # float32 has no fused kernels there
    for strategy in strategies_of(case.shape):
        y, h, z = case.forward(strategy)
        with recorded("sm_90") as all_of_it:
            case.backward(strategy, y, h, z, [True] * 5)
        for wanted in (*({k} for k in range(5)), {0, 1, 3, 4}):
            with recorded("sm_90") as masked:
                case.backward(strategy, y, h, z, [k in wanted for k in range(5)])
            assert len(masked) < len(all_of_it)


def only(tile: Tile, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kernel uses this tile."""
    monkeypatch.setattr(configs, "shipped_tiles", lambda *_: (tile,))


@pytest.mark.parametrize("strategy", [pytest.param("rebuild", marks=pytest.mark.exhaustive), "chain"])
def test_small_tiles_cover_everything(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many tiles in every dimension, distributed over several persistent programs, and several partial sums."""
    only(Tile(16, 16, 16, 1, 1), monkeypatch)
    monkeypatch.setattr(gemm_launches, "persistent_programs", lambda *_: 6)
    Case(SMALL_SHAPES["paper"], tokens=11, experts=2, capacity=None).check(strategy)


@pytest.mark.parametrize(
    ("name", "strategy", "splits"),
    [
        pytest.param("light", "rebuild", 2, marks=pytest.mark.exhaustive),
        ("light", "chain", 5),
        ("separable", "separable", 2),
        pytest.param("padded", "half_right", 2, marks=pytest.mark.exhaustive),
        pytest.param("paper", "rebuild", 5, marks=pytest.mark.exhaustive),
    ],
)
def test_split_sums(name: str, strategy: str, splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """More parts than some experts have rows or a sum has experts; idle experts; the same bits every time."""
    only(Tile(16, 16, 16, 1, 1), monkeypatch)
    monkeypatch.setattr(gemm_launches, "tile_and_splits", lambda *_: (Tile(16, 16, 16, 1, 1), splits))
    case = Case(SMALL_SHAPES[name], torch.bfloat16, tokens=5, experts=3, capacity=3)
    case.check(strategy)
    for first, second in zip(case.run(strategy), case.run(strategy), strict=True):
        assert torch.equal(first, second)


def test_a_gradient_that_grows_by_experts_does_so_in_float32() -> None:
    """A gradient that a single product computes needs no memory besides its own."""
    dims = BlockDims.of_shape(SMALL_SHAPES["paper"])
    blocks = random_blocks(SMALL_SHAPES["paper"], 2, torch.bfloat16)
    tensors = (blocks.left, blocks.central, blocks.right)
    for strategy, dtype in (("rebuild", torch.float32), ("chain", torch.bfloat16)):
        grads = BlockGradients.begun(gemm_launches.LAUNCHES, program_of(dims, strategy, "backward"), tensors)
        assert grads.central is not None
        assert grads.central.dtype == dtype


def test_the_same_bits_every_time() -> None:
    for strategy in ("rebuild", "half_left", "chain"):
        case = Case(SMALL_SHAPES["paper"])
        for first, second in zip(case.run(strategy), case.run(strategy), strict=True):
            assert torch.equal(first, second)


def test_strided_input_and_blocks() -> None:
    shape = SMALL_SHAPES["padded"]
    x = torch.randn(shape.in_features, 5).T
    blocks = random_blocks(shape, 2, torch.float32)
    left = blocks.left.transpose(1, 2).contiguous().transpose(1, 2)
    strided = MPOBlocks(left, blocks.central, blocks.right, shape.in_features, shape.out_features)
    offsets = torch.tensor([0, 2, 5])
    sizes = (shape.in_features, shape.out_features)
    doubles = MPOBlocks(left.double(), blocks.central.double(), blocks.right.double(), *sizes)
    truth = grouped_mpo_linear_reference(x.double(), doubles, offsets)
    same = grouped_mpo_linear_reference(x, blocks, offsets)
    for strategy in planned_strategies(shape):
        assert_calibrated(grouped_mpo_linear(x, strided, offsets, strategy=strategy, backend="triton"), truth, same)


def test_a_gated_network_with_its_gradients() -> None:
    shape = SMALL_SHAPES["separable"]
    routing = route(expert_choice("zipf", 7, 3, 2), 3, capacity=3, backend="eager")
    blocks = [random_blocks(s, 3) for s in (shape, shape.mirrored(), shape)]
    sizes = [(each.in_features, each.out_features) for each in blocks]
    plain = [torch.randn(7, 12), torch.rand(7, 2), torch.randn(10), torch.randn(12)]
    leaves = [*plain, *(t for each in blocks for t in (each.left, each.central, each.right))]

    def results(dtype: torch.dtype, function: Callable[..., Tensor], **options: object) -> list[Tensor]:
        tensors = [t.detach().to(dtype).requires_grad_() for t in leaves]
        x, weights, up_bias, down_bias, *rest = tensors
        up, down, gate = (MPOBlocks(*rest[3 * k : 3 * k + 3], *sizes[k]) for k in range(3))
        biases = {"up_bias": up_bias, "down_bias": down_bias}
        y = function(x, routing, weights, up, down, gate_proj=gate, **biases, activation="silu", **options)
        return [y, *torch.autograd.grad(y.square().sum(), tensors)]

    found = results(torch.float32, mpo_ffn, backend="triton")
    truth, same = results(torch.float64, mpo_ffn_reference), results(torch.float32, mpo_ffn_reference)
    for number, (f, t, s) in enumerate(zip(found, truth, same, strict=True)):
        assert_calibrated(f, t, s, f"result {number}", 4)
