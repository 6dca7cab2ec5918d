"""Every strategy of the grouped product, forward and backward, against the float64 reference."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from typing import Any

import pytest
import torch
from _pytest.mark.structures import ParameterSet
from mpoe_bench.cases import expert_choice, random_blocks
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mpoe_kernels import MPOBlocks, grouped_mpo_linear, mpo_ffn, route
from mpoe_kernels.linear import grouped as common
from mpoe_kernels.linear.triton import grouped
from mpoe_kernels.linear.triton.grouped import Tile
from mpoe_kernels.reference import grouped_mpo_linear_reference, mpo_ffn_reference
from mpoe_kernels.testing.launches import recorded
from mpoe_kernels.triton import architecture
from mpoe_kernels.triton.architecture import NO_LIMIT, Target
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


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param("light", torch.float32, marks=pytest.mark.exhaustive),
        ("separable", torch.float32),
        ("separable", torch.bfloat16),
    ],
)
def test_each_gradient_alone_and_the_masked_central_core(name: str, dtype: torch.dtype) -> None:
    """Against float64, not bit for bit: other products run than for all gradients, in other tiles."""
    shape = SMALL_SHAPES[name]
    case = Case(shape, dtype, tokens=3, experts=2, capacity=2)
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


class Products(TorchDispatchMode):
    """Counts the library's matrix products."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.count += function in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default)
        return function(*arguments, **(options or {}))


def test_masked_backward_computes_less() -> None:
    """The central gradient is not computed and then discarded: it has no launch, or no product of the library."""
    case = Case(SMALL_SHAPES["paper"], torch.bfloat16)  # float32 has no fused kernels there
    for strategy in strategies_of(case.shape):
        y, h, z = case.forward(strategy)

        def work(need: list[bool], strategy=strategy, saved=(y, h, z)) -> int:
            with recorded("sm_90") as launches, Products() as products:
                case.backward(strategy, *saved, need)
            return len(launches) + products.count

        complete = work([True] * 5)
        for wanted in (*({k} for k in range(5)), {0, 1, 3, 4}):
            assert work([k in wanted for k in range(5)]) < complete


@pytest.mark.parametrize(
    ("name", "strategy", "activation"),
    [
        pytest.param("light", "rebuild", "gelu", marks=pytest.mark.exhaustive),
        ("light", "chain", "relu"),
        ("separable", "separable", "relu"),
        ("separable_mirrored", "separable", "silu"),
        pytest.param("separable", "separable", "gelu_tanh", marks=pytest.mark.slow),
        pytest.param("padded", "half_right", "gelu", marks=pytest.mark.exhaustive),
        pytest.param("paper", "rebuild", "gelu", marks=pytest.mark.exhaustive),
    ],
)
def test_many_small_tiles_and_partial_sums(
    name: str, strategy: str, activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several parts of an expert's rows; idle experts; the same bits every time."""
    tile = Tile(16, 16, 16, 1, 1)
    monkeypatch.setattr(grouped, "shipped_tiles", lambda *_: (tile,))
    monkeypatch.setattr(grouped, "BOTH_TILES", {"interpreter": tile})
    monkeypatch.setattr(grouped, "LEAST_STEPS", 1)
    monkeypatch.setattr(architecture, "target_of", lambda _: Target("interpreter", NO_LIMIT, 132))
    case = Case(SMALL_SHAPES[name], torch.bfloat16, 23, 3, capacity=19, with_bias=False, activation=activation)
    case.check(strategy)
    for first, second in zip(case.run(strategy), case.run(strategy), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "gelu_tanh", "silu"])
def test_one_reading_of_rows_gives_both_gradients(activation: str, dtype: torch.dtype) -> None:
    """Experts without slots, slots without an expert."""
    given: dict[str, Any] = {"tokens": 11, "experts": 5, "kind": "some_idle", "capacity": 6}
    case = Case(SMALL_SHAPES["separable"], dtype, **given, with_bias=False, activation=activation)
    assert 0 < case.filled < 22
    assert not case.routing.expert_load.all()
    case.check("separable")
    y, h, z = case.forward("separable")
    with recorded("sm_90") as started:
        case.backward("separable", y, h, z, [True] * 4 + [False])
    shared = [one.arguments for one in started if one.arguments.get("da") is not None]
    assert [(one["ACTIVATION"], one["again"] is not None) for one in shared] == [(activation, False), ("none", True)]


@pytest.mark.parametrize("name", ["separable", "separable_mirrored"])
def test_a_nan_row_spoils_no_other_row_and_no_other_expert_s_block(name: str) -> None:
    case = Case(SMALL_SHAPES[name], torch.bfloat16, 9, 2, 1, "uniform", None, activation="relu", with_bias=False)
    slot, owner, other = int(case.routing.expert_offsets[1]), 1, 0  # in one tile with the other expert's rows before it
    token = int(case.routing.token_of_slot[slot])
    clean = case.run("separable")
    case.x[token] = torch.nan
    _, dx, dleft, dcentral, dright = case.run("separable")
    others = torch.arange(9) != token
    assert torch.equal(dx[others], clean[1][others])
    for found, wanted in ((dleft, clean[2]), (dright, clean[4])):
        assert torch.equal(found[other], wanted[other])
        assert found[owner].isnan().any()
    assert dcentral.isnan().any()


@pytest.mark.parametrize("strategy", strategies_of(SMALL_SHAPES["paper"]))
def test_a_nan_row_stays_its_token_s(strategy: str) -> None:
    """Beside other rows of its expert, in one tile; in x and in the gradient of y."""
    case = Case(SMALL_SHAPES["paper"], tokens=9, experts=2, top_k=1, capacity=None, activation="silu")
    case.x[3], token = torch.nan, 3
    slot = int(case.slot_of_token[token, 0])
    y, h, z = case.forward(strategy)
    assert y[slot].isnan().all()
    assert y[[s for s in range(9) if s != slot]].isfinite().all()
    dx = case.backward(strategy, y, h, z, [True, False, False, False, False])[0]
    assert dx[[t for t in range(9) if t != token]].isfinite().all()


@pytest.mark.parametrize("strategy", ["rebuild", "rebuild on chip", "half_left"])
def test_experts_by_parts(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of two experts at a time, then of the third."""
    monkeypatch.setattr(common, "experts_at_once", lambda *_, **__: 2)
    Case(SMALL_SHAPES["padded"], activation="silu").check(strategy)


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
