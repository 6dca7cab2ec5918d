"""Layers without gradients: native calls in place of the ops of router and experts, with the same
results."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize
from torch.testing import assert_close

from mpoe.config import MPOEConfig, RouterConfig
from mpoe.layers import HiddenFeedForward, MPOEFeedForward, NeuronFeedForward
from mpoe.layers.context import routing_context
from mpoe.layers.expert_cache import ExpertCache
from mpoe_kernels import available_backends, experts, mixture, use_backend
from tests.assertions import refuses
from tests.cases import either

pytestmark = pytest.mark.skipif(
    "native" not in available_backends(), reason="the native kernels are not built"
)
F32, BF16 = torch.float32, torch.bfloat16
I, F, E = 12, 40, 5
every_kind = pytest.mark.parametrize("kind", ["separable", "hidden", "neurons"])


class Dense(nn.Module):
    """A dense network, for experts beside or between its projections."""

    def __init__(self, gated, dtype):
        super().__init__()
        self.up, self.down = nn.Linear(I, F, dtype=dtype), nn.Linear(F, I, dtype=dtype)
        self.gate = nn.Linear(I, F, dtype=dtype) if gated else None
        self.dropout = nn.Dropout(0.0)
        self.scale = 2.0  # something that only its own forward knows

    def forward(self, x):
        h = self.up(x).relu() if self.gate is None else self.gate(x).relu() * self.up(x)
        return self.scale * self.down(self.dropout(h))


def made(kind="separable", gated=False, bias=False, dtype=F32, options=None, **router):
    """5 experts that contribute, in eval mode; ``options``: of the `MPOEConfig`."""
    torch.manual_seed(0)
    own = {
        "hidden": {"block_size": 8, "expert_bias": bias},
        "neurons": {"neurons": 7, "expert_bias": bias},
    }
    settings = RouterConfig(**{"init_scale": 4.0, "top_k": 2, **router})
    config = MPOEConfig(
        shape=kind, num_experts=E, router=settings, **{**own.get(kind, {}), **(options or {})}
    )
    activation = "silu" if gated else "gelu"
    if kind not in own:
        layer = MPOEFeedForward(
            I, F, config, activation=activation, gated=gated, bias=bias, dtype=dtype
        )
    else:
        dense, names = (
            Dense(gated, dtype),
            {"up": "up", "down": "down"} | ({"gate_proj": "gate"} if gated else {}),
        )
        class_ = HiddenFeedForward if kind == "hidden" else NeuronFeedForward
        layer = class_(I, F, config, names=names, activation=activation, gated=gated, dtype=dtype)
        (layer.adopt if kind == "hidden" else lambda parts: layer.around(dense, parts))(
            {each: getattr(dense, name) for each, name in names.items()}
        )
    for parameter in layer.experts.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer.eval()


def by_ops(layer, x, mask=None):
    """What the ops compute: a hook is a reason to take them."""
    handle = layer.experts.register_forward_hook(lambda *_: None)
    try:
        return layer(x, token_mask=mask)
    finally:
        handle.remove()


@pytest.fixture
def calls(monkeypatch):
    """The native functions that computed something."""
    seen = []

    def watched(module, name, own):
        def call(*arguments):
            found = own(*arguments)
            seen.extend([name] * (found is not None))
            return found

        monkeypatch.setattr(f"mpoe.layers.{module}.{name}", call)

    watched("experts", "routed_ffn", mixture.routed_ffn)
    watched("neurons", "routed_neurons", experts.routed_neurons)
    watched("hidden", "routed_hidden", experts.routed_hidden)
    return seen


OF_KIND = {"separable": "routed_ffn", "hidden": "routed_hidden", "neurons": "routed_neurons"}

# ------------------------------------------------------------- with experts


@given(
    kind=st.sampled_from(["separable", "light", "paper", "hidden", "neurons"]),
    tokens=st.integers(0, 40),
    gated=st.booleans(),
    bias=st.booleans(),
    dtype=st.sampled_from([F32, BF16]),
    router=st.fixed_dictionaries({"top_k": st.integers(1, 5), "is_scale_prob": st.booleans()}),
    capacity=st.sampled_from([None, 0.5]),
    variant=st.booleans(),
    masks=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_same_bits_as_the_ops(
    kind, tokens, gated, bias, dtype, router, capacity, variant, masks, seed
):
    """``variant``: shared blocks of hidden-side experts, neurons in a latent space. x and mask have
    gaps."""
    options = {
        "hidden": {"block_per_group": not variant},
        "neurons": {"latent": 6 if variant else None},
    }.get(kind, {})
    if kind == "neurons":
        router = {**router, "routed_scaling_factor": 1.5 if variant else None}
    elif kind != "hidden":
        router = {**router, "eval_capacity_factor": capacity, "min_capacity": 1}
    layer = made(kind, gated, bias, dtype, options, **router)
    torch.manual_seed(seed)
    x, mask = (
        torch.randn(I, tokens).t().to(dtype),
        (torch.rand(tokens, 2) < 0.7)[:, 0] if masks else None,
    )
    with torch.no_grad():
        want = by_ops(layer, x, mask)
        if kind == "hidden":
            close = 1e-5 if dtype == F32 else 3e-2
            assert_close(layer(x, mask), want, rtol=close, atol=close)
            return
        assert torch.equal(layer(x, token_mask=mask), want)
        with ExpertCache(10**9, [layer.experts] * (kind != "neurons")).in_use():
            assert torch.equal(layer(x, token_mask=mask), want)


@every_kind
def test_what_runs(kind, calls):
    layer, x = made(kind), torch.randn(3, I)
    with torch.no_grad():
        for rows in (x, x, x[:1]):
            layer(rows)
        assert calls == [OF_KIND[kind]] * 3
        with routing_context(record=False):
            layer(x)
        assert calls.pop() == OF_KIND[kind]
        with routing_context():
            layer(x)
        assert calls[3:] == (
            ["routed_hidden"] if kind == "hidden" else []
        )  # the router's decision is shown
        if kind != "separable":
            calls.clear()
            layer(x[:0])
            assert len(calls) == (kind == "neurons")


@every_kind
@either("masked")
def test_records_are_those_of_the_ops(kind, masked):
    layer, x = made(kind), torch.randn(7, I)
    mask = torch.tensor([True] * 5 + [False] * 2) if masked else None
    with torch.no_grad():
        with routing_context() as own:
            layer(x, token_mask=mask)
        with routing_context() as ops:
            by_ops(layer, x, mask)
    (one,), (other,) = own.records, ops.records
    assert (one.token_mask is None) == (other.token_mask is None) == (not masked)
    for name in ("logits", "top_k_index", "expert_load"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


HOOKS = {
    "forward": lambda module: module.register_forward_hook(lambda *_: None),
    "forward pre": lambda module: module.register_forward_pre_hook(lambda *_: None),
    "backward": lambda module: module.register_full_backward_hook(lambda *_: None),
    "backward pre": lambda module: module.register_full_backward_pre_hook(lambda *_: None),
    "of every module": lambda module: nn.modules.module.register_module_forward_hook(
        lambda *_: None
    ),
}


@every_kind
def test_whoever_observes_a_part_gets_the_ops(calls, kind):
    layer, x = made(kind), torch.randn(3, I)
    with torch.no_grad():
        for part in (layer.router, layer.experts):
            for hook in HOOKS.values():
                handle = hook(part)
                try:
                    layer(x)
                finally:
                    handle.remove()
            own = part.forward
            part.forward = lambda *values, own=own: own(*values)
            layer(x)
            del part.forward
        assert calls == []
        layer(x)
        assert calls == [OF_KIND[kind]]


@every_kind
def test_who_else_has_a_part_in_a_call_gets_the_ops(calls, kind):
    layer, x = made(kind), torch.randn(3, I)
    layer(x).sum().backward()
    assert layer.router.weight.grad is not None
    with torch.no_grad():
        with use_backend("eager"):
            layer(x)
        with torch.autocast("cpu", dtype=BF16):
            layer(x)
        layer.train()(x)
        layer.experts.backend = "eager"
        layer.eval()(x)
        layer.experts.backend = None
        torch.compile(layer, backend="eager", fullgraph=True)(x)
        if kind == "neurons":
            made(kind, scoring_func="sigmoid")(x)
        if kind == "hidden":
            own = made(kind)
            parametrize.register_parametrization(own.experts.auxiliary, "right", nn.Identity())
            own(x)
        layer.double()(x.double())
        assert calls == []
        if kind == "hidden":
            mask = torch.tensor([True, False, True])
            assert layer.float()(x, mask)[1].eq(0).all()
            layer.train().expert_dropout = 0.5
            assert not torch.equal(layer(x), layer(x))
            assert calls == []


@every_kind
def test_router_and_experts_have_the_backend_of_the_configuration(kind):
    layer = made(kind, options={"backend": "eager"})
    assert layer.router.backend == layer.experts.backend == "eager"


def test_another_backend_for_a_projection_gets_the_ops(calls, monkeypatch):
    layer, x, chosen = made(), torch.randn(3, I), mixture.chosen_for

    def eager_for_down(op, call, *rest):
        if call.out_features == I:
            call.backend = "eager"
        return chosen(op, call, *rest)

    monkeypatch.setattr(mixture, "chosen_for", eager_for_down)
    with torch.no_grad():
        assert_close(layer(x), by_ops(layer, x))
    assert calls == []


@pytest.mark.parametrize("tokens", [1, 4, 300])
@either("gated")
def test_the_result_takes_the_place_of_what_nobody_needs(gated, tokens):
    """Of a plain projection's rows; those that a hook, another module's result or a caller might
    hold stay."""
    layer, x, kept = made("hidden", gated), torch.randn(tokens, I), []
    own = layer.experts.routed
    layer.experts.routed = lambda *arguments: (
        kept.append((arguments[2], own(*arguments))) or kept[-1][1]
    )
    with torch.no_grad():
        want = layer(x)
        u, (o, _) = kept.pop()
        assert o.data_ptr() == u.data_ptr()
        handle = layer.up.register_forward_hook(lambda *_: None)
        before = layer.up(x)
        assert_close(layer(x), want)
        assert torch.equal(kept.pop()[0], before)
        handle.remove()
        layer.up = nn.Sequential(layer.up)
        assert_close(layer(x), want)
        assert torch.equal(kept.pop()[0], before)


# ------------------------------------------------------------- what does not fit


def spoiled(**blocks):
    layer = made("hidden")
    layer.experts.auxiliary.update({name: nn.Parameter(block) for name, block in blocks.items()})
    return layer


def with_part(kind, name, value):
    layer = made(kind, bias=True)
    parent, _, last = name.rpartition(".")
    setattr(layer.get_submodule(parent), last, value)
    return layer


@pytest.mark.parametrize(
    "layer, error, message",
    [
        (
            lambda: spoiled(left=torch.zeros(E, 5, 8, 8, dtype=BF16)),
            TypeError,
            "left must be of u's dtype",
        ),
        (lambda: spoiled(left=torch.zeros(E, 5, 4, 4)), ValueError, "left must be"),
        (
            lambda: spoiled(left=torch.zeros(E, 1, 16, 20)),
            ValueError,
            "left must be",
        ),  # as many numbers
        (
            lambda: spoiled(right=torch.zeros(25, 8, 8)),
            (TypeError, ValueError),
            "right must be|left must be",
        ),
        (lambda: with_part("hidden", "up", nn.Linear(I, 24)), ValueError, "bias must be"),
        (
            lambda: with_part("hidden", "router.weight", nn.Parameter(torch.zeros(E, 7))),
            RuntimeError,
            "multiplied",
        ),
        (
            lambda: with_part("separable", "experts.up.bias", nn.Parameter(torch.zeros(39))),
            ValueError,
            "bias",
        ),
        (
            lambda: with_part(
                "separable", "experts.up.bias", nn.Parameter(torch.zeros(F).to(BF16))
            ),
            TypeError,
            "bias",
        ),
    ],
)
def test_what_does_not_fit_is_refused_as_by_the_ops(calls, layer, error, message):
    with torch.no_grad(), pytest.raises(error, match=message):
        layer()(torch.randn(7, I))
    assert calls == []


def routed_neurons(**changed):
    x, up = torch.ones(3, 12), torch.ones(5, 7, 12)
    given = {
        "x": x,
        "router_weight": torch.ones(5, 12),
        "top_k": 2,
        "raw": False,
        "scale": 1.0,
        "token_mask": None,
        "rows": x,
        "neurons": {"up": up, "down": up},
        "activation": "relu",
    }
    return experts.routed_neurons(**(given | changed))


def test_neurons_that_do_not_fit_are_left_to_the_op():
    assert routed_neurons() is not None
    up = torch.ones(5, 7, 12)
    for name, value in {
        "x": torch.ones(2, 12),
        "router_weight": torch.ones(4, 12),
        "rows": torch.ones(3, 11),
        "neurons": {"up": up, "down": up.double()},
    }.items():
        assert routed_neurons(**{name: value}) is None, name
    refuses(ValueError, r"top_k must lie in 1\.\.5; got 6", routed_neurons, top_k=6)
