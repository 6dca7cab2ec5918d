"""`ExpertCache`: same results as without, dropped when a core changes, stays within its bound, unused in training."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mpoe.config import MPOEConfig, RouterConfig
from mpoe.layers import MPOEFeedForward
from mpoe.layers.expert_cache import ExpertCache, full_weights_pay
from mpoe_kernels import MPOShape
from mpoe_kernels.testing.assertions import relative_error

PLENTY = 10**9


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Full weights wherever they are allowed: matrices this small never benefit from them."""
    monkeypatch.setattr("mpoe.layers.experts.full_weights_pay", lambda *_: True)


def feed_forward(shape: str = "paper", gated: bool = False, top_k: int = 1, **options) -> MPOEFeedForward:
    config = MPOEConfig(num_experts=5, shape=shape, router=RouterConfig(top_k=top_k))
    ffn = MPOEFeedForward(24, 48, config, activation="gelu_new", gated=gated, bias=True, **options).eval()
    for projection in ffn.experts.projections().values():
        if projection.bias is not None:
            torch.nn.init.normal_(projection.bias)
    return ffn


def with_cache(ffn: MPOEFeedForward, max_bytes: int = PLENTY) -> ExpertCache:
    """A cache that has already seen its layer once, because nothing is kept from a first pass."""
    cache = ffn.experts.cache_experts(max_bytes)
    assert cache.layer(ffn.experts, ffn.experts.projections()) is None
    return cache


