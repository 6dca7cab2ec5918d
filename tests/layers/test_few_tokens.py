"""What one native call computes without gradients: the router's decision, and the hidden-side experts it chooses."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from mpoe.config import MPOEConfig, RouterConfig
from mpoe.layers import HiddenFeedForward, TopKRouter, hidden
from mpoe.layers.context import routing_context
from mpoe_kernels import available_backends, use_backend

pytestmark = pytest.mark.skipif("native" not in available_backends(), reason="the native kernels are not built")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def by_pytorch(router: TopKRouter, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, experts and gates as computed by PyTorch's ops."""
    with torch.enable_grad(), use_backend("eager"):
        found = router(x)
    return found.logits.detach(), found.top_k_index, found.top_k_weights.detach()


@given(
    tokens=st.integers(0, 20),
    features=st.integers(1, 140),
    experts=st.integers(1, 40),
    top_k=st.integers(1, 8),
    raw=st.booleans(),
    x_dtype=st.sampled_from([F32, BF16, F16]),
    weight_dtype=st.sampled_from([F32, BF16]),
    seed=st.integers(0, 99),
)
def test_a_router_decides_as_pytorch_does(
    tokens: int,
    features: int,
    experts: int,
    top_k: int,
    raw: bool,
    x_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    seed,
) -> None:
    torch.manual_seed(seed)
    config = RouterConfig(top_k=min(top_k, experts), is_scale_prob=raw, init_scale=4.0)
    router = TopKRouter(features, experts, config, dtype=weight_dtype)
    x = torch.randn(tokens, features).to(x_dtype)
    with torch.no_grad():
        assert router.can_gate_natively(x)
        found = router(x)
    logits, index, gates = by_pytorch(router, x)
    torch.testing.assert_close(found.logits, logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.top_k_weights, gates, rtol=1e-5, atol=1e-6)
    chosen = found.logits.gather(-1, found.top_k_index)
    torch.testing.assert_close(chosen, logits.gather(-1, index), rtol=1e-5, atol=1e-5)
    assert all(len(set(row)) == len(row) for row in found.top_k_index.tolist())


def test_equal_logits_choose_the_first_experts() -> None:
    router = TopKRouter(5, 6, RouterConfig(top_k=3, init_scale=0.0))
    with torch.no_grad():
        found = router(torch.randn(4, 5))
    assert found.top_k_index.tolist() == [[0, 1, 2]] * 4
    torch.testing.assert_close(found.top_k_weights, torch.full((4, 3), 1 / 3))


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("top_k", [1, 3])
def test_what_is_not_a_number_reaches_the_gates(raw: bool, bad: float, top_k: int) -> None:
    router = TopKRouter(3, 4, RouterConfig(top_k=top_k, is_scale_prob=raw))
    with torch.no_grad():
        router.weight.fill_(1.0)
        x = torch.ones(2, 3)
        x[1, 0] = bad
        found = router(x)
    assert found.top_k_weights[1].isnan().all()
    assert not found.top_k_weights[0].isnan().any()
    assert ((found.top_k_index >= 0) & (found.top_k_index < 4)).all()


def test_an_infinitely_unlikely_expert_has_the_gate_zero() -> None:
    router = TopKRouter(1, 3, RouterConfig(top_k=2))
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[-float("inf")], [1.0], [-float("inf")]]))
        found = router(torch.ones(1, 1))
    assert found.top_k_index.tolist() == [[1, 0]]
    assert found.top_k_weights.tolist() == [[1.0, 0.0]]


def test_who_else_has_a_part_in_a_call_sees_pytorch_ops() -> None:
    router, x = TopKRouter(6, 4), torch.randn(3, 6)
    assert not router.can_gate_natively(x)  # its weight needs a gradient
    with torch.no_grad():
        assert router.can_gate_natively(x)
        assert not router.can_gate_natively(x.double())
        assert not router.can_gate_natively(x.to("meta"))
        with use_backend("eager"):
            assert not router.can_gate_natively(x)
        assert not TopKRouter(6, 4, backend="eager").can_gate_natively(x)
        assert TopKRouter(6, 4, backend="native").can_gate_natively(x)
        assert not TopKRouter(6, 4, RouterConfig.gshard()).can_gate_natively(x)
        jittery = TopKRouter(6, 4, RouterConfig(jitter=0.1))
        assert not jittery.can_gate_natively(x)
        assert jittery.eval().can_gate_natively(x)
        with torch.profiler.profile():
            assert not router.can_gate_natively(x)


# ------------------------------------------------------------- experts with their router


