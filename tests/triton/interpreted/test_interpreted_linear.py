"""Every strategy of the grouped product, forward and backward, against the float64 reference."""

from functools import partial

import pytest
import torch
from mpoe_bench.cases import random_blocks
from torch.utils._python_dispatch import TorchDispatchMode

from mpoe_kernels import BackendError, MPOShape, grouped_mpo_linear
from mpoe_kernels.linear.grouped import ON_CHIP
from mpoe_kernels.linear.triton import BY_PRODUCTS, fused_launch, fused_tiles, grouped
from mpoe_kernels.linear.triton.fused_tiles import FusedTile
from mpoe_kernels.linear.triton.grouped import Tile, tiles_of
from mpoe_kernels.testing.launches import recorded
from mpoe_kernels.triton import architecture
from mpoe_kernels.triton.architecture import NO_LIMIT, Target
from tests.assertions import refuses
from tests.cases import SMALL_SHAPES
from tests.linear_problem import KernelProblem, Product, check_ffn, planned_strategies
from tests.linear_scenarios import LinearScenarios


def strategies_of(shape):
    """What the planner may choose, and the fused kernels."""
    return planned_strategies(shape) + ([] if shape.is_separable else [ON_CHIP])


class Case(KernelProblem):
    KERNELS, BACKEND = (
        staticmethod(lambda strategy: fused_launch if strategy == ON_CHIP else BY_PRODUCTS),
        "triton",
    )


class TestScenarios(LinearScenarios):
    problem, of_every_shape = Case, ("separable", ON_CHIP)  # of paper the tests below run them all
    strategies = staticmethod(strategies_of)


class Products(TorchDispatchMode):
    """Counts the library's matrix products."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.count += function in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default)
        return function(*arguments, **(options or {}))


def test_masked_backward_computes_less():
    """The central gradient is not computed and then discarded: it has no launch, or no product of
    the library."""
    case = Case(SMALL_SHAPES["paper"], torch.bfloat16)  # float32 has no fused kernels there
    for strategy in strategies_of(case.shape):
        saved = case.forward(strategy)

        def work(need, strategy=strategy, saved=saved):
            with recorded("sm_90") as launches, Products() as products:
                case.backward(strategy, saved, need)
            return len(launches) + products.count

        complete = work([True] * 5)
        for wanted in (*({k} for k in range(5)), {0, 1, 3, 4}):
            assert work([k in wanted for k in range(5)]) < complete


@pytest.mark.parametrize(
    "name, strategy, activation",
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
def test_many_small_tiles_and_partial_sums(name, strategy, activation, monkeypatch):
    """Several parts of an expert's rows; idle experts; the same bits every time."""
    tile = Tile(16, 16, 16, 1, 1)
    monkeypatch.setattr(grouped, "shipped_tiles", lambda *_: (tile,))
    monkeypatch.setattr(grouped, "BOTH_TILES", {"interpreter": tile})
    monkeypatch.setattr(grouped, "LEAST_STEPS", 1)
    monkeypatch.setattr(architecture, "target_of", lambda _: Target("interpreter", NO_LIMIT, 132))
    case = Case(
        SMALL_SHAPES[name],
        torch.bfloat16,
        23,
        3,
        capacity=19,
        with_bias=False,
        activation=activation,
    )
    case.check(strategy)
    for first, second in zip(case.run(strategy), case.run(strategy), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str
)
@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "gelu_tanh", "silu"])
def test_one_reading_of_rows_gives_both_gradients(activation, dtype):
    """Experts without slots, slots without an expert."""
    given = {"tokens": 11, "experts": 5, "kind": "some_idle", "capacity": 6}
    case = Case(SMALL_SHAPES["separable"], dtype, **given, with_bias=False, activation=activation)
    assert 0 < case.filled < 22
    assert not case.routing.expert_load.all()
    case.check("separable")
    saved = case.forward("separable")
    with recorded("sm_90") as started:
        case.backward("separable", saved, [True] * 4 + [False])
    shared = [one.arguments for one in started if one.arguments.get("da") is not None]
    assert [(one["ACTIVATION"], one["again"] is not None) for one in shared] == [
        (activation, False),
        ("none", True),
    ]


@pytest.mark.parametrize("layout", ["strided", "transposed"])
def test_layouts_of_memory(layout):
    product = Product(SMALL_SHAPES["padded"], tokens=5, experts=2, backend="triton", layout=layout)
    for strategy in planned_strategies(product.shape):
        product.check(strategy)


def test_a_gated_network_with_its_gradients():
    check_ffn("triton", SMALL_SHAPES["separable"], torch.float32, gated=True, tokens=7, experts=3)


def test_placed_on_chip_it_is_no_launch_more():
    case = Case(SMALL_SHAPES["light"], torch.bfloat16, tokens=13, experts=3, top_k=1)
    with recorded("sm_90") as plain:
        case.forward(ON_CHIP, save=False)
    with recorded("sm_90") as placing:
        case.forward(ON_CHIP, save=False, out_index=torch.arange(13), gates=torch.ones(13))
    assert len(plain) == len(placing) == 1
    assert placing[0].arguments["out_index"] is not None


