"""The router's product: float32 arithmetic without a float32 copy of the tokens."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mpoe.layers import TopKRouter
from mpoe.layers import router as router_module
from mpoe.layers.router import bfloat16_parts, float32_logits, logits_of_low_precision
from mpoe_kernels import available_backends

LOW = [torch.bfloat16, torch.float16]
TOKENS, FEATURES, EXPERTS = 20, 64, 6


def problem(dtype, weight_dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, FEATURES, generator=generator).to(dtype)
    weight = torch.randn(EXPERTS, FEATURES, generator=generator).to(weight_dtype)
    return x.requires_grad_(), weight.requires_grad_()


@pytest.mark.parametrize("weight_dtype", [*LOW, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_bits_and_gradients_of_float32_copies(dtype, weight_dtype):
    grad = torch.randn(TOKENS, EXPERTS)
    results = []
    for product in (partial(float32_logits, backend="eager"), lambda x, weight: F.linear(x.float(), weight.float())):
        x, weight = problem(dtype, weight_dtype)
        logits = product(x, weight)
        results.append((logits, *torch.autograd.grad(logits, (x, weight), grad)))
    for got, wanted in zip(*results, strict=True):
        assert got.dtype == wanted.dtype
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=0)
    torch.testing.assert_close(results[0][1:], results[1][1:], rtol=1e-2, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(float32_logits(*problem(dtype, weight_dtype), "eager"), results[1][0])


@pytest.mark.skipif("native" not in available_backends(), reason="the native kernels are not built")
@given(
    tokens=st.integers(0, 20),
    features=st.integers(1, 140),
    experts=st.integers(1, 40),
    dtypes=st.tuples(st.sampled_from(LOW), st.sampled_from([*LOW, torch.float32])),
    frozen=st.sampled_from(["nothing", "tokens", "weight"]),
    seed=st.integers(0, 99),
)
def test_native_products_and_gradients(tokens, features, experts, dtypes, frozen, seed):
    """Against double precision, and only of what needs gradients."""
    generator = torch.Generator().manual_seed(seed)
    grad = torch.randn(tokens, experts, generator=generator)
    x = torch.randn(tokens, features, generator=generator).to(dtypes[0]).requires_grad_(frozen != "tokens")
    weight = torch.randn(experts, features, generator=generator).to(dtypes[1]).requires_grad_(frozen != "weight")
    logits = float32_logits(x, weight, "native")
    logits.backward(grad)
    want = x.detach().double() @ weight.detach().double().t()
    torch.testing.assert_close(logits.detach().double(), want, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(float32_logits(x, weight, "native"), logits)
    assert (x.grad is None) == (frozen == "tokens")
    assert (weight.grad is None) == (frozen == "weight")
    for got, value in ((x.grad, grad.double() @ weight.double()), (weight.grad, grad.double().t() @ x.double())):
        if got is not None:
            torch.testing.assert_close(got, value.to(got.dtype), rtol=2e-2 if got.dtype in LOW else 1e-5, atol=1e-4)


def test_the_backend_asked_for_computes(monkeypatch):
    called = []
    monkeypatch.setattr(router_module, "native_logits", lambda *arguments: called.append(arguments))
    for backend in ("eager", "native", None):
        with torch.no_grad():
            float32_logits(*problem(torch.bfloat16, torch.bfloat16), backend)
    assert len(called) == 2 * ("native" in available_backends())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_second_derivatives_and_transforms(dtype):
    x, weight = problem(dtype, dtype)
    first = torch.autograd.grad(float32_logits(x, weight).square().sum(), x, create_graph=True)[0]
    assert torch.autograd.grad(first.float().square().sum(), weight)[0].isfinite().all()
    each = torch.func.vmap(lambda rows: float32_logits(rows, weight))(torch.stack([x, x]))
    torch.testing.assert_close(each[1], float32_logits(x, weight))


@pytest.mark.parametrize("frozen", ["nothing", "tokens"])
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_the_backward_keeps_no_float32_copy_of_the_tokens(dtype, frozen):
    router = TopKRouter(FEATURES, EXPERTS).to(dtype)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        router(problem(dtype, dtype)[0].detach().requires_grad_(frozen != "tokens"))
    assert [t.dtype for t in kept if t.shape == (TOKENS, FEATURES)] == [dtype]


class Recorded(TorchDispatchMode):
    """Records the operations, and the dtypes of results with the tokens' shape."""

    def __init__(self):
        super().__init__()
        self.operations, self.copies = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.operations.append(str(func))
        if isinstance(out, torch.Tensor) and out.shape == (TOKENS, FEATURES):
            self.copies.append(out.dtype)
        return out


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    ("dtype", "weight_dtype", "copies"),
    [
        (torch.bfloat16, torch.bfloat16, False),
        (torch.float16, torch.float16, False),
        (torch.bfloat16, torch.float32, False),
        (torch.float16, torch.float32, True),  # float16's range cannot hold the remainders of a float32 weight
    ],
    ids=str,
)
def test_no_copy_of_the_tokens_on_a_gpu(dtype, weight_dtype, copies, grad):
    router = TopKRouter(FEATURES, EXPERTS, device="meta")
    with FakeTensorMode(), torch.set_grad_enabled(grad):
        router.weight = torch.nn.Parameter(torch.empty(EXPERTS, FEATURES, device="cuda", dtype=weight_dtype))
        x = torch.empty(TOKENS, FEATURES, device="cuda", dtype=dtype)
        with Recorded() as recorded:
            out = router(x)
    assert (out.logits.dtype, out.logits.shape) == (torch.float32, (TOKENS, EXPERTS))
    assert ("aten.mm.dtype" in recorded.operations) != copies
    assert recorded.copies == ([torch.float32] if copies else [])


def test_three_parts_are_the_weight():
    weight = torch.randn(EXPERTS, FEATURES) * torch.logspace(-6, 3, FEATURES)
    parts = bfloat16_parts(weight)
    assert (parts.dtype, parts.shape) == (torch.bfloat16, (3, EXPERTS, FEATURES))
    assert torch.equal(parts.double().sum(0), weight.double())


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_what_a_gpu_computes_is_as_exact_as_float32(weight_dtype, monkeypatch):
    """The CPU simulates the GPU's products of bfloat16 in float32."""

    for name in ("mm", "bmm"):
        monkeypatch.setattr(torch, name, lambda a, b, out_dtype: a.to(out_dtype) @ b.to(out_dtype))
    x, weight = problem(torch.bfloat16, weight_dtype)
    grad = torch.randn(TOKENS, EXPERTS)
    wanted = x.double() @ weight.double().T
    (of_weight,) = torch.autograd.grad(wanted, weight, grad.double())
    close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
    close(logits_of_low_precision(x, weight).double(), wanted)
    monkeypatch.setattr(router_module, "_on_gpu", lambda _: True)
    close(torch.autograd.grad(float32_logits(x, weight, "eager"), weight, grad)[0], of_weight)
