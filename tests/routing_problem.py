"""Routing by any backend, compared with loops."""

import torch

from mpoe_kernels import combine, dispatch, route
from mpoe_kernels.reference import combine_reference, dispatch_reference, route_reference
from mpoe_kernels.routing.op import CombineBackwardCall
from tests.assertions import assert_calibrated, poisoned_memory


def parts_of(routing):
    return routing.expert_offsets, routing.token_of_slot, routing.slot_of_token


def check_route(index, experts, capacity=None, mask=None, *, backend):
    """The routing, which must be that of the reference."""
    with poisoned_memory(index.device):
        routing = route(index, experts, capacity, mask, backend=backend)
    for found, wanted in zip(
        parts_of(routing), route_reference(index, experts, capacity, mask), strict=True
    ):
        assert found.dtype == wanted.dtype
        assert torch.equal(found.cpu(), wanted)
    return routing


def check_rows(routing, features, dtype, backend, gate_dtype=torch.float32, place=lambda t: t):
    """dispatch, combine and their gradients. What nobody reads is NaN: tokens, rows and gates
    without a slot.

    Args:
        routing: where tokens go, on the device that computes.
        features: of a row.
        dtype: of rows.
        backend: that computes.
        gate_dtype: of gates.
        place: lays a tensor out in memory.
    """
    (tokens, top_k), filled = routing.slot_of_token.shape, int(routing.expert_offsets[-1])
    lost = routing.slot_of_token < 0
    x = torch.randn(tokens, features, device=lost.device)
    x[lost.all(1)] = torch.nan
    y = torch.randn(tokens * top_k, features, device=lost.device)
    y[filled:] = torch.nan
    gates = torch.rand(tokens, top_k, device=lost.device)
    gates = gates.masked_fill(lost, torch.nan).to(gate_dtype)
    if dtype != gate_dtype:  # the reference rounds the gates to the rows' dtype; kernels need not
        gates = gates.to(dtype).to(gate_dtype)
    grads = torch.randn_like(y).to(dtype), torch.randn_like(x).to(dtype)

    def run(run_dtype, gates_in, reference):
        own = (lambda t: t) if reference else place
        rows, sorted_rows = (
            own(t.to(dtype).to(run_dtype)).detach().requires_grad_() for t in (x, y)
        )
        weights = own(gates.to(gates_in)).detach().requires_grad_()
        options = {} if reference else {"backend": backend}
        there = (dispatch_reference if reference else dispatch)(rows, routing, **options)
        back = (combine_reference if reference else combine)(
            sorted_rows, routing, weights, **options
        )
        results = [there, back]
        for result, inputs, grad in (
            (there, [rows], grads[0]),
            (back, [sorted_rows, weights], grads[1]),
        ):
            found = (None,) * len(inputs)
            if result.requires_grad:  # without tokens, the reference depends on no input
                found = torch.autograd.grad(
                    result, inputs, own(grad.to(run_dtype)).detach(), allow_unused=True
                )
            results += [
                torch.zeros_like(i) if g is None else g for i, g in zip(inputs, found, strict=True)
            ]
        return results

    with poisoned_memory(lost.device):
        actual = run(dtype, gate_dtype, reference=False)
    truth, same = (
        run(torch.float64, torch.float64, reference=True),
        run(dtype, gate_dtype, reference=True),
    )
    assert torch.equal(actual[0], same[0])
    for name, a, t, s in zip(("rows", "y", "dx", "dy", "dgates"), actual, truth, same, strict=True):
        assert_calibrated(a, t, s, f"{name} {dtype}")


def check_gradients_alone(combine_backward, backend):
    """Rows and gates have the same gradients if only one of them is needed; the other is empty."""
    routing = check_route(torch.randint(0, 4, (9, 2)), 4, backend=backend)
    inputs = torch.randn(9, 7), torch.randn(18, 7), *parts_of(routing)[1:], torch.rand(9, 2)

    def gradients(*need):
        return combine_backward(CombineBackwardCall(*inputs, *need, backend))

    drows, dgates = gradients(True, True)
    rows_alone, no_gates = gradients(True, False)
    no_rows, gates_alone = gradients(False, True)
    assert torch.equal(rows_alone, drows)
    assert torch.equal(gates_alone, dgates)
    assert no_gates.numel() == no_rows.numel() == 0