def test_slots_of_tokens_take_the_place_of_a_sort(monkeypatch):
    """Two choices per token, some of them dropped."""
    case = Case(SMALL_SHAPES["separable"], tokens=7, experts=3, top_k=2, capacity=3)
    assert (case.routing.slot_of_token < 0).any()
    saved, case.inverse = case.forward("separable"), False
    sorted_rows = case.backward("separable", saved)
    monkeypatch.setattr(torch.Tensor, "index_put_", lambda *_, **__: pytest.fail("sorts"))
    case.inverse = True
    collected = case.backward("separable", saved)
    for found, wanted in zip(collected, sorted_rows, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strategy", ["rebuild", "chain", None])
@pytest.mark.parametrize("name", ["bias", "row_index", "expert_offsets"])
def test_arguments_that_lie_apart(name, strategy):
    """Every other element of a longer tensor; reading the elements in between would change the
    result."""
    shape = SMALL_SHAPES["light"]
    arguments = {
        "bias": torch.randn(shape.out_features),
        "row_index": torch.tensor([0, 2, 1, 4, 3]),
        "expert_offsets": torch.tensor([0, 2, 5], dtype=torch.int32),
    }
    blocks, x = random_blocks(shape, 2, torch.float32), torch.randn(5, shape.in_features)

    def run(**changed):
        options = {"backend": "triton", "strategy": strategy, "activation": "gelu"}
        return grouped_mpo_linear(x, blocks, **{**arguments, **changed}, **options)

    apart = torch.stack([arguments[name], torch.zeros_like(arguments[name])], 1)[:, 0]
    assert torch.equal(run(**{name: apart}), run())


# ------------------------------------------------------------------ the fused kernels

UNEVEN = MPOShape((5, 3, 3), (3, 2, 6), max_bond=9)  # no powers of two, in both directions


def test_fused_launches():
    """Decoding is one, backward one for each gradient."""
    case = Case(UNEVEN, torch.bfloat16, tokens=4, experts=2, activation="relu")
    saved = case.forward(ON_CHIP)
    with recorded("sm_90") as forward:
        case.forward(ON_CHIP)
    with recorded("sm_90") as backward:
        case.backward(ON_CHIP, saved)
    assert [one.name for one in forward] == ["fused_kernel"]
    found = [one.name for one in backward if one.name in ("fused_kernel", "gradient_kernel")]
    assert found == ["fused_kernel", "gradient_kernel", "gradient_kernel"]


def test_many_small_fused_tiles_and_partial_sums(monkeypatch):
    monkeypatch.setattr(
        fused_tiles, "shipped_fused", lambda *_: (FusedTile(16, 16, 16, 1 << 20, 1, 1),)
    )
    monkeypatch.setattr(
        fused_launch, "parts_of", lambda _, programs, most: max(1, min(16, most, 16 // programs))
    )
    for shape in (UNEVEN, UNEVEN.mirrored()):
        Case(shape, tokens=20, experts=2, capacity=None, top_k=1).check(ON_CHIP)


# ------------------------------------------------------------------ what cannot be computed


def with_shared_memory(size, monkeypatch, name="interpreter"):
    monkeypatch.setattr(architecture, "target_of", lambda _: Target(name, size, 1))


def test_a_dtype_or_a_device_without_a_kernel(monkeypatch):
    def run(dtype):
        blocks, offsets = (
            random_blocks(SMALL_SHAPES["light"], 2, dtype),
            torch.tensor([0, 1, 3]).int(),
        )
        grouped_mpo_linear(torch.ones(3, 12, dtype=dtype), blocks, offsets, backend="triton")

    refuses(
        BackendError,
        "linear: it computes in float32, bfloat16, float16, not in float64$",
        run,
        torch.float64,
    )
    with_shared_memory(1024, monkeypatch)
    smallest = r"its smallest tile needs \d+ bytes of shared memory; the device has 1024"
    refuses(BackendError, smallest, run, torch.float32)


def test_what_a_fused_tile_asks_of_a_program():
    """By hand, for a W of two tiles of 32 x 32."""
    sides = fused_tiles.Sides((4, 1, 8), (8, 1, 8), 5, 20)  # the bonds become 16 and 32
    extents = fused_tiles.Cut(4, 8, 4, 8)
    tile = FusedTile(16, 32, 32, 2048, 4, 2)
    needs = partial(fused_tiles.Needs.of, sides, extents, tile, 2)
    assert needs("rows") == (9216, 2048, 2 * 278_528)
    assert needs("gradient") == (9216, 2048, 2 * 229_376)


def test_as_many_parts_as_there_may_be(monkeypatch):
    monkeypatch.setattr(architecture, "target_of", lambda _: Target("interpreter", NO_LIMIT, 132))
    assert fused_launch.parts_of(None, programs=1, most=2) == 2


def test_tiles_that_do_not_fit_are_passed_over(monkeypatch):
    like = torch.empty(1, dtype=torch.bfloat16)
    with_shared_memory(163 << 10, monkeypatch, "sm_80")
    assert [tile.rows for tile in tiles_of(like, 4096, 4096, 4096, False)] == [128, 64]
    with_shared_memory(80 << 10, monkeypatch, "sm_80")
    smaller = tiles_of(like, 4096, 4096, 4096, False)
    assert max(tile.shared_bytes(like.dtype) for tile in smaller) <= 80 << 10
    assert [tile.rows for tile in smaller] == [64, 32]
    assert (smaller[0].columns, smaller[0].inner) == (128, 64)
    interleaved = tiles_of(like, 4096, 4096, 4096, True)[0]
    assert (interleaved.columns, interleaved.inner) == (64, 32)
