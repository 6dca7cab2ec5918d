"""The fused chain by the CUDA kernels, forward and backward, against the float64 reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpoe_kernels import MPOShape
from tests.assertions import refuses
from tests.cases import SMALL_SHAPES, pairwise
from tests.linear_problem import KernelProblem
from tests.linear_scenarios import LinearScenarios

from .emulation import KERNELS, SCHEDULE_PARTS, library, schedule, stats

ALL = [True] * 5
# Sizes that are multiples of 16 bytes: asynchronous copies, several tiles, several steps of every
# pipeline.
WIDE = {
    "light": MPOShape((8, 2, 8), (4, 3, 8)),
    "bond_24": MPOShape((16, 8), (8, 16), max_bond=24, central=1),
    "separable": MPOShape((16, 16, 1), (1, 16, 16)),
    "bond_72": MPOShape((16, 8), (16, 8), max_bond=72, central=1),  # more than are summed at once
    "runs": MPOShape(
        (2, 2, 80), (2, 2, 96), max_bond=16, central=1
    ),  # digits of right in several tiles
}


class Case(KernelProblem):
    KERNELS, BACKEND = staticmethod(lambda _: KERNELS), "eager"  # which adds up rows by token

    def __post_init__(self):
        library()
        super().__post_init__()
        self.grad[self.filled :] = torch.nan  # slots without an expert: never read


class TestScenarios(LinearScenarios):
    problem = Case
    of_every_shape = ("rebuild",)
    strategies = staticmethod(lambda _: ["rebuild"])


@pytest.mark.parametrize("name", ["light", "separable"])
def test_float16(name):
    Case(SMALL_SHAPES[name], torch.float16).check("rebuild")


@pytest.mark.parametrize("name, dtype", pairwise(list(WIDE), [torch.bfloat16, torch.float32]))
def test_asynchronous_copies(name, dtype):
    case = Case(WIDE[name], dtype, tokens=48, experts=2, capacity=None, activation="relu")
    stats()
    case.check("rebuild")
    counted = stats()
    assert counted["cp_async"] > 0
    # Rows of a tile start in different banks: four wavefronts per load of four matrices.
    assert counted["wavefronts"] == 4 * counted["ldmatrix"]
    assert (counted["ldmatrix"] > 0) == (dtype != torch.float32)


@pytest.mark.parametrize(
    "order, copies, dtype", pairwise(*SCHEDULE_PARTS, [torch.float32, torch.bfloat16])
)
def test_schedules(order, copies, dtype):
    with schedule(order, copies):
        for name in ("light", "separable"):
            Case(WIDE[name], dtype, tokens=40, experts=2).check("rebuild")
            Case(SMALL_SHAPES[name], dtype).check("rebuild")


def test_random_schedule():
    for seed in range(3):
        with schedule("random", "lazy", seed):
            Case(SMALL_SHAPES["light"], torch.bfloat16).check("rebuild")


@pytest.mark.parametrize("columns", [64, 128])
def test_rows_in_several_tiles(columns):
    """One block computes 128 rows and either number of columns."""
    shape = MPOShape((16, 4), (16, columns // 8), max_bond=32, central=1)
    case = Case(
        shape, torch.bfloat16, tokens=150, experts=1, top_k=1, capacity=None, activation="none"
    )
    case.check("rebuild")


@pytest.mark.parametrize("name", ["left", "central", "right"])
def test_a_block_that_is_too_large_is_named(name):
    blocks = dict.fromkeys(["left", "central", "right"], torch.ones(1, 1, 1, 1))
    blocks[name] = torch.ones(1).expand(1, 1 << 15, 1 << 15, 1)
    row = torch.ones(1, 1)
    offsets = torch.tensor([0, 1], dtype=torch.int32)
    library()
    refuses(
        ValueError,
        rf"^{name} must have less than 2\^30 elements; got 1073741824",
        KERNELS.ops.rebuilt_product,
        *(row, *blocks.values(), row, offsets, None, None, "none", None, False),
    )


def test_grids_that_cuda_cannot_launch():
    library()
    experts = 65_536
    half = torch.ones(experts, 1, 1, 1, 1, 1)
    right = torch.ones(experts, 1, 1, 1)
    rows = torch.ones(experts, 1)
    offsets = torch.arange(experts + 1, dtype=torch.int32)
    refuses(
        ValueError,
        "CUDA takes no grid of 1 x 1 x 65536 blocks",
        KERNELS.ops.weight_gradient_product,
        *(rows, rows, right, half, offsets, None, False),
    )
    columns = 32_768  # a tile each, as they are central's
    central = torch.ones(1, 1, columns, 1)
    out = torch.ones(1, 1).expand(experts, columns)
    refuses(
        ValueError,
        "CUDA takes no grid of 2181038080 x 1 x 1 blocks",
        KERNELS.ops.rebuilt_product,
        *(rows, right, central, right, out, offsets, None, None, "none", None, False),
    )


def test_what_is_not_needed_is_not_computed():
    case = Case(SMALL_SHAPES["light"])
    saved = case.forward("rebuild")
    counts = []
    for need in (
        ALL,
        [True, True, False, True, True],
        *([k == needed for k in range(5)] for needed in range(5)),
    ):
        stats()
        case.backward("rebuild", saved, need)
        counts.append(stats()["launches"])
    assert max(counts[1:]) <= counts[0]
    assert max(counts[2:]) < counts[0]


def test_launches():
    """Forward one, whatever follows the product or is saved; backward one for x, left and central,
    and right each."""
    case = Case(WIDE["light"], experts=2, activation="gelu", gathered=False)
    stats()
    saved = case.forward("rebuild")
    assert stats()["launches"] == 1
    case.backward("rebuild", saved)
    assert stats()["launches"] == 3


def test_the_same_bits_on_every_schedule():
    for name in ("paper", "separable"):
        case = Case(SMALL_SHAPES[name], torch.bfloat16, with_bias=False)
        first = case.run("rebuild")
        with schedule("descending", "eager"):
            second = case.run("rebuild")
        assert all(torch.equal(p, q) for p, q in zip(first, second, strict=True)), name


@settings(max_examples=25)
@given(st.data())
def test_any_small_shape(data):
    count = data.draw(st.integers(1, 4))
    factors = st.lists(st.integers(1, 4), min_size=count, max_size=count)
    shape = MPOShape(
        tuple(data.draw(factors)),
        tuple(data.draw(factors)),
        central=data.draw(st.integers(0, count - 1)),
        max_bond=data.draw(st.sampled_from([None, 1, 2, 5])),
    )
    experts = data.draw(st.integers(1, 4))
    Case(
        shape,
        data.draw(st.sampled_from([torch.float32, torch.bfloat16])),
        tokens=data.draw(st.integers(0, 9)),
        experts=experts,
        top_k=data.draw(st.integers(1, min(2, experts))),
        capacity=data.draw(st.sampled_from([None, 2])),
        activation=data.draw(st.sampled_from(["none", "silu"])),
    ).check("rebuild", factor=3)
