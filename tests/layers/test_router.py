"""`TopKRouter`, its losses and its product against formulas written by hand."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from mpoe.config import MPOEConfig, RouterConfig
from mpoe.layers import MPOEFeedForward, TopKRouter, load_balancing_loss, router_z_loss
from mpoe.layers import feed_forward as feed_forward_module
from mpoe.layers import router as router_module
from mpoe.layers.context import global_batch, sum_over_ranks
from mpoe.layers.losses import count_choices
from mpoe.layers.router import float32_logits, logits_of_low_precision
from mpoe_kernels import available_backends, route, use_backend
from tests.assertions import refuses
from tests.cases import either, in_two_dtypes


def test_top1_gate_is_one_with_the_gradient_of_log_p():
    router = TopKRouter(6, 4)
    x = torch.randn(9, 6)
    out = router(x)
    assert torch.equal(out.top_k_weights, torch.ones(9, 1))
    out.top_k_weights.sum().backward()
    got = router.weight.grad.clone()
    router.weight.grad = None
    torch.log_softmax(router(x).logits, -1).max(-1).values.sum().backward()
    assert_close(got, router.weight.grad)


@either("recorded")
@either("raw")
@either("corrected")
@pytest.mark.parametrize("factor", [None, 2.5])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_scores_scales_and_corrections_by_hand(scoring, factor, corrected, raw, recorded):
    settings = {"is_scale_prob": raw, "bias_update_rate": 0.1 * corrected}
    config = RouterConfig(top_k=2, scoring_func=scoring, routed_scaling_factor=factor, **settings)
    router, x = TopKRouter(in_features=6, num_experts=4, config=config), torch.randn(9, 6)
    correction = torch.tensor([0.0, 0.9, 0.0, -0.9]) if corrected else torch.zeros(4)
    assert ("e_score_correction_bias" in router.state_dict()) == corrected
    if corrected:
        router.e_score_correction_bias.copy_(correction)
    with torch.set_grad_enabled(recorded):
        found = router(x)
    assert_close(found.logits, x @ router.weight.T)
    scores = found.logits.sigmoid() if scoring == "sigmoid" else found.logits.softmax(-1)
    assert torch.equal(found.top_k_index, (scores + correction).topk(2).indices)
    chosen = scores.gather(-1, found.top_k_index)
    wanted = chosen if raw else chosen / chosen.sum(-1, keepdim=True)
    assert_close(found.top_k_weights, wanted * (factor or 1.0))


@in_two_dtypes
def test_router_computes_in_float32_under_autocast(dtype):
    router = TopKRouter(64, 4)
    x = torch.randn(20, 64).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        out = router(x)
    assert out.logits.dtype == out.top_k_weights.dtype == torch.float32
    assert_close(out.logits, x.float() @ router.weight.T)
    assert router.bfloat16()(x.bfloat16()).logits.dtype == torch.float32


def test_jitter_is_as_wide_as_it_says_in_training_alone():
    router = TopKRouter(8, 8, RouterConfig(jitter=0.25))
    with torch.no_grad():
        router.weight.copy_(torch.eye(8))  # the logits are the input including its noise
    noise = router(torch.ones(4000, 8)).logits.detach()
    assert 0.75 <= float(noise.min()) < 0.76
    assert 1.24 < float(noise.max()) <= 1.25
    assert float(noise.mean()) == pytest.approx(1.0, abs=5e-3)  # of 32,000: 6 standard errors
    assert torch.equal(router.eval()(torch.ones(3, 8)).logits, torch.ones(3, 8))


def test_capacities():
    router = TopKRouter(6, 4, RouterConfig(top_k=2, capacity_factor=1.25, eval_capacity_factor=2.0))
    assert [router.capacity(10), router.eval().capacity(10)] == [7, 10]  # ceil(1.25 * 10 * 2 / 4)
    assert TopKRouter(6, 4).capacity(10) is None
    x = torch.randn(9, 6)
    for options in (
        {"capacity_factor": 1e300},
        {"capacity_factor": 1.0, "min_capacity": 10**30},
    ):  # beyond all slots
        router = TopKRouter(6, 4, RouterConfig(**options))
        assert router.capacity(10**12) == 2**31 - 1
        assert torch.equal(
            router.route(router(x)).slot_of_token.sort(0).values.squeeze(-1), torch.arange(9)
        )


def test_init_is_truncated_normal_of_the_switch_scale():
    weight = TopKRouter(1000, 8, RouterConfig(init_scale=0.1)).weight
    std = (0.1 / 1000) ** 0.5
    assert weight.abs().max() <= 2 * std
    assert float(weight.detach().std()) == pytest.approx(
        std * 0.88, rel=0.05
    )  # of a normal cut at two sigmas


@pytest.mark.parametrize("padding", [0.0, float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("valid", [0, 3, 5])
def test_losses_by_hand(valid, padding):
    """Of two layers, over valid tokens alone: what padding holds changes neither losses nor
    gradients."""
    logits, index = torch.randn(2, 5, 3), torch.randint(0, 3, (2, 5, 2))
    mask = torch.tensor([True] * valid + [False] * (5 - valid))[torch.randperm(5)]
    given = torch.where(mask[:, None], logits, padding).requires_grad_()
    kept = logits[:, mask].requires_grad_()
    fraction = torch.nn.functional.one_hot(index[:, mask].flatten(1), 3).float().mean(1)
    balance = 3 * (fraction * kept.softmax(-1).mean(1)).sum(-1)
    z = kept.logsumexp(-1).square().mean(1)
    for found, want in (
        (load_balancing_loss(given, index, mask), balance),
        (router_z_loss(given, mask), z),
    ):
        assert_close(found, want if valid else torch.zeros(2))
        (gradient,) = torch.autograd.grad(found.sum(), given)
        assert not gradient[:, ~mask].any()
        assert_close(gradient[:, mask], torch.autograd.grad(want.sum(), kept)[0])


def test_bad_shapes():
    for logits in (torch.randn(3), [1.0]):
        refuses(
            ValueError, r"logits must be \[\.\.\., T, E\]; got (\[3\]|list)", router_z_loss, logits
        )
    wrong = r"top_k_index .* leading axes \[4\]; got \[5, 1\]"
    refuses(ValueError, wrong, load_balancing_loss, torch.randn(4, 3), torch.zeros(5, 1).long())


def test_losses_of_parts_with_the_choices_of_all_average_to_the_whole():
    """What the ranks of a `global_batch` compute: parts of unequal sizes, with padding."""
    logits, index = torch.randn(2, 9, 4), torch.randint(0, 4, (2, 9, 2))
    mask = torch.tensor([1, 1, 0, 1, 1, 1, 0, 0, 1]).bool()
    whole = count_choices(index, 4, mask)
    assert whole.sum(-1).tolist() == [12, 12]
    total = torch.zeros(2)
    for part in (slice(0, 3), slice(3, 9)):
        share = mask[part].sum() / mask.sum()
        total += share * load_balancing_loss(logits[:, part], index[:, part], mask[part], whole)
    assert_close(total, load_balancing_loss(logits, index, mask))
    local = [
        load_balancing_loss(logits[:, part], index[:, part], mask[part])
        for part in (slice(0, 3), slice(3, 9))
    ]
    assert not torch.allclose((local[0] * 2 + local[1] * 4) / 6, total, rtol=1e-3)


def test_without_torch_distributed_a_global_batch_is_this_one():
    counts = torch.tensor([3, 1])
    with global_batch():
        assert sum_over_ranks(counts) == (counts, 1)


# ------------------------------------------------------------- one native call without gradients


NATIVE = pytest.mark.skipif(
    "native" not in available_backends(), reason="the native kernels are not built"
)
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@NATIVE
@given(
    sizes=st.tuples(st.integers(0, 20), st.integers(1, 140), st.integers(1, 40)),
    top_k=st.integers(1, 8),
    raw=st.booleans(),
    dtypes=st.tuples(st.sampled_from([F32, BF16, F16]), st.sampled_from([F32, BF16])),
    seed=st.integers(0, 99),
)
def test_a_router_decides_as_pytorch_does(sizes, top_k, raw, dtypes, seed):
    torch.manual_seed(seed)
    tokens, features, experts = sizes
    config = RouterConfig(top_k=min(top_k, experts), is_scale_prob=raw, init_scale=4.0)
    router, x = (
        TopKRouter(features, experts, config, dtype=dtypes[1]),
        torch.randn(tokens, features).to(dtypes[0]),
    )
    with torch.no_grad():
        assert router.can_gate_natively(x)
        found = router(x)
    with use_backend("eager"):
        wanted = router(x)
    assert_close(found.logits, wanted.logits.detach(), rtol=1e-5, atol=1e-5)
    assert_close(found.top_k_weights, wanted.top_k_weights.detach(), rtol=1e-5, atol=1e-6)
    chosen, theirs = (
        found.logits.gather(-1, found.top_k_index),
        wanted.logits.gather(-1, wanted.top_k_index),
    )
    assert_close(chosen, theirs.detach(), rtol=1e-5, atol=1e-5)
    assert all(len(set(row)) == len(row) for row in found.top_k_index.tolist())


@torch.no_grad()
def test_infinite_logits():
    router = TopKRouter(1, 3, RouterConfig(top_k=2))
    router.weight.copy_(torch.tensor([[-float("inf")], [1.0], [-float("inf")]]))
    found = router(torch.ones(1, 1))
    assert (found.top_k_index.tolist(), found.top_k_weights.tolist()) == ([[1, 0]], [[1.0, 0.0]])


@either("raw")
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("top_k", [1, 3])
@torch.no_grad()
def test_what_is_not_a_number_reaches_the_gates(raw, bad, top_k):
    router = TopKRouter(3, 4, RouterConfig(top_k=top_k, is_scale_prob=raw))
    router.weight.fill_(1.0)
    found = router(torch.tensor([[1.0, 1.0, 1.0], [bad, 1.0, 1.0]]))
    assert (
        found.top_k_weights.isnan().all(1).tolist()
        == found.top_k_weights.isnan().any(1).tolist()
        == [False, True]
    )
    assert ((found.top_k_index >= 0) & (found.top_k_index < 4)).all()


@NATIVE
def test_routers_that_take_pytorch_ops():
    router, x = TopKRouter(6, 4), torch.randn(3, 6)
    assert not router.can_gate_natively(x)  # its weight needs a gradient
    with torch.no_grad():
        assert router.can_gate_natively(x)
        assert TopKRouter(6, 4, backend="native").can_gate_natively(x)
        jittery = TopKRouter(6, 4, RouterConfig(jitter=0.1))
        assert not jittery.can_gate_natively(x)
        assert jittery.eval().can_gate_natively(x)
        others = (TopKRouter(6, 4, backend="eager"), TopKRouter(6, 4, RouterConfig.gshard()))
        assert not any(other.can_gate_natively(x) for other in others)
        assert not any(router.can_gate_natively(tokens) for tokens in (x.double(), x.to("meta")))
        with use_backend("eager"):
            assert not router.can_gate_natively(x)
        with torch.profiler.profile():
            assert not router.can_gate_natively(x)


# ------------------------------------------------------------- the product: float32, without a
# float32 copy of tokens


LOW = [BF16, F16]
TOKENS, FEATURES, EXPERTS = 20, 64, 6


def problem(dtype, weight_dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, FEATURES, generator=generator).to(dtype)
    weight = torch.randn(EXPERTS, FEATURES, generator=generator).to(weight_dtype)
    return x.requires_grad_(), weight.requires_grad_()


@NATIVE
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
    x = (
        torch.randn(tokens, features, generator=generator)
        .to(dtypes[0])
        .requires_grad_(frozen != "tokens")
    )
    weight = (
        torch.randn(experts, features, generator=generator)
        .to(dtypes[1])
        .requires_grad_(frozen != "weight")
    )
    logits = float32_logits(x, weight, "native")
    logits.backward(grad)
    want = x.detach().double() @ weight.detach().double().t()
    assert_close(logits.detach().double(), want, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(float32_logits(x, weight, "native"), logits)
    assert (x.grad is None) == (frozen == "tokens")
    assert (weight.grad is None) == (frozen == "weight")
    for got, value in (
        (x.grad, grad.double() @ weight.double()),
        (weight.grad, grad.double().t() @ x.double()),
    ):
        if got is not None:
            assert_close(
                got, value.to(got.dtype), rtol=2e-2 if got.dtype in LOW else 1e-5, atol=1e-4
            )


@in_two_dtypes
def test_second_derivatives_and_transforms(dtype):
    x, weight = problem(dtype, dtype)
    first = torch.autograd.grad(float32_logits(x, weight).square().sum(), x, create_graph=True)[0]
    assert torch.autograd.grad(first.float().square().sum(), weight)[0].isfinite().all()
    each = torch.func.vmap(lambda rows: float32_logits(rows, weight))(torch.stack([x, x]))
    assert_close(each[1], float32_logits(x, weight))


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


@either("grad")
@pytest.mark.parametrize(
    "dtype, weight_dtype, copies",
    [
        (torch.bfloat16, torch.bfloat16, False),
        (torch.float16, torch.float16, False),
        (torch.bfloat16, torch.float32, False),
        (
            torch.float16,
            torch.float32,
            True,
        ),  # float16's range cannot hold the remainders of a float32 weight
    ],
    ids=str,
)
def test_no_copy_of_the_tokens_on_a_gpu(dtype, weight_dtype, copies, grad):
    router = TopKRouter(FEATURES, EXPERTS, device="meta")
    with FakeTensorMode(), torch.set_grad_enabled(grad):
        router.weight = torch.nn.Parameter(
            torch.empty(EXPERTS, FEATURES, device="cuda", dtype=weight_dtype)
        )
        x = torch.empty(TOKENS, FEATURES, device="cuda", dtype=dtype)
        with Recorded() as recorded:
            out = router(x)
    assert (out.logits.dtype, out.logits.shape) == (torch.float32, (TOKENS, EXPERTS))
    assert ("aten.mm.dtype" in recorded.operations) != copies
    assert recorded.copies == ([torch.float32] if copies else [])


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_what_a_gpu_computes_is_as_exact_as_float32(weight_dtype, monkeypatch):
    """The CPU simulates the GPU's products of bfloat16 in float32."""
    for name in ("mm", "bmm"):
        monkeypatch.setattr(torch, name, lambda a, b, out_dtype: a.to(out_dtype) @ b.to(out_dtype))
    x, weight = problem(torch.bfloat16, weight_dtype)
    grad = torch.randn(TOKENS, EXPERTS)
    wanted = x.double() @ weight.double().T
    (of_weight,) = torch.autograd.grad(wanted, weight, grad.double())
    close = partial(assert_close, rtol=1e-5, atol=1e-5)
    close(logits_of_low_precision(x, weight).double(), wanted)
    monkeypatch.setattr(router_module, "_on_gpu", lambda _: True)
    close(torch.autograd.grad(float32_logits(x, weight, "eager"), weight, grad)[0], of_weight)


