"""Mixtures of MPO experts without gradients: native calls in place of the ops, with the same bits."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from mpoe.config import MPOEConfig, RouterConfig
from mpoe.layers import MPOEFeedForward, NeuronFeedForward
from mpoe.layers.context import routing_context
from mpoe.layers.expert_cache import ExpertCache
from mpoe_kernels import available_backends, mixture, use_backend

pytestmark = pytest.mark.skipif("native" not in available_backends(), reason="the native kernels are not built")
F32, BF16 = torch.float32, torch.bfloat16


def feed_forward(
    shape: str = "separable", gated: bool = False, bias: bool = False, dtype: torch.dtype = F32, **router: Any
) -> MPOEFeedForward:
    torch.manual_seed(0)
    config = MPOEConfig(shape=shape, num_experts=5, router=RouterConfig(init_scale=4.0, **router))
    layer = MPOEFeedForward(12, 40, config, activation="silu" if gated else "gelu", gated=gated, bias=bias, dtype=dtype)
    for parameter in layer.experts.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer.eval()


class Dense(nn.Module):
    """A dense network of 12 x 40."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 40, dtype=dtype), nn.Linear(40, 12, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


def neurons(
    gated: bool = False, bias: bool = False, dtype: torch.dtype = F32, latent: int | None = None, **router: Any
) -> NeuronFeedForward:
    """5 experts of 7 neurons that contribute, around a `Dense`."""
    torch.manual_seed(0)
    settings = RouterConfig(init_scale=4.0, **router)
    config = MPOEConfig(shape="neurons", num_experts=5, neurons=7, latent=latent, router=settings)
    names, dense = {"up": "up", "down": "down"}, Dense(dtype)
    layer = NeuronFeedForward(12, 40, config, names=names, activation="silu", gated=gated, bias=bias, dtype=dtype)
    layer.around(dense, {"up": dense.up, "down": dense.down})
    for parameter in layer.experts.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer.eval()


