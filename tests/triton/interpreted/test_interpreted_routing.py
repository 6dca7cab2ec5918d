"""Routing kernels against loops (integers: equal), dispatch and combine against the float64
reference."""

import pytest
import torch
from torch.testing import assert_close

from mpoe_kernels import route
from mpoe_kernels.routing import triton as routing
from mpoe_kernels.routing import triton_gates
from mpoe_kernels.routing.gating import MOST_GATED, gates_of, gating_on_gpu
from tests.assertions import poisoned_memory
from tests.cases import pairwise
from tests.routing_problem import check_gradients_alone, check_route, check_rows

CASES = [
    # tokens, experts, top_k, capacity, masked
    (0, 3, 2, None, False),
    (1, 1, 1, None, False),
    (9, 4, 2, 3, True),
    (40, 5, 3, None, True),
    (100, 6, 1, 12, True),
    (37, 5, 3, 4, False),
    (100, 70, 2, 2, True),
]


def sort_in_parts(monkeypatch, most, most_parts, counted):
    """Of up to ``most`` pairs in one launch; of more in parts, which are small."""
    sizes = {"MOST_AT_ONCE": most, "MOST_PARTS": most_parts, "COUNTED": counted}
    for name, value in {**sizes, "SORT_BLOCK": 32, "BLOCK": 32}.items():
        monkeypatch.setattr(routing, name, value)


@pytest.mark.parametrize("most, most_parts", [(1000, 512), (0, 512), (0, 2)])
@pytest.mark.parametrize("tokens, experts, top_k, capacity, masked", CASES)
def test_route_equals_loops(
    tokens, experts, top_k, capacity, masked, most, most_parts, monkeypatch
):
    """In one launch, or several for any number of pairs; with a capacity always in several."""
    sort_in_parts(monkeypatch, most, most_parts, counted=64)
    index = torch.randint(0, experts, (tokens, top_k))
    mask = torch.rand(tokens) > 0.3 if masked else None
    check_route(index, experts, capacity, mask, backend="triton")


def decided(x, weight, top_k, raw=True, scale=1.0):
    with poisoned_memory():
        found = gating_on_gpu(x, weight, top_k, raw, scale, "triton")
    return found


DTYPES = [
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
    (torch.float32, torch.float32),
]
GATES = [(0, 4, 2), (1, 1, 1), (37, 5, 3), (3, 1000, 16), (5, 8, 1)]  # tokens, experts, top_k


@pytest.mark.parametrize("dtypes, sizes, raw", pairwise(DTYPES, GATES, [False, True]))
def test_gates_and_gradients(dtypes, sizes, raw, monkeypatch):
    """Against float64, of logits that are the sum of several parts of the width; with a gradient of
    the logits, of the gates, and of both."""
    monkeypatch.setattr(triton_gates, "PART_OF_WIDTH", 64)
    tokens, experts, top_k = sizes
    x = torch.randn(tokens, 130).to(dtypes[0]).requires_grad_()
    weight = (torch.randn(experts, 130) / 11).to(dtypes[1]).requires_grad_()
    found = decided(x, weight, top_k, raw, 2.5)
    wide = [leaf.detach().double().requires_grad_() for leaf in (x, weight)]
    logits = wide[0] @ wide[1].t()
    gates = gates_of(logits, found.top_k_index, raw, 2.5)
    assert torch.equal(found.top_k_index, logits.topk(top_k).indices)
    assert_close(found.logits.double(), logits, rtol=1e-5, atol=1e-5)
    assert_close(found.top_k_weights.double(), gates, rtol=1e-5, atol=1e-5)
    grads = torch.randn(tokens, experts), torch.randn(tokens, top_k)
    close = [1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps for dtype in dtypes]
    for used in ((0, 1), (0,), (1,)):
        outs, given = [
            [values[i] for i in used] for values in ((found.logits, found.top_k_weights), grads)
        ]
        with poisoned_memory():
            actual = torch.autograd.grad(outs, (x, weight), given, retain_graph=True)
        assert tuple(value.dtype for value in actual) == dtypes
        true = [(logits, gates)[i] for i in used]
        wanted = torch.autograd.grad(
            true, wide, [grad.double() for grad in given], retain_graph=True
        )
        for value, truth, most in zip(actual, wanted, close, strict=True):
            scale = truth.abs().max().item() if truth.numel() else 1.0
            assert_close(value.double(), truth, rtol=most, atol=most * scale + 1e-9)