def test_the_backend_asked_for_computes(monkeypatch):
    called = []
    monkeypatch.setattr(router_module, "native_logits", lambda *arguments: called.append(arguments))
    for backend in ("eager", "native", None):
        with torch.no_grad():
            float32_logits(*problem(torch.bfloat16, torch.bfloat16), backend)
    assert len(called) == 2 * ("native" in available_backends())


@pytest.mark.parametrize("settings", [{}, {"moe_type": "moe"}, {"moe_type": "none"}])
def test_the_backend_asked_for_finds_the_slots(settings, monkeypatch):
    asked = []

    def spy(*arguments, backend):
        asked.append(backend)
        return route(*arguments, backend=backend)

    monkeypatch.setattr(router_module, "route", spy)
    monkeypatch.setattr(feed_forward_module, "route", spy)
    for backend in ("eager", None):
        config = MPOEConfig(num_experts=4, shape="separable", backend=backend, **settings)
        MPOEFeedForward(8, 16, config).train()(torch.randn(5, 8))
    assert asked == ["eager", None]


def test_a_second_choice_of_no_share_is_never_drawn(monkeypatch):
    router = TopKRouter(2, 2, RouterConfig.gshard(second_policy="random")).train()
    monkeypatch.setattr(torch, "rand_like", torch.zeros_like)  # the least that is drawn
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[200.0, 0.0], [0.0, 0.0]]))
    out = router(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    assert out.kept.tolist() == [[True, False], [True, True]]