@torch.no_grad()
def both(ffn: MPOEFeedForward, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Outputs with and without the cache."""
    found, cache = ffn(x, mask), ffn.experts.expert_cache
    ffn.experts.expert_cache = None
    plain = ffn(x, mask)
    ffn.experts.expert_cache = cache
    return found, plain


def bytes_of_an_expert(ffn: MPOEFeedForward, dtype: torch.dtype = torch.float32) -> int:
    return 24 * 48 * len(ffn.experts.projections()) * dtype.itemsize


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("shape", ["paper", "separable"])
def test_same_results(shape: str, gated: bool, dtype: torch.dtype) -> None:
    ffn = feed_forward(shape, gated, top_k=2).to(dtype)
    cache = with_cache(ffn)
    x, mask = torch.randn(3, 7, 24, dtype=dtype), torch.rand(3, 7) > 0.3
    for _ in range(2):
        found, plain = both(ffn, x, mask)
        assert found.dtype == dtype
        assert relative_error(found, plain) < 8 * torch.finfo(dtype).eps
    report = cache.report()
    assert report.experts == report.built == report.hits > 0
    assert report.bytes >= report.experts * bytes_of_an_expert(ffn, dtype)
    assert f"{report.hits} hits" in str(report)
    (held,) = cache._layers.values()
    for kind, weight in held.weights(next(iter(held.full))[0], dtype).items():  # one row reads its longer axis at once
        assert (weight.t() if kind == "down" else weight).is_contiguous()


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("tokens", [0, 1, 40])
def test_any_number_of_tokens_and_experts_without_any(tokens: int) -> None:
    ffn = feed_forward()
    torch.nn.init.zeros_(ffn.router.weight)
    with torch.no_grad():
        ffn.router.weight[3] = 1.0  # every token with a positive sum goes to expert 3
    with_cache(ffn)
    found, plain = both(ffn, torch.rand(tokens, 24))
    torch.testing.assert_close(found, plain)
    assert ffn.experts.expert_cache.report().experts == min(tokens, 1)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("short", [0, 1])
def test_a_layer_has_full_weights_for_all_its_experts_or_for_none(short: int) -> None:
    """With one byte too few, every pass uses only the cores, in one call, with the cached blocks."""
    ffn = feed_forward("paper", top_k=2)
    with_cache(ffn)
    blocks = ffn.experts.expert_cache.layer(ffn.experts, ffn.experts.projections()).bytes
    cache = with_cache(ffn, blocks + 5 * bytes_of_an_expert(ffn) - short)
    for _ in range(3):
        found, plain = both(ffn, torch.randn(30, 24))
        torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)
        assert torch.equal(found, plain) == bool(short)
    report = cache.report()
    assert (report.experts, report.built, report.refused) == ((0, 0, 3) if short else (5, 5, 0))
    assert report.bytes == (blocks if short else cache.max_bytes)


@pytest.mark.usefixtures("always")
def test_room_is_reserved_for_experts_that_are_not_built_yet() -> None:
    """A layer that has used one expert reserves room for all: no other layer gets it, nor another dtype."""
    first, second = (feed_forward("light") for _ in range(2))
    room = 5 * bytes_of_an_expert(first) + 2 * 10**4
    cache = second.experts.expert_cache = with_cache(first, room)
    cache.layer(second.experts, second.experts.projections())
    with torch.no_grad():
        first(torch.randn(1, 24))
        assert cache.report().experts == 1
        for ffn in (second, first):
            for _ in range(2):
                ffn(torch.randn(40, 24))
                assert cache.report().bytes <= cache.max_bytes
        with torch.autocast("cpu", dtype=torch.bfloat16):
            first(torch.randn(40, 24))
    report = cache.report()
    assert (report.experts, report.refused) == (5, 3)
    cache.drop(first.experts)
    both(second, torch.randn(40, 24))
    assert cache.report().experts == 0  # the decision is made only once


@pytest.mark.usefixtures("always")
def test_what_runs_once_takes_no_room_from_what_runs_again() -> None:
    """An encoder runs once, a decoder for every token, with room for only one of them."""
    encoder, decoder = (feed_forward("light") for _ in range(2))
    cache = decoder.experts.expert_cache = encoder.experts.cache_experts(5 * bytes_of_an_expert(encoder) + 2 * 10**4)
    for ffn, experts, refused in ((encoder, 0, 0), (decoder, 0, 0), (decoder, 5, 0), (encoder, 5, 1)):
        both(ffn, torch.randn(40, 24))
        assert (cache.report().experts, cache.report().refused) == (experts, refused)


@pytest.mark.usefixtures("always")
def test_patience_builds_nothing_in_the_first_passes() -> None:
    ffn = feed_forward()
    cache = ffn.experts.expert_cache = ExpertCache(PLENTY, patience=2)
    for built in (0, 0, 0, 5):  # the first pass, then two of patience
        torch.testing.assert_close(*both(ffn, torch.randn(40, 24)), rtol=1e-4, atol=1e-5)
        assert (cache.report().built, cache.report().refused) == (built, 0)
    assert copy.deepcopy(cache).patience == 2


def test_weights_without_room_are_refused() -> None:
    ffn = feed_forward()
    held = with_cache(ffn).layer(ffn.experts, ffn.experts.projections())
    with pytest.raises(RuntimeError, match="need room that has_room reserved"):
        held.weights(0, torch.float32)


def test_without_room_for_the_blocks_nothing_is_held() -> None:
    ffn = feed_forward()
    cache = with_cache(ffn, 8)
    found, plain = both(ffn, torch.randn(6, 24))
    assert torch.equal(found, plain)
    assert (cache.report().bytes, cache.report().experts) == (0, 0)


def _optimizer_step(ffn: MPOEFeedForward) -> None:
    for parameter in ffn.experts.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(ffn.experts.parameters(), lr=0.1).step()


def _in_place(name: str) -> Callable[[MPOEFeedForward], None]:
    @torch.no_grad()
    def change(ffn: MPOEFeedForward) -> None:
        ffn.experts.get_parameter(name).mul_(2.0)

    return change


def _load(ffn: MPOEFeedForward) -> None:
    ffn.load_state_dict({name: 1.5 * value for name, value in ffn.state_dict().items()})


def _new_memory(ffn: MPOEFeedForward) -> None:
    """Done twice, so that an address could be reused."""
    for _ in range(2):
        ffn.experts.down.central.data = ffn.experts.down.central.data * 1.5


def _new_parameter(ffn: MPOEFeedForward) -> None:
    ffn.experts.up.auxiliary[0] = torch.nn.Parameter(2 * ffn.experts.up.auxiliary[0].detach())


def _loaded_weight(ffn: MPOEFeedForward) -> None:
    ffn.experts.up.load_weight_(torch.randn(24, 48))


CHANGES = {
    "optimizer step": _optimizer_step,
    "central in place": _in_place("up.central"),
    "first auxiliary in place": _in_place("up.auxiliary.0"),
    "last auxiliary in place": _in_place("down.auxiliary.3"),
    "load_state_dict": _load,
    "new memory": _new_memory,
    "new parameter": _new_parameter,
    "load_weight_": _loaded_weight,
    "to another dtype and back": lambda ffn: ffn.to(torch.bfloat16).to(torch.float32),
    "to another dtype": lambda ffn: ffn.to(torch.float64),
}


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_cores_is_noticed(change: str) -> None:
    ffn = feed_forward()
    with_cache(ffn)
    x = torch.randn(9, 24)
    before, _ = both(ffn, x)
    CHANGES[change](ffn)
    x = x.to(ffn.experts.dtype)
    found, plain = both(ffn, x)
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)
    assert not torch.equal(found, before.to(found.dtype))


@pytest.mark.usefixtures("always")
def test_moving_a_model_frees_at_once_and_a_change_through_data_needs_clear() -> None:
    ffn = feed_forward()
    cache = with_cache(ffn)
    both(ffn, torch.randn(9, 24))
    assert cache.report().bytes > 0
    ffn.to(torch.float32)
    assert cache.report().bytes == 0
    x = torch.randn(9, 24)
    both(ffn, x)
    both(ffn, x)
    assert cache.report().experts > 0
    ffn.experts.up.central.data.mul_(2.0)
    cache.clear()
    torch.testing.assert_close(*both(ffn, x), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_are_as_without_and_drop_what_was_held(frozen: bool) -> None:
    """With ``frozen``, only x needs a gradient."""
    ffn = feed_forward().requires_grad_(not frozen)
    x = torch.randn(9, 24, requires_grad=True)
    leaves = [x, *(p for p in ffn.parameters() if p.requires_grad)]
    plain = torch.autograd.grad(ffn(x).square().sum(), leaves)
    cache = with_cache(ffn)
    both(ffn, x)
    assert cache.report().experts > 0
    built = cache.report().built
    assert all(map(torch.equal, torch.autograd.grad(ffn(x).square().sum(), leaves), plain))
    assert (cache.report().bytes, cache.report().built) == (0, built)


@pytest.mark.usefixtures("always")
def test_dropout_runs_by_the_cores() -> None:
    ffn = feed_forward(dropout=0.5).train().requires_grad_(False)
    cache = with_cache(ffn)
    x = torch.randn(9, 24)
    torch.manual_seed(3)
    found = ffn(x)
    ffn.experts.cache_experts(None)
    torch.manual_seed(3)
    assert torch.equal(found, ffn(x))
    assert cache.report().built == 0


@pytest.mark.usefixtures("always")
def test_autocast_holds_its_own_dtype() -> None:
    ffn = feed_forward()
    cache = with_cache(ffn)
    x = torch.randn(20, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, plain = both(ffn, x)
    assert found.dtype == plain.dtype == torch.bfloat16
    assert relative_error(found, plain) < 8 * torch.finfo(torch.bfloat16).eps
    half = cache.report()
    both(ffn, x)
    assert cache.report().built == 2 * half.built
    assert cache.report().experts == half.experts


@pytest.mark.usefixtures("always")
def test_inference_mode_and_other_passes_share_it() -> None:
    ffn = feed_forward()
    cache = with_cache(ffn)
    x = torch.randn(9, 24)
    with torch.inference_mode():
        first = ffn(x)
    assert torch.equal(first.clone(), both(ffn, x)[0])
    assert cache.report().hits == cache.report().built > 0
    ffn.requires_grad_(False)
    assert torch.equal(ffn(x), first.clone())  # gradients on, but nothing needs one


def test_cores_without_a_version_are_not_held() -> None:
    with torch.inference_mode():
        ffn = feed_forward()
        cache = ffn.experts.cache_experts(PLENTY)
        for _ in range(2):
            ffn(torch.randn(9, 24))
    assert cache.report().bytes == 0


@pytest.mark.usefixtures("always")
def test_it_is_no_part_of_the_state_and_copies_are_empty() -> None:
    ffn = feed_forward()
    names = set(ffn.state_dict())
    with_cache(ffn)
    both(ffn, torch.randn(9, 24))
    assert ffn.experts.expert_cache.report().bytes > 0
    assert set(ffn.state_dict()) == names
    for other in (copy.deepcopy(ffn), pickle.loads(pickle.dumps(ffn))):
        report = other.experts.expert_cache.report()
        assert (report.max_bytes, report.bytes) == (PLENTY, 0)
        torch.testing.assert_close(*both(other, torch.randn(4, 24)), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("always")
def test_compiled_graphs_use_the_cores() -> None:
    ffn = feed_forward()
    cache = with_cache(ffn)
    x = torch.randn(9, 24)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch.compile's warnings about itself
        torch._dynamo.reset()
        found = torch.compile(ffn, backend="aot_eager", fullgraph=True)(x)
    assert cache.report().built == 0
    torch.testing.assert_close(found, both(ffn, x)[1])


@pytest.mark.parametrize(("value", "error", "text"), [(-1, ValueError, "at least 1"), (1.5, TypeError, "float 1.5")])
def test_bounds_that_are_none(value: object, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=f"max_bytes must be .*{text}"):
        feed_forward().experts.cache_experts(value)
    with pytest.raises(TypeError, match="bool"):
        feed_forward().experts.cache_experts(True)


def test_none_and_zero_turn_it_off() -> None:
    experts = feed_forward().experts
    assert experts.expert_cache is None
    for off in (None, 0):
        experts.cache_experts(PLENTY)
        assert experts.cache_experts(off) is None
        assert experts.expert_cache is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_where_full_weights_pay(dtype: torch.dtype) -> None:
    """Costly to rebuild: yes. Contracted at no more than a dense layer's cost: no, at any size."""
    costly = [MPOShape.paper(768, 3072), MPOShape.light(768, 3072, 64)]
    cheap = [MPOShape.separable(768, 3072, left=256, right=64), MPOShape.paper(768, 3072, max_bond=8)]
    for experts, slots in ((1, 1), (4, 4), (8, 64), (14, 16)):
        for shape in costly:
            assert full_weights_pay((shape, shape.mirrored()), experts, slots, dtype)
        for shape in cheap:
            assert not full_weights_pay((shape, shape.mirrored()), experts, slots, dtype)