def test_gradients_of_gates_have_gradients():
    x, weight = torch.randn(3, 6, requires_grad=True), torch.randn(5, 6, requires_grad=True)

    def first_derivative(gate):
        (found,) = torch.autograd.grad(gate().square().sum(), x, create_graph=True)
        return torch.autograd.grad(found.square().sum(), weight)[0]

    index = decided(x, weight, 2).top_k_index
    actual = first_derivative(lambda: decided(x, weight, 2).top_k_weights)
    assert_close(actual, first_derivative(lambda: gates_of(x @ weight.t(), index, True, 1.0)))


def test_logits_of_a_token_do_not_depend_on_its_batch():
    x, weight = torch.randn(40, 700).bfloat16(), torch.randn(70, 700)
    whole = decided(x, weight, 2)
    for tokens in (slice(5, 6), slice(3, 20)):
        alone = decided(x[tokens], weight, 2)
        for value, of_all in zip(alone, whole, strict=True):
            assert torch.equal(value, of_all[tokens])


def test_gate_of_ties_infinities_and_nan():
    infinite, nan = float("inf"), float("nan")
    logits = torch.tensor(
        [[1.0, 1, 1, 0, 1], [-infinite, -infinite, 2, -infinite, 3], [0, nan, 1, 2, 3]]
    )
    found = triton_gates.gate(logits[None], 3, True, 1.0)
    assert found.top_k_index[:2].tolist() == [[0, 1, 2], [4, 2, 0]]
    assert found.top_k_index[2].unique().numel() == 3
    assert found.top_k_index[2].max() < 5
    assert found.top_k_weights[2].isnan().all()
    assert found.top_k_weights[:2].isfinite().all()


def test_what_is_not_gated_in_two_launches():
    x, weight = torch.zeros(1, 6), torch.zeros(4, 6)

    def gated(x, weight, backend="triton"):
        return gating_on_gpu(x, weight, 1, True, 1.0, backend)

    assert gated(x, weight) is not None
    assert gated(x, torch.zeros(MOST_GATED + 1, 6)) is None
    assert gated(x.double(), weight) is None
    assert gated(x, weight.double()) is None
    assert gated(x, weight, None) is None


@pytest.mark.parametrize("most, parts", [(1000, 512), (0, 512), (0, 2)])
@pytest.mark.parametrize("tokens, experts, top_k", [(1, 1, 1), (40, 5, 3), (100, 70, 2)])
def test_slots_sorted_by_expert(tokens, experts, top_k, most, parts, monkeypatch):
    """In one launch or two; -1 and numbers past the last expert are none, which come last."""
    sort_in_parts(monkeypatch, most, parts, counted=256)
    index = torch.randint(-1, experts + 2, (tokens, top_k))
    index[0, 0] = experts - 1
    keys = index.masked_fill((index < 0) | (index >= experts), experts).flatten()
    with poisoned_memory():
        found = routing.sort_slots(index, experts)
    assert found.pairs == tokens * top_k
    assert torch.equal(found.order[experts + 2 :].long(), keys.argsort(stable=True))
    assert found.order[: experts + 2].tolist() == [
        int((keys < e).sum()) for e in range(experts + 2)
    ]
    sizes = keys.bincount(minlength=experts + 1)
    for rows in (1, 16):
        assert ((sizes + rows - 1) // rows).sum() <= found.tiles(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("top_k", [1, 3])
def test_dispatch_and_combine_with_gradients(dtype, top_k):
    mask = torch.arange(21) % 4 != 1
    check_rows(route(torch.randint(0, 4, (21, top_k)), 4, 12, mask), 131, dtype, "triton")


def test_each_gradient_alone():
    check_gradients_alone(routing.combine_backward, "triton")
