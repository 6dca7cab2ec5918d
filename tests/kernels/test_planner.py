"""The planner's candidates against opt_einsum's optimum; its ranking. What it counts is compared
with what runs in test_backends_and_plan.py."""

import itertools
from functools import partial

import opt_einsum
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mpoe_bench.cases import workload_shape

from mpoe_kernels import MPOShape, plan_contraction
from mpoe_kernels.contract import (
    STRATEGIES,
    BlockDims,
    Contraction,
    contractions,
    expected_busy_experts,
)
from mpoe_kernels.contract.orders import MOVE_FLOPS, SEPARABLE_ORDER, applications, order_flops
from mpoe_kernels.contract.plan import format_flops
from tests.cases import SMALL_SHAPES

NAMES = "paper_full paper_128 paper_64 paper_32 paper_16 light_64 separable".split()
SHAPES = {**SMALL_SHAPES, **{name: workload_shape(name, 768, 3072) for name in NAMES}}


def optimal_flops(dims, rows):
    """opt_einsum's cheapest order for one expert; it counts two operations per multiply-add."""
    d = dims
    views = ((rows, d.iL, d.iC, d.iR), (d.iL, d.jL, d.a), (d.a, d.iC, d.jC, d.b), (d.b, d.iR, d.jR))
    _, info = opt_einsum.contract_path(
        "nipu,ija,apqb,buv->njqv", *views, shapes=True, optimize="optimal"
    )
    return float(info.opt_cost)


@pytest.mark.parametrize("name", SHAPES)
def test_rebuilding_takes_the_cheaper_order_so_a_mirrored_shape_costs_the_same(name):
    shape = SHAPES[name]
    mirrored = BlockDims.of_shape(shape.mirrored())
    assert BlockDims.of_shape(shape).rebuild_flops == mirrored.rebuild_flops


def test_a_chain_pays_for_the_elements_that_it_moves():
    """Central first takes 0.6 of the FLOPs for both; it is worth it unless it leaves eight times as
    many elements."""
    for sizes, order in (((768, 3072), ("L", "C", "R")), ((3072, 768), ("C", "L", "R"))):
        dims = BlockDims.of_shape(workload_shape("light_32", *sizes))
        assert order_flops(dims, ("C", "L", "R")) < 0.6 * order_flops(dims, ("L", "C", "R"))
        assert dims.chain_order == order


@pytest.mark.parametrize("name", SHAPES)
def test_a_chain_has_the_cheapest_order(name):
    dims = BlockDims.of_shape(SHAPES[name])
    cost = {}
    for order in itertools.permutations("LCR"):
        first, second, _ = applications(dims, order)
        cost[order] = order_flops(dims, order) + MOVE_FLOPS * (first.after + second.after)
    assert cost[dims.chain_order] == min(cost.values())


factors = st.integers(1, 8)


@st.composite
def shapes(draw: st.DrawFn) -> MPOShape:
    cores = draw(st.integers(1, 5))
    return MPOShape(
        tuple(draw(st.lists(factors, min_size=cores, max_size=cores))),
        tuple(draw(st.lists(factors, min_size=cores, max_size=cores))),
        max_bond=draw(st.none() | st.integers(1, 64)),
        central=draw(st.integers(0, cores - 1)),
    )


@settings(max_examples=150, deadline=None)
@given(shapes() | st.sampled_from(list(SHAPES.values())), st.integers(1, 4096))
def test_never_more_flops_than_the_optimum(shape, rows):
    dims = BlockDims.of_shape(shape)
    optimum = optimal_flops(dims, rows)
    # A missing side is a scalar: kernels multiply the rows by it, opt_einsum folds it into the
    # smallest tensor.
    scalars = (dims.iL * dims.jL * dims.a == 1) + (dims.iR * dims.jR * dims.b == 1)
    allowed = 1.05 * optimum + scalars * 2 * rows * max(dims.in_features, dims.out_features)
    fewest = min(order_flops(dims, order) for order in itertools.permutations(SEPARABLE_ORDER))
    more = rows * (
        order_flops(dims, dims.chain_order) - fewest
    )  # of a chain that moves fewer elements
    assert plan_contraction(shape, 1, rows).flops <= allowed + more