def by_ops(layer: MPOEFeedForward | NeuronFeedForward, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """What the ops compute: a hook is a reason to take them."""
    handle = layer.experts.register_forward_hook(lambda *_: None)
    try:
        return layer(x, token_mask=mask)
    finally:
        handle.remove()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The functions that computed mixtures."""
    seen: list[str] = []

    def watched(name: str) -> None:
        own = getattr(mixture, name)

        def call(*arguments: Any) -> Any:
            found = own(*arguments)
            if found is not None:
                seen.append(name)
            return found

        monkeypatch.setattr(f"mpoe.layers.experts.{name}", call)

    watched("routed_ffn")
    watched("plain_ffn")
    return seen


@given(
    tokens=st.integers(0, 9),
    shape=st.sampled_from(["separable", "light", "paper"]),
    gated=st.booleans(),
    bias=st.booleans(),
    dtype=st.sampled_from([F32, BF16]),
    top_k=st.integers(1, 5),
    raw=st.booleans(),
    capacity=st.sampled_from([None, 0.5]),
    masks=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_same_bits_as_the_ops(tokens, shape, gated, bias, dtype, top_k, raw, capacity, masks, seed) -> None:
    router = {"top_k": top_k, "is_scale_prob": raw, "eval_capacity_factor": capacity, "min_capacity": 1}
    layer = feed_forward(shape, gated, bias, dtype, **router)
    torch.manual_seed(seed)
    x, mask = torch.randn(tokens, 12).to(dtype), torch.rand(tokens) < 0.7 if masks else None
    with torch.no_grad():
        want = by_ops(layer, x, mask)
        assert torch.equal(layer(x, mask), want)  # without a cache
        with ExpertCache(10**9, [layer.experts]).in_use():
            for _ in range(3):
                assert torch.equal(layer(x, mask), want)


@given(
    tokens=st.integers(0, 40),
    gated=st.booleans(),
    bias=st.booleans(),
    dtype=st.sampled_from([F32, BF16]),
    latent=st.none() | st.just(6),
    top_k=st.integers(1, 5),
    raw=st.booleans(),
    factor=st.none() | st.just(1.5),
    masks=st.booleans(),
    seed=st.integers(0, 99),
)
def test_neurons_have_the_same_bits(tokens, gated, bias, dtype, latent, top_k, raw, factor, masks, seed) -> None:
    router = {"top_k": top_k, "is_scale_prob": raw, "routed_scaling_factor": factor}
    layer = neurons(gated, bias, dtype, latent, **router)
    torch.manual_seed(seed)
    x, mask = torch.randn(tokens, 12).to(dtype), torch.rand(tokens) < 0.7 if masks else None
    with torch.no_grad():
        assert torch.equal(layer(x, token_mask=mask), by_ops(layer, x, mask))


def test_when_neurons_take_one_call(monkeypatch) -> None:
    seen: list[str] = []
    own = mixture.routed_neurons
    monkeypatch.setattr("mpoe.layers.neurons.routed_neurons", lambda *given: seen.append("one call") or own(*given))
    layer, x = neurons(top_k=2), torch.randn(3, 12)
    layer(x)  # a gradient may be wanted
    with torch.no_grad():
        by_ops(layer, x)
        with routing_context():
            layer(x)  # the router's decision is recorded
        neurons(top_k=2, scoring_func="sigmoid")(x)
        with use_backend("eager"):
            layer(x)
        layer.train()(x)
        assert seen == []
        layer.eval()(x)
        with routing_context(record=False):
            layer(x)
    assert seen == ["one call"] * 2


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.ones(2, 12)}, r"x must be float32 \[3, 12\]; got"),
        ({"weight": torch.ones(4, 12)}, r"weight must be float32 \[5, 12\]; got"),
        ({"rows": torch.ones(3, 11)}, r"up must be float32 \[5, 7, 11\]; got"),
        ({"rule": mixture.Rule(6, False, None)}, r"top_k must lie in 1\.\.5; got 6"),
    ],
)
def test_neurons_that_do_not_fit(changed: dict[str, Any], message: str) -> None:
    x, up = torch.ones(3, 12), torch.ones(5, 7, 12)
    given = {"x": x, "weight": torch.ones(5, 12), "rule": mixture.Rule(2, False, None), "scale": 1.0, "rows": x}
    given |= {"neurons": mixture.Neurons(up, up, None, None, "relu"), "token_mask": None}
    with pytest.raises(ValueError, match=message):
        mixture.routed_neurons(**(given | changed))


def test_what_runs(calls) -> None:
    layer, x = feed_forward(), torch.randn(3, 12)
    with torch.no_grad():
        layer(x)
        for _ in range(3):
            layer(x)
        layer(x[:1])
        assert calls == ["routed_ffn"] * 5
        with routing_context() as context:
            layer(x)
        assert calls.pop() == "plain_ffn"  # the router's decision is shown
        assert context.records[0].logits.shape == (3, 5)
        assert int(context.records[0].expert_load.sum()) == 3
        with routing_context(record=False):
            layer(x)
        assert calls.pop() == "routed_ffn"


def test_another_backend_for_a_projection_gets_the_ops(calls, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x, chosen = feed_forward(), torch.randn(3, 12), mixture.chosen_for

    def eager_for_down(op: str, call: Any, *rest: Any) -> Any:
        if call.out_features == 12:
            call.backend = "eager"
        return chosen(op, call, *rest)

    monkeypatch.setattr(mixture, "chosen_for", eager_for_down)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), by_ops(layer, x))
    assert calls == ["plain_ffn"]


def test_records_are_those_of_the_ops() -> None:
    layer, x = feed_forward(top_k=2), torch.randn(7, 12)
    mask = torch.tensor([True] * 5 + [False] * 2)
    with torch.no_grad():
        with routing_context() as own:
            layer(x, mask)
        with routing_context() as ops:
            by_ops(layer, x, mask)
    (one,), (other,) = own.records, ops.records
    for name in ("logits", "top_k_index", "expert_load", "token_mask"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


def test_who_else_has_a_part_in_a_call_gets_the_ops(calls) -> None:
    layer, x = feed_forward(), torch.randn(3, 12)
    layer(x).sum().backward()
    assert layer.router.weight.grad is not None
    with torch.no_grad():
        for _ in range(2):
            by_ops(layer, x)
        handle = layer.router.register_forward_pre_hook(lambda *_: None)
        layer(x)
        handle.remove()
        with use_backend("eager"):
            layer(x)
        with torch.autocast("cpu", dtype=BF16):
            layer(x)
        layer.train()
        layer(x)
        layer.eval()
        torch.compile(layer, backend="eager", fullgraph=True)(x)
        assert calls == []
        layer.double()
        layer(x.double())
        assert calls == []
        layer.float()
        layer.experts.up.bias = nn.Parameter(torch.zeros(40, dtype=BF16))
        with pytest.raises(TypeError, match="bias"):
            layer(x)


HOOKS = {
    "forward": lambda module: module.register_forward_hook(lambda *_: None),
    "forward pre": lambda module: module.register_forward_pre_hook(lambda *_: None),
    "backward": lambda module: module.register_full_backward_hook(lambda *_: None),
    "backward pre": lambda module: module.register_full_backward_pre_hook(lambda *_: None),
    "of every module": lambda module: nn.modules.module.register_module_forward_hook(lambda *_: None),
}


@pytest.mark.parametrize("part", ["router", "experts"])
@pytest.mark.parametrize("hook", HOOKS)
def test_whoever_observes_a_part_gets_the_ops(calls, hook: str, part: str) -> None:
    layer, x = feed_forward(), torch.randn(3, 12)
    handle = HOOKS[hook](getattr(layer, part))
    try:
        with torch.no_grad():
            layer(x)
        assert calls == []
    finally:
        handle.remove()
    with torch.no_grad():
        layer(x)
    assert calls == ["routed_ffn"]
    own = layer.router.forward
    layer.router.forward = lambda *values: own(*values)
    with torch.no_grad():
        layer(x)
    assert calls == ["routed_ffn"]


@pytest.mark.parametrize("bias", [False, True])
def test_changed_cores_and_biases_are_seen(calls, bias: bool) -> None:
    layer, x = feed_forward(bias=bias), torch.randn(3, 12)
    with torch.no_grad():
        for _ in range(3):
            layer(x)
        for parameter in (*layer.experts.parameters(), layer.router.weight):
            parameter.add_(0.1)
            layer(x)
            assert torch.equal(layer(x), by_ops(layer, x))
        if bias:
            layer.experts.down.bias = nn.Parameter(torch.ones(12))
            assert torch.equal(layer(x), by_ops(layer, x))
        assert torch.equal(layer(x.t().contiguous().t()), by_ops(layer, x))
        layer.experts.activation = "relu"
        assert torch.equal(layer(x), by_ops(layer, x))
        layer.router.weight.data = layer.router.weight.data.t().contiguous().t()
        assert torch.equal(layer(x), by_ops(layer, x))
    assert set(calls) == {"routed_ffn"}


def test_what_does_not_fit_is_refused_as_by_the_ops(calls) -> None:
    layer, x = feed_forward(bias=True), torch.randn(3, 12)
    with torch.no_grad():
        layer.experts.up.bias = nn.Parameter(torch.zeros(39))
        with pytest.raises(ValueError, match="bias"):
            layer(x)
        apart = torch.randn(80)[::2]
        layer.experts.up.bias.data = apart
        assert torch.equal(layer(x), by_ops(layer, x))
        assert calls.pop() == "routed_ffn"
        layer.router.weight = nn.Parameter(torch.randn(6, 12))
        with pytest.raises(ValueError, match="expert_offsets"):
            layer(x)
    assert calls == []


def resized_to_nothing(layer: MPOEFeedForward) -> None:
    """What a sharded layer's parameters look like between its passes."""
    for parameter in layer.experts.parameters():
        parameter.untyped_storage().resize_(0)


def moved(layer: MPOEFeedForward) -> None:
    """Other memory under the same tensors, as a sharded layer's parameters get it before a pass."""
    for parameter in layer.experts.parameters():
        storage, values = parameter.untyped_storage(), parameter.detach().clone()
        size = storage.nbytes()
        storage.resize_(0)
        storage.resize_(size)
        parameter.copy_(values)


WAYS = {
    "shared": lambda layer: [parameter.share_memory_() for parameter in layer.parameters()],
    "pickled": ForkingPickler.dumps,  # what a queue of torch.multiprocessing does
    "moved": moved,
}


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_memory_that_moves_between_calls_is_followed(calls, way: str, gated: bool) -> None:
    layer, x = feed_forward(gated=gated, bias=True, top_k=2), torch.randn(3, 12)
    with torch.no_grad():
        wanted = by_ops(layer, x)
        for _ in range(3):
            layer(x)
        WAYS[way](layer)
        filler = [torch.full((n,), torch.nan) for n in range(1, 2000)]  # takes freed memory
        for _ in range(3):
            assert torch.equal(layer(x), wanted)
    assert set(calls) == {"routed_ffn"}
    assert len(filler) == 1999


def test_freed_memory_is_refused(calls) -> None:
    layer, x = feed_forward(bias=True), torch.randn(3, 12)
    with torch.no_grad():
        for _ in range(3):
            layer(x)
        resized_to_nothing(layer)
        with pytest.raises((ValueError, RuntimeError), match=r"must hold its values|setStorage: .* out of bounds"):
            layer(x)


def test_numbers_yet_to_be_negated_are() -> None:
    layer, x = feed_forward(top_k=2), torch.randn(3, 12)
    mask = torch.tensor([True, False, True])
    with torch.no_grad():
        wanted = by_ops(layer, x, mask)
        assert torch.equal(layer(torch._neg_view(-x), mask), wanted)
        for cores in (layer.experts.up, layer.experts.down):
            cores.central.data = torch._neg_view(-cores.central.data)
        assert torch.equal(layer(x, mask), wanted)
        layer.router.weight.data = torch._neg_view(-layer.router.weight.data)
        torch.testing.assert_close(layer(x, mask), wanted)  # PyTorch's router, whose sums round otherwise


def test_threads_share_a_layer() -> None:
    layer = feed_forward(gated=True, top_k=2)
    inputs = [torch.randn(4, 12) for _ in range(8)]
    with torch.no_grad():
        wanted = [by_ops(layer, x) for x in inputs]
        layer(inputs[0])
    wrong: list[int] = []

    def work(number: int) -> None:
        with torch.no_grad():
            for _ in range(50):
                if not torch.equal(layer(inputs[number]), wanted[number]):
                    wrong.append(number)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
