"""`ExpertCache`: same results as without, within its bound, only while it is in use, and never in a module."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from mpoe_bench.cases import relative_error
from torch import Tensor

from mpoe.config import MPOEConfig, RouterConfig
from mpoe.layers import MPOEFeedForward
from mpoe.layers.expert_cache import ExpertCache, full_weights_pay
from mpoe_kernels import MPOShape
from tests.assertions import in_threads

PLENTY = 10**9
EXPERTS = 5


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Full weights at once and wherever they are allowed: matrices this small never benefit from them."""
    monkeypatch.setattr("mpoe.layers.experts.full_weights_pay", lambda *_: True)
    monkeypatch.setattr("mpoe.layers.expert_cache.PATIENCE", 0)


def feed_forward(shape: str = "paper", gated: bool = False, top_k: int = 1, **options) -> MPOEFeedForward:
    config = MPOEConfig(num_experts=EXPERTS, shape=shape, router=RouterConfig(top_k=top_k))
    ffn = MPOEFeedForward(24, 48, config, activation="gelu_new", gated=gated, bias=True, **options).eval()
    for projection in ffn.experts.projections().values():
        if projection.bias is not None:
            torch.nn.init.normal_(projection.bias)
    return ffn


@contextmanager
def kept(*layers: MPOEFeedForward, max_bytes: int = PLENTY) -> Iterator[ExpertCache]:
    with torch.no_grad(), ExpertCache(max_bytes, [layer.experts for layer in layers]).in_use() as cache:
        yield cache


def built(cache: ExpertCache) -> int:
    return sum(kept.built for kept in cache.layers.values() if kept is not None)


def plain(ffn: MPOEFeedForward, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """The output in a thread that has no cache."""

    @torch.no_grad()
    def run(_: int) -> Tensor:
        return ffn(x, mask)

    return in_threads(1, run)[0]


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("shape", ["paper", "separable"])
def test_same_results(shape: str, gated: bool, dtype: torch.dtype) -> None:
    ffn = feed_forward(shape, gated, top_k=2).to(dtype)
    x, mask = torch.randn(3, 7, 24, dtype=dtype), torch.rand(3, 7) > 0.3
    torch.nn.init.zeros_(ffn.router.weight[1:])  # some experts get no token
    with kept(ffn) as cache:
        assert torch.equal(ffn(x[:0]), x[:0])
        assert built(cache) == 0
        for _ in range(2):
            found = ffn(x, mask)
            assert found.dtype == dtype
            assert relative_error(found, plain(ffn, x, mask)) < 8 * torch.finfo(dtype).eps
        assert built(cache) == EXPERTS
        assert cache.reserved >= EXPERTS * 24 * 48 * len(ffn.experts.projections()) * dtype.itemsize


@pytest.mark.usefixtures("always")
def test_layers_share_the_bound_and_the_first_one_stays() -> None:
    """A layer has full weights for all its experts or for none: then every pass uses the cores and the kept blocks."""
    first, second, other = (feed_forward("light", top_k=2) for _ in range(3))
    with kept(first) as cache:
        first(torch.randn(1, 24))
        bound = cache.reserved
    for short in (0, 1):
        with kept(first, second, max_bytes=bound - short + (10**4 if short == 0 else 0)) as cache:
            for ffn in (first, second, first, other):
                x = torch.randn(40, 24)
                found, want = ffn(x), plain(ffn, x)
                torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)
                assert (ffn is first and not short) or torch.equal(found, want)
                assert cache.reserved <= cache.max_bytes
            assert built(cache) == (0 if short else EXPERTS)
            assert cache.layers[first.experts].built == built(cache)
            assert other.experts not in cache.layers
            assert not cache.reserves(PLENTY)
    third = feed_forward("paper")  # whose blocks are no views of its cores
    with kept(third, max_bytes=8) as cache:
        assert torch.equal(third(x), plain(third, x))
        assert (cache.reserved, cache.layers) == (0, {third.experts: None})


@pytest.mark.usefixtures("always")
def test_it_ends_where_the_block_fails_and_gives_way_to_another() -> None:
    ffn, x = feed_forward(), torch.randn(9, 24)
    inner: list[ExpertCache] = []

    def fails() -> None:
        with kept(ffn) as cache:
            inner.append(cache)
            ffn(x)
            raise ValueError("of the caller")

    with kept(ffn) as outer:
        with pytest.raises(ValueError, match="of the caller"):
            fails()
        assert (built(inner[0]), built(outer)) == (EXPERTS, 0)
        ffn(x)
        assert built(outer) == EXPERTS
    with torch.no_grad():
        ffn.experts.up.central.zero_()
        assert torch.equal(ffn(x), plain(ffn, x))


@pytest.mark.usefixtures("always")
def test_training_another_dtype_and_compiled_graphs_use_the_cores() -> None:
    ffn, x = feed_forward(dropout=0.5).train(), torch.randn(9, 24)

    def run(grad: bool) -> list[Tensor]:
        torch.manual_seed(3)
        with torch.set_grad_enabled(grad):
            y = ffn(x)
            return [y, *(torch.autograd.grad(y.square().sum(), list(ffn.parameters())) if grad else ())]

    with kept(ffn) as cache:
        found = run(True)
        assert cache.layers == {}
        found += run(False)
        assert built(cache) == 0
    assert all(map(torch.equal, found, run(True) + run(False)))
    ffn.eval()
    with warnings.catch_warnings(), kept(ffn) as cache:
        warnings.simplefilter("ignore")  # torch.compile's warnings about itself
        torch._dynamo.reset()
        found = torch.compile(ffn, backend="aot_eager", fullgraph=True)(x)
        assert cache.layers == {}
        torch.testing.assert_close(found, plain(ffn, x))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            lowered = ffn(x)
        assert lowered.dtype == torch.bfloat16
        reserved = cache.reserved
        torch.testing.assert_close(ffn(x), plain(ffn, x))
        assert cache.reserved == reserved
        assert relative_error(lowered, plain(ffn, x)) < 4 * torch.finfo(torch.bfloat16).eps


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