@settings(max_examples=100, deadline=None)
@given(
    shape=shapes(),
    num_experts=st.integers(1, 70),
    num_tokens=st.just(0) | st.integers(0, 4096),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    top_k=st.integers(1, 3),
    training=st.booleans(),
    mask_central=st.booleans(),
)
def test_any_plan_ranks_by_flops_and_shows_every_strategy(**arguments):
    plan = plan_contraction(**arguments)
    dims = BlockDims.of_shape(arguments["shape"])
    assert plan == plan_contraction(**arguments)
    assert plan.temporary_bytes <= 2 * dims.weight_elements * arguments["dtype"].itemsize
    assert (plan.flops > 0) == (arguments["num_tokens"] > 0)
    slots = arguments["num_tokens"] * arguments["top_k"]
    if not slots:
        assert (plan.temporary_bytes, plan.x_dense) == (0, 0.0)
    dense = 2 * dims.in_features * dims.out_features * slots
    assert plan.dense_flops == dense * (3 if plan.training else 1)
    assert [ranked[0] for ranked in plan.ranked] == list(plan.phases)
    for ranked in plan.ranked:
        flops = [c.flops for c in ranked]
        assert flops == sorted(flops)
        for c in ranked:
            assert f"  {c.strategy} " in str(plan)
    assert format_flops(1.5e9) == "1.5 GFLOP"


_DIMS = BlockDims(iL=2, jL=3, a=4, iC=2, jC=2, b=2, iR=2, jR=5, in_features=8, out_features=30)
COUNTED = {strategy: _DIMS for strategy in STRATEGIES if strategy != "separable"}
COUNTED["separable"] = BlockDims(
    iL=3, jL=1, a=3, iC=2, jC=2, b=2, iR=1, jR=2, in_features=6, out_features=4
)


def test_masked_and_partial_backwards_leave_out_what_is_not_needed():
    for strategy, dims in COUNTED.items():
        of = partial(Contraction, strategy, dims, 2, 12, torch.float32)
        whole, masked = of("backward"), of("backward", (True, True, False, True))
        only_x = of("backward", (True, False, False, False))
        nothing = of("backward", (False,) * 4)
        assert masked.flops < whole.flops
        assert "d C" in {product.result for product in whole.program.products}
        assert "d C" not in {product.result for product in masked.program.products}
        assert only_x.flops == of("forward").flops, "dx costs what y costs"
        assert (nothing.flops, nothing.program.products) == (0, ())


def test_expected_busy_experts():
    found = [
        expected_busy_experts(*sizes) for sizes in ((8, 0), (8, 1), (1, 5), (64, 64), (8, 10_000))
    ]
    assert found == [0, 1, 1, 41, 8]  # 64 (1 - (63/64)^64) = 40.6


def test_decode_and_training_get_different_plans():
    for name in ("paper_full", "paper_64", "light_64"):
        assert plan_contraction(SHAPES[name], 64, 64).strategy != "rebuild"
        training = plan_contraction(SHAPES[name], 8, 32768, torch.bfloat16, training=True)
        assert (training.strategy, training.backward_strategy) == ("rebuild", "rebuild")
    assert plan_contraction(MPOShape.paper(768, 3072, max_bond=8), 64, 64).strategy == "chain"
    assert plan_contraction(SHAPES["paper_full"], 8, 2048).temporary_bytes == 2 * 768 * 3072 * 4
    assert plan_contraction(SHAPES["paper_full"], 8, 2048).parameters == SHAPES[
        "paper_full"
    ].parameters(8)


def test_a_separable_training_forward_is_always_the_one_that_saves():
    shape = SMALL_SHAPES["separable"]
    plan = plan_contraction(shape, 1, 1_000_000, training=True)
    assert [c.strategy for c in plan.ranked[0]] == ["separable"]
    assert plan_contraction(shape, 1, 1_000_000).strategy == "rebuild"


def test_bonds_larger_than_needed_are_refused_for_memory():
    """Blocks may have a larger bond than their right side needs; a half-built weight is then larger
    than the whole."""
    dims = BlockDims(iL=4, jL=4, a=4, iC=2, jC=2, b=64, iR=2, jR=2, in_features=16, out_features=16)
    names = {c.strategy for c in contractions(dims, 2, 8, torch.float32, "forward")}
    assert "half_left" not in names
    assert "chain" in names, "there is always one without temporary weights"