def feed_forward(top_k: int = 2, gated: bool = False, dtype: torch.dtype = F32, **options) -> HiddenFeedForward:
    router = RouterConfig(top_k=top_k, init_scale=4.0)
    config = MPOEConfig(shape="hidden", num_experts=5, block_size=8, router=router, **options)
    names = {"up": "up", "down": "down"} | ({"gate_proj": "gate"} if gated else {})
    layer = HiddenFeedForward(12, 32, config, names=names, activation="silu" if gated else "relu", dtype=dtype)
    layer.adopt({k: nn.Linear(*((32, 12) if k == "down" else (12, 32)), dtype=dtype) for k in names})
    for core in layer.experts.auxiliary.values():
        nn.init.normal_(core)
    if layer.experts.bias is not None:
        nn.init.normal_(layer.experts.bias)
    return layer.eval()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """For each call considered, whether router and experts ran as one native call."""
    seen: list[bool] = []
    own = hidden.HiddenExperts.routed

    def watched(*arguments):
        found = own(*arguments)
        seen.append(found is not None)
        return found

    monkeypatch.setattr(hidden.HiddenExperts, "routed", watched)
    return seen


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("options", [{}, {"block_per_group": False}, {"expert_bias": True}], ids=str)
@pytest.mark.parametrize("shape", [(1, 12), (2, 3, 12), (0, 12)], ids=str)
def test_one_call_gives_what_router_and_op_give(dtype, gated, options, shape, calls) -> None:
    torch.manual_seed(0)
    layer, x = feed_forward(gated=gated, dtype=dtype, **options), torch.randn(shape, dtype=dtype)
    with torch.no_grad(), routing_context() as together:
        y = layer(x)
    assert calls == [x.numel() > 0]
    with torch.no_grad(), use_backend("eager"), routing_context() as apart:
        want = layer(x)
    assert calls[1:] == [False]
    assert y.shape == x.shape
    torch.testing.assert_close(
        y, want, **({"rtol": 1e-5, "atol": 1e-5} if dtype == F32 else {"rtol": 3e-2, "atol": 3e-2})
    )
    (one,), (other,) = together.records, apart.records
    assert torch.equal(one.top_k_index, other.top_k_index)
    assert torch.equal(one.expert_load, other.expert_load)
    torch.testing.assert_close(one.logits, other.logits)


def test_hooks_masks_dropouts_and_gradients_take_the_longer_way(calls) -> None:
    layer, x = feed_forward(), torch.randn(4, 12)
    with torch.no_grad():
        layer(x)
        assert calls.pop()
        seen: list[str] = []
        for module, name in ((layer.router, "router"), (layer.experts, "experts")):
            handle = module.register_forward_hook(lambda *_, name=name: seen.append(name))
            layer(x)
            assert not calls.pop()
            assert seen.pop() == name
            handle.remove()
        own = layer.router.forward
        layer.router.forward = lambda x: seen.append("replaced") or own(x)
        layer(x)
        assert not calls.pop()
        assert seen.pop() == "replaced"
        del layer.router.forward
        mask = torch.tensor([True, False, True, True])
        assert layer(x, mask)[1].eq(0).all()
        assert not calls
        layer.train()
        layer(x)
        assert calls.pop()
        layer.expert_dropout = 0.5
        assert not torch.equal(layer(x), layer(x))
        assert not calls
    layer.eval()(x).sum().backward()
    assert not calls
    assert layer.router.weight.grad is not None


@pytest.mark.parametrize("tokens", [1, 4, 300])
@pytest.mark.parametrize("gated", [False, True])
def test_the_result_takes_the_place_of_what_nobody_needs(gated, tokens, calls) -> None:
    """Of a plain projection's rows; those that a hook, another module's result or a caller might hold stay."""
    torch.manual_seed(0)
    layer, x, kept = feed_forward(gated=gated), torch.randn(tokens, 12), []
    own = layer.experts.routed
    layer.experts.routed = lambda *arguments: kept.append((arguments[2], own(*arguments))) or kept[-1][1]
    with torch.no_grad():
        want = layer(x)
        u, (o, _) = kept.pop()
        assert o.data_ptr() == u.data_ptr()
        handle = layer.up.register_forward_hook(lambda *_: None)
        before = layer.up(x)
        torch.testing.assert_close(layer(x), want)
        assert torch.equal(kept.pop()[0], before)
        handle.remove()
        layer.up = nn.Sequential(layer.up)
        torch.testing.assert_close(layer(x), want)
        assert torch.equal(kept.pop()[0], before)
    assert calls == [True] * 3


def test_what_does_not_fit_is_refused_by_the_op(calls) -> None:
    layer, x = feed_forward(), torch.randn(4, 12)
    layer.experts.auxiliary["left"] = nn.Parameter(torch.zeros(5, 4, 8, 8, dtype=BF16))
    with torch.no_grad(), pytest.raises(TypeError, match="left must have the dtype of u"):
        layer(x)
    layer.experts.auxiliary["left"] = nn.Parameter(torch.zeros(5, 4, 4, 4))
    with torch.no_grad(), pytest.raises(ValueError, match="left must be"):
        layer(x)
    layer = feed_forward()
    layer.up = nn.Linear(12, 24)
    with torch.no_grad(), pytest.raises(ValueError, match="right must be"):
        layer(x)
    layer = feed_forward()
    layer.router.weight = nn.Parameter(torch.zeros(5, 7))
    with torch.no_grad(), pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        layer(x)
    layer = feed_forward()  # the same number of elements, in blocks of another shape
    layer.experts.auxiliary["left"] = nn.Parameter(torch.zeros(5, 1, 16, 16))
    with torch.no_grad(), pytest.raises(ValueError, match="left must be"):
        layer(x)
    layer.experts.auxiliary["right"] = nn.Parameter(torch.zeros(20, 8, 8))
    with torch.no_grad(), pytest.raises((TypeError, ValueError), match="left must be"):
        layer(x)
    assert not any(calls)
    assert len(calls) == 6


def test_compiled_without_a_break(calls) -> None:
    layer, x = feed_forward(), torch.randn(4, 12)
    with torch.no_grad():
        want = layer(x)
        got = torch.compile(layer, fullgraph=True, backend="eager")(x)
    assert calls[0]
    assert torch.allclose(got, want, atol=1e-5)
