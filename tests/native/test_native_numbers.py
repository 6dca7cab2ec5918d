"""What the native library computes: the chain's order, few rows of hidden experts, rounding to two
bytes, widths of integers."""

from dataclasses import fields, replace
from itertools import permutations

import pytest
import torch
from mpoe_bench.cases import random_blocks
from torch.testing import assert_close

from mpoe_kernels import MPOShape, Routing, combine, dispatch, route
from mpoe_kernels.contract import BlockDims, Contraction
from mpoe_kernels.linear import native
from mpoe_kernels.linear.native import AROUND_PRODUCT, linear_backward, linear_forward
from mpoe_kernels.linear.op import BackwardCall, LinearCall
from tests.cases import in_half_precision, in_two_dtypes, named_cases
from tests.expert_problems import HiddenProblem

from .calls import forward_call


@pytest.fixture
def fresh_sizes():
    """The library's sizes are made anew, and not kept for another test."""
    native._sizes.cache_clear()
    yield
    native._sizes.cache_clear()


@pytest.mark.usefixtures("fresh_sizes")
@pytest.mark.parametrize("order", list(permutations("LCR")), ids="".join)
def test_a_chain_takes_the_order_that_it_is_given(order, monkeypatch):
    """The planner decides; every other order has bits of its own."""
    shape = MPOShape((3, 4, 5), (5, 3, 4), max_bond=7)
    blocks = random_blocks(shape, 2, torch.float32)
    call = forward_call(
        x=torch.randn(3, 60),
        left=blocks.left,
        central=blocks.central,
        right=blocks.right,
        in_features=60,
        out_features=60,
        strategy="chain",
        save=False,
    )
    planned, *_ = linear_forward(call)
    planned_order = BlockDims.of_shape(shape).chain_order
    native._sizes.cache_clear()
    monkeypatch.setattr(BlockDims, "chain_order", order)
    y, *_ = linear_forward(call)
    assert_close(y, planned)
    if order == planned_order:
        assert torch.equal(y, planned)
    else:
        assert not torch.equal(y, planned)


PRODUCT_SHAPES = {
    "few rows of t": MPOShape.separable(96, 200),
    "padded sides": MPOShape((8, 13, 1), (1, 7, 10), max_bond=6, in_features=100, out_features=68),
}


def separable_calls(shape, dtype, counts, activation):
    """A forward that saves, and the backward of its results for given needs."""
    torch.manual_seed(0)
    experts = len(counts)
    blocks = random_blocks(shape, experts, dtype)
    slots = sum(counts) + 2  # two belong to no expert
    tokens = slots + 1
    forward = forward_call(
        x=torch.randn(tokens, shape.in_features, dtype=dtype),
        left=blocks.left,
        central=blocks.central,
        right=blocks.right,
        expert_offsets=torch.tensor([0, *counts]).cumsum(0),
        bias=torch.randn(shape.out_features, dtype=dtype),
        row_index=torch.randint(tokens, (slots,)),
        in_features=shape.in_features,
        out_features=shape.out_features,
        activation=activation,
    )
    shared = {field.name: getattr(forward, field.name) for field in fields(LinearCall)}
    grad = torch.randn(slots, shape.out_features, dtype=dtype)

    def backward(need):
        y, h, z = linear_forward(forward)
        saved = y if activation == "relu" else z
        return BackwardCall(**shared, grad=grad, h=h, saved=saved, need=need)

    return forward, backward


@in_two_dtypes
@pytest.mark.parametrize("shape", PRODUCT_SHAPES.values(), ids=PRODUCT_SHAPES)
@pytest.mark.parametrize("counts", [(0, 150, 1, 40), (0, 0), (3,)], ids=str)
def test_the_product_with_central_may_be_pytorchs(shape, counts, dtype):
    forward, backward = separable_calls(shape, dtype, counts, "gelu")
    expected = linear_forward(forward)
    found = linear_forward(forward, around_product=True)
    # sums over slots in another order
    tolerance = 0.02 if dtype == torch.bfloat16 else 1e-4
    close = {"rtol": tolerance, "atol": tolerance}
    for name, values, wanted in zip(("y", "h", "z"), found, expected, strict=True):
        assert_close(values, wanted, **close, msg=f"{name}: ".__add__)
    plain = linear_forward(replace(forward, save=False), around_product=True)
    assert torch.equal(plain[0], found[0])
    assert plain[1].numel() == 0
    for wanted_gradient in (range(5), [0], [1], [2], [3], [0, 2]):
        need = [position in wanted_gradient for position in range(5)]
        expected = linear_backward(backward(need))
        found = linear_backward(backward(need), around_product=True)
        for position, (values, wanted) in enumerate(zip(found, expected, strict=True)):
            case = f"{need}, gradient {position}: "
            assert_close(values, wanted, **close, msg=case.__add__)


