"""Every backend that runs on the device, through the public ops, against the float64 reference on
the same device."""

import pytest
import torch
from mpoe_bench.cases import expert_choice, random_blocks
from torch.testing import assert_close

from mpoe.layers.router import float32_logits
from mpoe_kernels import (
    MPOBlocks,
    MPOShape,
    combine,
    grouped_mpo_linear,
    route,
)
from mpoe_kernels.backends import BACKENDS
from mpoe_kernels.contract import BlockDims, Contraction
from mpoe_kernels.contract.program import PHASES
from mpoe_kernels.linear.ffn import placed_mpo_linear
from tests.cases import SMALL_SHAPES, either
from tests.linear_problem import Product, check_embedding, check_ffn, planned_strategies
from tests.routing_problem import check_route, check_rows

# A shape of every kind: on tiles that are never full, and, large, on many full ones.
LARGE = {
    "paper": MPOShape.paper(768, 3072, max_bond=32),
    "separable": MPOShape.separable(768, 3072),
}
LARGE_ON_CPU = {
    "paper": MPOShape.paper(192, 384, max_bond=32),
    "separable": MPOShape.separable(192, 384),
}
dtypes = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"]
)


def make_blocks(shape, experts, dtype, device):
    made = random_blocks(shape, experts)
    parts = (t.to(device, dtype) for t in (made.left, made.central, made.right))
    return MPOBlocks(*parts, shape.in_features, shape.out_features)


def make_routing(tokens, experts, capacity, device):
    index = expert_choice("zipf", tokens, experts).to(device)
    return route(index, experts, capacity, backend="eager")


def strategies_of(backend, shape, dtype, device):
    """Strategies that a backend has kernels for, forward and backward; without one the test is
    skipped."""
    dims = BlockDims.of_shape(shape)
    strategies = []
    for strategy in planned_strategies(shape):
        calls = [
            Contraction(strategy, dims, 5, 37, dtype, phase, device=str(device)) for phase in PHASES
        ]
        if not any(map(BACKENDS[backend].contraction_reasons, calls)):
            strategies.append(strategy)
    if not strategies:
        pytest.skip(f"backend {backend} computes no strategy of {shape}")
    return strategies


def require_strategy(backend, strategy, dtype, device):
    """Skip a test whose backend refuses a strategy."""
    shape = SMALL_SHAPES["separable" if strategy == "separable" else "light"]
    if strategy not in strategies_of(backend, shape, dtype, device):
        pytest.skip(f"backend {backend} does not compute the strategy {strategy}")


def check_linear(backend, strategies, shape, dtype, device, **options):
    """Forward and backward with bias and ReLU; the op is told which slots read a token."""
    options = {
        "tokens": 37,
        "experts": 5,
        "top_k": 1,
        "activation": "relu",
        "inverse": True,
        **options,
    }
    product = Product(shape, dtype, backend=backend, device=device, **options)
    for strategy in strategies:
        product.check(strategy, factor=3)


@dtypes
@pytest.mark.parametrize("name", ["paper_bond_4", "light", "separable", "padded", "seven_cores"])
def test_strategies(able, name, dtype, device):
    shape = SMALL_SHAPES[name]
    check_linear(able, strategies_of(able, shape, dtype, device), shape, dtype, device, capacity=9)


@dtypes
@pytest.mark.parametrize("name", LARGE)
def test_large_shapes(able, name, dtype, device):
    if device.type == "cpu":
        pytest.skip("the tests of the CPU backends have sizes of their own")
    strategy = "separable" if name == "separable" else "rebuild"
    require_strategy(able, strategy, dtype, device)
    check_linear(able, [strategy], LARGE[name], dtype, device, tokens=300)
    check_linear(able, ["auto"], LARGE[name], dtype, device, tokens=3)


@pytest.mark.parametrize(
    "kind, tokens", [("all_to_one", 37), ("some_idle", 37), ("uniform", 37), ("uniform", 0)]
)
def test_loads(able, kind, tokens, device):
    way = ["rebuild" if tokens else "auto"]
    check_linear(able, way, SMALL_SHAPES["light"], torch.float32, device, kind=kind, tokens=tokens)


@pytest.mark.parametrize(
    "tokens, experts, top_k, capacity", [(5, 3, 2, None), (700, 64, 2, 11), (0, 3, 1, 2)]
)
def test_routing_is_the_same_everywhere(able, tokens, experts, top_k, capacity, device):
    index = expert_choice("zipf", tokens, experts, top_k).to(device)
    mask = (torch.arange(tokens, device=device) % 7 != 3) if capacity else None
    check_route(index, experts, capacity, mask, backend=able)


def test_dispatch_and_combine(able, device):
    check_rows(make_routing(300, 7, 50, device), 40, torch.float32, able)


@dtypes
@pytest.mark.parametrize("name", ["paper_bond_4", "light", "separable", "padded", *LARGE])
def test_rows_at_their_tokens(able, name, dtype, device):
    """The last product of a network without gradients: the bits of `combine`."""
    large = LARGE if device.type == "cuda" else LARGE_ON_CPU  # whose tiles are full long before
    shape = large[name] if name in large else SMALL_SHAPES[name]
    tokens, experts = (300, 7) if name not in large or device.type == "cuda" else (70, 3)
    routing = make_routing(tokens, experts, tokens // 6, device)
    blocks, gates = make_blocks(shape, experts, dtype, device), torch.rand(tokens, 1, device=device)
    x = torch.randn(tokens, shape.in_features, device=device).to(dtype)
    rows = x, blocks, routing.expert_offsets, torch.randn(shape.out_features).to(device, dtype)
    for strategy in strategies_of(able, shape, dtype, device):
        y = grouped_mpo_linear(*rows, backend=able, strategy=strategy)
        wanted = combine(y, routing, gates, backend=able)
        assert torch.equal(placed_mpo_linear(*rows, routing, gates, able, strategy), wanted), (
            strategy
        )


@pytest.mark.parametrize("rows", [3, 500])
def test_embedding(rows, device):
    check_embedding(SMALL_SHAPES["padded"], rows, device=device)


@dtypes
@either("gated")
@pytest.mark.parametrize("name", ["light", "padded", "separable", *LARGE])
def test_networks(able, name, gated, dtype, device):
    if name in LARGE and device.type == "cpu":
        pytest.skip("tiles are full on a GPU alone; the other tests have the CPU's sizes")
    shape, tokens = (LARGE[name], 300) if name in LARGE else (SMALL_SHAPES[name], 37)
    require_strategy(
        able, "separable" if shape.is_separable else "rebuild", dtype, device
    )  # what it trains with
    check_ffn(able, shape, dtype, gated, tokens, 5, device)


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_float32_logits(dtype, weight_dtype, device):
    """The router's logits, against float64."""
    x = torch.randn(70, 96).to(device, dtype).requires_grad_()
    weight = torch.randn(6, 96).to(device, weight_dtype).requires_grad_()
    grad = torch.randn(70, 6).to(device)
    logits = float32_logits(x, weight)
    dx, dweight = torch.autograd.grad(logits, (x, weight), grad)
    rows, columns, grad = x.detach().double(), weight.detach().double(), grad.double()
    assert_close(logits.double(), rows @ columns.T, rtol=1e-5, atol=1e-4)
    rounding = {"rtol": 1e-2, "atol": 1e-2}
    assert_close(dx.double(), grad @ columns, **rounding)
    assert_close(dweight.double(), grad.T @ rows, **rounding)
