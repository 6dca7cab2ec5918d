"""Route, dispatch, combine and their gradients on the emulated CUDA kernels, against the
reference."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mpoe_bench.cases import expert_choice

from mpoe_kernels import Routing
from tests.assertions import refuses
from tests.linear_problem import LAYOUTS
from tests.routing_problem import check_gradients_alone, check_route, check_rows, parts_of

from .emulation import DTYPES, OPS, REFUSED, ROUTING, SCHEDULES, schedule, stats

pytestmark = pytest.mark.usefixtures("registered")
check = partial(check_route, backend="emulated")


@pytest.mark.parametrize("timing", SCHEDULES, ids=lambda timing: "-".join(timing))
@pytest.mark.parametrize("capacity", [None, 30])
@pytest.mark.parametrize("tokens", [90, 700])  # in one launch, in several
def test_route(timing, capacity, tokens):
    index = expert_choice("zipf", tokens, 10, 2)
    mask = torch.rand(tokens) > 0.2
    with schedule(*timing):
        stats()
        check(index, 10, capacity, mask)
        launches = stats()["launches"]
    assert launches == (1 if tokens == 90 else 3 if capacity is None else 6)


@pytest.mark.parametrize("kind", ["uniform", "all_to_one", "some_idle"])
def test_route_distributions(kind):
    for tokens in (1, 31, 513, 1100):
        check(expert_choice(kind, tokens, 5), 5)
        check(expert_choice(kind, tokens, 5, 2), 5, capacity=3)


def test_route_of_no_tokens():
    check(torch.zeros(0, 2, dtype=torch.int64), 3)
    check(torch.zeros(0, 2, dtype=torch.int64), 3, capacity=1)


def test_many_experts():
    for tokens in (20, 600):
        check(torch.randint(0, 300, (tokens, 2)), 300, capacity=2)
    refuses(
        REFUSED,
        "at most 11999 experts; got 12000",
        OPS.route,
        torch.zeros(1, 1, dtype=torch.int64),
        12000,
        None,
        None,
    )


def test_rows_wider_than_a_grid():
    rows = torch.ones(1, 65_535 * 128 + 1)
    index = torch.zeros(1, 1, dtype=torch.int64)
    message = "CUDA takes no grid of 1 x 65536 x 1 blocks"
    refuses(REFUSED, message, OPS.combine, rows, index, None, None)


@pytest.mark.parametrize("tokens", [40, 1200])
def test_indices_out_of_range_count_as_masked(tokens):
    """The op does not check them, because that would wait for the device; memory must stay
    intact."""
    index = torch.randint(0, 4, (tokens, 1))
    mask = torch.rand(tokens) > 0.3
    wild = torch.where(mask[:, None], index, torch.where(index > 1, -5, 4 << 40))
    expected, found = check(index, 4, mask=mask), Routing(*OPS.route(wild, 4, None, None))
    assert all(map(torch.equal, parts_of(found), parts_of(expected)))


@settings(max_examples=40)
@given(
    st.integers(0, 60),
    st.integers(1, 9),
    st.integers(1, 4),
    st.sampled_from([None, 1, 3]),
    st.booleans(),
    st.data(),
)
def test_any_route(tokens, experts, top_k, capacity, masked, data):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    index = torch.randint(0, experts, (tokens, top_k), generator=generator)
    check(
        index, experts, capacity, torch.rand(tokens, generator=generator) > 0.5 if masked else None
    )


@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
@pytest.mark.parametrize("columns", [1, 7, 16, 520, 1040])
@pytest.mark.parametrize("capacity", [None, 2])
def test_rows_and_gradients(dtype, columns, capacity):
    """On aligned, unaligned and strided memory."""
    routing = check(expert_choice("zipf", 9, 4, 2), 4, capacity, torch.arange(9) != 3)
    for place in LAYOUTS.values():
        check_rows(routing, columns, dtype, "emulated", place=place)


def test_each_gradient_alone():
    check_gradients_alone(ROUTING.combine_backward, "emulated")
