"""route, dispatch, combine against loops; no synchronisation; poisoned memory; gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.library import opcheck

from mpoe_kernels import Routing, combine, dispatch, route
from mpoe_kernels.reference import combine_reference, dispatch_reference, route_reference
from mpoe_kernels.testing.assertions import poisoned_memory


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 20), st.integers(1, 6), st.integers(1, 3), st.integers(0, 2**31), st.data())
def test_route_equals_loops(tokens: int, experts: int, top_k: int, seed: int, data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(0, experts, (tokens, top_k), generator=generator)
    capacity = data.draw(st.none() | st.integers(1, 6))
    mask = torch.rand(tokens, generator=generator) > 0.3 if data.draw(st.booleans()) else None
    with poisoned_memory():
        routing = route(index, experts, capacity, mask)
    expected = route_reference(index, experts, capacity, mask)
    for got, want in zip((routing.expert_offsets, routing.token_of_slot, routing.slot_of_token), expected, strict=True):
        assert got.dtype == want.dtype
        assert torch.equal(got, want)
    assert routing.num_experts == experts
    assert int(routing.expert_load.sum()) == int((routing.slot_of_token >= 0).sum())


def example_routing(tokens: int = 9, top_k: int = 2) -> tuple[Routing, torch.Tensor]:
    torch.manual_seed(3)
    index = torch.randint(0, 4, (tokens, top_k))
    mask = torch.arange(tokens) % 4 != 1
    return route(index, 4, capacity=4, token_mask=mask), mask


def test_dispatch_and_combine_equal_loops_even_with_poisoned_input() -> None:
    routing, mask = example_routing()
    x = torch.randn(9, 5, dtype=torch.float64)
    weights = torch.rand(9, 2, dtype=torch.float64)
    x[~mask] = float("nan")  # padding may hold anything
    with poisoned_memory():
        rows = dispatch(x, routing)
        assert torch.equal(rows, dispatch_reference(x, routing))
        filled = int(routing.expert_offsets[-1])
        assert filled < rows.shape[0]
        assert bool((rows[filled:] == 0).all())
        rows = rows.clone()
        rows[filled:] = float("nan")  # and so may the rows of empty slots
        assert torch.allclose(combine(rows, routing, weights), combine_reference(rows, routing, weights))


def test_gradients() -> None:
    routing, _ = example_routing()
    x = torch.randn(9, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(9, 2, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda t: dispatch(t, routing), (x,))
    y = torch.randn(18, 3, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda t, w: combine(t, routing, w), (y, weights))


def test_combine_only_computes_needed_gradients() -> None:
    routing, _ = example_routing()
    y = torch.randn(18, 3, requires_grad=True)
    weights = torch.rand(9, 2)
    combine(y, routing, weights).sum().backward()
    assert y.grad is not None
    weights.requires_grad_()
    combine(y.detach(), routing, weights).sum().backward()
    assert weights.grad is not None


def test_opcheck() -> None:
    routing, _ = example_routing()
    parts = (routing.expert_offsets, routing.token_of_slot, routing.slot_of_token)
    index = torch.randint(0, 4, (9, 2))
    opcheck(torch.ops.mpoe.route.default, (index, 4, 3, torch.rand(9) > 0.5, "auto"))
    opcheck(torch.ops.mpoe.route.default, (index, 4, None, None, "auto"))
    x = torch.randn(9, 3, requires_grad=True)
    opcheck(torch.ops.mpoe.dispatch.default, (x, *parts, "auto"))
    y, weights = torch.randn(18, 3, requires_grad=True), torch.rand(9, 2, requires_grad=True)
    opcheck(torch.ops.mpoe.combine.default, (y, *parts, weights, "auto"))
    opcheck(torch.ops.mpoe.dispatch_backward.default, (y.detach(), parts[2], "auto"))
    opcheck(
        torch.ops.mpoe.combine_backward.default,
        (x.detach(), y.detach(), *parts[1:], weights.detach(), True, True, "auto"),
    )


def test_fullgraph_compile_without_host_reads() -> None:
    def mix(x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        routing = route(index, 4, capacity=3)
        return combine(dispatch(x, routing) * 2, routing, weights)

    x, index, weights = torch.randn(9, 3), torch.randint(0, 4, (9, 2)), torch.rand(9, 2)
    compiled = torch.compile(mix, fullgraph=True, backend="aot_eager", dynamic=True)
    assert torch.equal(compiled(x, index, weights), mix(x, index, weights))
    assert torch.equal(compiled(x[:5], index[:5], weights[:5]), mix(x[:5], index[:5], weights[:5]))


def test_kernels_do_not_synchronise_with_the_host() -> None:
    """Fake tensors cannot be read by the host, so a kernel that runs on them needs no synchronisation."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from mpoe_kernels.backends.eager import routing as kernels

    with FakeTensorMode():
        index, mask = torch.zeros(9, 2, dtype=torch.int64), torch.ones(9, dtype=torch.bool)
        offsets, token_of_slot, slot_of_token = kernels.route_forward(index, 4, 3, mask)
        x, weights = torch.randn(9, 3), torch.rand(9, 2)
        rows = kernels.dispatch_forward(x, offsets, token_of_slot, slot_of_token)
        y = kernels.combine_forward(rows, offsets, token_of_slot, slot_of_token, weights)
        kernels.combine_backward(y, rows, token_of_slot, slot_of_token, weights, True, True)
        kernels.dispatch_backward(rows, slot_of_token)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: route(torch.zeros(3, dtype=torch.int64), 2), r"top_k_index must be \[T, K\]"),
        (lambda: route(torch.zeros(3, 1, dtype=torch.int64), 0), "num_experts must be at least 1; got 0"),
        (lambda: route(torch.zeros(3, 1, dtype=torch.int64), 2, capacity=0), "capacity must be at least 1 or None"),
        (
            lambda: route(torch.zeros(3, 1, dtype=torch.int64), 2, token_mask=torch.ones(2).bool()),
            "token_mask must be bool",
        ),
        (lambda: dispatch(torch.zeros(4, 2), example_routing()[0]), r"x must be \[T, I\] with T = 9"),
        (
            lambda: combine(torch.zeros(4, 2), example_routing()[0], torch.ones(9, 2)),
            r"y_sorted must be \[N, F\] with N = 18",
        ),
        (
            lambda: combine(torch.zeros(18, 2), example_routing()[0], torch.ones(9, 1)),
            r"top_k_weights must be \[T, K\] = \[9, 2\]",
        ),
    ],
)
def test_refusals(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_type_refusals() -> None:
    with pytest.raises(TypeError, match="top_k_index must be int32 or int64"):
        route(torch.zeros(3, 1), 2)
    with pytest.raises(TypeError, match="routing must be a Routing"):
        dispatch(torch.zeros(3, 1), None)  # type: ignore[arg-type]


def test_nothing_to_route_has_gradients_too() -> None:
    routing = route(torch.zeros(0, 2, dtype=torch.int64), 3)
    x = torch.zeros(0, 4, requires_grad=True)
    weights = torch.zeros(0, 2, requires_grad=True)
    combine(dispatch(x, routing), routing, weights).sum().backward()
    assert x.grad is not None
    assert x.grad.shape == (0, 4)
    assert weights.grad is not None
    assert weights.grad.shape == (0, 2)


def test_nan_weights_of_dropped_pairs_stay_out() -> None:
    routing, mask = example_routing()
    weights = torch.rand(9, 2, requires_grad=True)
    poisoned = torch.where(mask[:, None], weights, float("nan"))
    y = combine(torch.ones(18, 3), routing, poisoned)
    assert bool(torch.isfinite(y).all())