def test_the_product_with_central_is_a_candidate_of_whole_units():
    def names(shape, dtype):
        plan = Contraction("separable", BlockDims.of_shape(shape), 2, 64, dtype, "forward")
        return [candidate.name for candidate in native.candidates(plan)]

    odd = MPOShape((4, 3, 1), (1, 5, 2), max_bond=3)
    even = PRODUCT_SHAPES["padded sides"]
    assert names(odd, torch.float32) == ["separable", AROUND_PRODUCT]
    assert names(even, torch.bfloat16) == ["separable", AROUND_PRODUCT]
    assert names(odd, torch.bfloat16) == ["separable"]


def test_the_product_with_central_knows_neither_gradients_nor_autocast():
    forward, _ = separable_calls(PRODUCT_SHAPES["few rows of t"], torch.float32, (3, 4), "none")
    expected = linear_forward(forward, around_product=True)
    forward.central.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_forward(forward, around_product=True)
    assert torch.equal(found[0], expected[0])
    assert not found[0].requires_grad


# With no more rows than this, an expert's block is read in place, not packed (kFewHiddenRows in
# csrc/cpu/experts/hidden_body.h).
MOST_ROWS_IN_PLACE = 3


@in_two_dtypes
@named_cases(
    "options",
    {
        "84 columns, gated": {"top_k": 2, "groups": 1, "block": 84, "gated": True},
        "two groups of 40": {"top_k": 1, "groups": 2, "block": 40, "with_bias": True},
    },
)
def test_few_rows_of_hidden_experts(options, dtype):
    """The columns of a product are computed four vectors at a time, then one vector at a time, then
    one by one.

    84 columns take all three steps, whether a vector has 8 floats or 16. 40 columns have no four
    vectors of 16 floats, and none remains after vectors of 8.
    """
    problem = HiddenProblem(tokens=3, **options, dtype=dtype)
    chosen = problem.index[problem.index >= 0]
    assert int(chosen.bincount().max()) * problem.groups <= MOST_ROWS_IN_PLACE
    problem.check("native")


# ------------------------------------------------------------------ rounding


def times_one(rows, gates):
    """What `combine` writes for one slot per token."""
    routing = route(torch.zeros(len(rows), 1, dtype=torch.int64), 1)
    return combine(rows, routing, gates, backend="native")


def assert_same_numbers(got, want):
    """Bit by bit, except that a NaN may be any."""
    nan = want.isnan()
    assert torch.equal(got[~nan], want[~nan])
    assert bool(got[nan].isnan().all())


@in_half_precision
def test_every_value_of_two_bytes_survives(dtype):
    values = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(-1, 1)
    assert_same_numbers(times_one(values, torch.ones(len(values), 1)), values)


def ties(dtype):
    """Every float32 halfway between two neighbours of ``dtype``."""
    values = torch.arange(2**15, dtype=torch.int16).view(dtype).double()
    values = values[values.isfinite()]
    halfway = (values[:-1] + values[1:]) / 2
    assert torch.equal(halfway.float().double(), halfway), "float32 holds each of them"
    return torch.cat([halfway, -halfway]).float()


@in_half_precision
def test_rounding_is_that_of_torch(dtype):
    """A gate times one is rounded as torch rounds that float32: also ties, overflow, subnormals and
    NaN."""
    bits = torch.randint(-(2**31), 2**31, (200_000,), dtype=torch.int64)
    near_limits = torch.tensor(
        [65504.0, 65519.99, 65520.0, 65536.0, 2**-14, 2**-24, 2**-25, 2**-25 * 1.01, 0.0]
    )
    halfway = ties(dtype)
    assert len(halfway) > 60_000
    assert not bool((halfway.to(dtype).view(torch.int16) & 1).any()), "each goes to the even one"
    gates = torch.cat([bits.int().view(torch.float32), halfway, near_limits, -near_limits])[:, None]
    assert_same_numbers(times_one(torch.ones_like(gates, dtype=dtype), gates), gates.to(dtype))


def test_offsets_may_be_int64_and_rows_int32():
    routing = route(torch.tensor([[0], [1], [0]]), 2)
    wide = Routing(routing.expert_offsets.long(), routing.token_of_slot, routing.slot_of_token)
    x = torch.randn(3, 4)
    assert torch.equal(dispatch(x, wide, backend="native"), dispatch(x, routing, backend="native"))
    call = forward_call()
    other = replace(call, expert_offsets=call.expert_offsets.long(), row_index=call.row_index.int())
    assert torch.equal(linear_forward(other)[0], linear_forward(call)[0])
