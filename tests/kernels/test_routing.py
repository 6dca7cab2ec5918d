"""route, dispatch, combine on every backend: compared with loops; poisoned memory, alignment,
threads, gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mpoe_bench.cases import expert_choice

from mpoe_kernels import combine, dispatch, route, use_backend
from mpoe_kernels.routing import eager as kernels
from mpoe_kernels.routing.op import (
    CombineBackwardCall,
    CombineCall,
    DispatchBackwardCall,
    DispatchCall,
    RouteCall,
)
from tests.assertions import torch_threads
from tests.cases import in_half_precision, in_two_dtypes
from tests.linear_problem import LAYOUTS
from tests.routing_problem import check_route, check_rows, parts_of

from .backend_cases import dtypes_of, on_every_backend, require


@on_every_backend
@settings(max_examples=80, deadline=None)
@given(st.integers(0, 20), st.integers(1, 6), st.integers(1, 3), st.integers(0, 2**31), st.data())
def test_route_equals_loops(backend, tokens, experts, top_k, seed, data):
    require(backend)
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(0, experts, (tokens, top_k), generator=generator)
    capacity = data.draw(st.none() | st.integers(1, 6))
    mask = torch.rand(tokens, generator=generator) > 0.3 if data.draw(st.booleans()) else None
    routing = check_route(index, experts, capacity, mask, backend=backend)
    assert routing.num_experts == experts
    assert int(routing.expert_load.sum()) == int((routing.slot_of_token >= 0).sum())


@on_every_backend
@in_half_precision
def test_gradients_of_gates_are_summed_in_float32(dtype, backend):
    """Products of two 16-bit numbers are exact in float32, so a long sum is as accurate as float32
    allows."""
    require(backend, "combine_backward", dtype)
    rows, grad = torch.rand(1, 20_000).to(dtype), torch.rand(1, 20_000).to(dtype)
    gates = torch.ones(1, 1, requires_grad=True)
    combine(rows, route(torch.zeros(1, 1).long(), 1), gates, backend=backend).backward(grad)
    truth = float((rows.double() * grad.double()).sum())
    assert float(gates.grad) == pytest.approx(truth, rel=2e-5)


@on_every_backend
def test_route_many_pairs(backend):
    """More pairs than one thread takes at once, including dropped and masked ones."""
    require(backend)
    index = expert_choice("zipf", 17_000, 5, top_k=2)
    mask = torch.rand(17_000) > 0.2
    for capacity in (None, 2_300):
        check_route(index, 5, capacity, mask, backend=backend)


@on_every_backend
@settings(max_examples=40, deadline=None)
@given(st.integers(0, 20), st.integers(1, 300), st.integers(1, 3), st.integers(0, 2**31), st.data())
def test_rows_and_gradients_against_loops(backend, tokens, features, top_k, seed, data):
    """dispatch, combine and their gradients, on aligned, unaligned and strided memory."""
    require(backend)
    torch.manual_seed(seed)
    dtype = data.draw(st.sampled_from(dtypes_of(backend, "combine")))
    gate_dtype = data.draw(st.sampled_from([dtype, torch.float32]))
    layout = LAYOUTS[data.draw(st.sampled_from(list(LAYOUTS)))]
    kind = data.draw(st.sampled_from(["uniform", "zipf", "all_to_one", "some_idle"]))
    capacity, masked = data.draw(st.none() | st.integers(1, 5)), data.draw(st.booleans())
    mask = torch.rand(tokens) > 0.3 if masked else None
    routing = route(expert_choice(kind, tokens, 4, top_k), 4, capacity, mask)
    check_rows(routing, features, dtype, backend, gate_dtype, layout)


@in_two_dtypes
def test_native_bits_do_not_depend_on_threads(dtype):
    require("native")
    index = expert_choice("zipf", 20_000, 6, top_k=2)
    x, y = torch.randn(20_000, 65).to(dtype), torch.randn(40_000, 65).to(dtype)
    weights, results = torch.rand(20_000, 2), []
    for threads in (1, 2, 4):
        with torch_threads(threads), use_backend("native"):
            routing = route(index, 6, capacity=7_000)
            leaves = [t.clone().requires_grad_() for t in (x, y, weights)]
            rows, out = dispatch(leaves[0], routing), combine(leaves[1], routing, leaves[2])
            grads = torch.autograd.grad((rows, out), leaves, (rows.detach() * 2, out.detach() * 3))
        results.append([*parts_of(routing), rows, out, *grads])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_eager_kernels_do_not_synchronise_with_the_host():
    """The host cannot read meta tensors, so a kernel that runs on them needs no synchronisation."""
    with torch.device("meta"):
        index, mask = torch.zeros(9, 2, dtype=torch.int64), torch.ones(9, dtype=torch.bool)
        offsets, token_of_slot, slot_of_token = kernels.route(RouteCall(index, 4, 3, mask, "eager"))
        x, weights = torch.randn(9, 3), torch.rand(9, 2)
        rows = kernels.dispatch(DispatchCall(x, offsets, token_of_slot, slot_of_token, "eager"))
        y = kernels.combine(
            CombineCall(rows, offsets, token_of_slot, slot_of_token, weights, "eager")
        )
        where = token_of_slot, slot_of_token
        kernels.combine_backward(CombineBackwardCall(y, rows, *where, weights, True, True, "eager"))
        kernels.dispatch_backward(DispatchBackwardCall(rows, slot_of_token, "eager"))
