"""What `generate` keeps while it runs, and models while their weights do not change: same tokens,
within its bound, gone afterwards, nothing where it is useless; a change of weights is refused.

Below it, `ExpertCache` with layers alone: same results as without, only while it is in use.
"""

import contextlib
import copy
import warnings

import pytest
import torch
from mpoe_bench.cases import relative_error
from torch.testing import assert_close

from mpoe import MPOEConfig, RouterConfig, load_mpoe
from mpoe.layers import MPOEFeedForward, MPOExperts, current_routing, routing_context
from mpoe.layers.expert_cache import ExpertCache, full_weights_pay
from mpoe.models.kept_weights import dense_bytes, kept_while_generating
from mpoe_kernels import MPOShape
from tests.assertions import in_threads, refuses
from tests.cases import either, in_two_dtypes, pairwise

from .tiny_models import FAMILIES, batch, stirred
from .tiny_models import generation as call

LIGHT = {"shape": "light", "light_p": 4, "num_experts": 2}


@pytest.fixture(autouse=True)
def _deeper(monkeypatch):
    """Enough layers for the size of the dense ones to leave room for a layer of two experts."""
    for family, layers in (("gpt2", "n_layer"), ("llama", "num_hidden_layers")):
        monkeypatch.setitem(FAMILIES[family][2], layers, 4)


@pytest.fixture
def always(monkeypatch):
    """Full weights wherever they are allowed: models this small never benefit from them."""
    monkeypatch.setattr("mpoe.layers.experts.full_weights_pay", lambda *_: True)


@pytest.fixture
def made(monkeypatch):
    """The caches that models create."""
    found = []

    def make(*values, **options):
        found.append(ExpertCache(*values, **options))
        return found[-1]

    monkeypatch.setattr("mpoe.models.kept_weights.ExpertCache", make)
    return found


def experts(model):
    return [module for module in model.modules() if isinstance(module, MPOExperts)]


def built(cache):
    return sum(kept.built for kept in cache.layers.values() if kept is not None)


def plain_tokens(model, **options):
    """The tokens generated without a cache."""
    model.cache_experts(0)
    tokens = model.generate(**options)
    model.cache_experts(None)
    return tokens


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize(
    "family, options, mode",
    pairwise(
        ["t5", "t5_gated", "gpt2", "llama"],
        [{}, {"num_beams": 2}],
        [contextlib.nullcontext, torch.enable_grad, torch.inference_mode],
    ),
)
def test_same_tokens(family, options, mode, converted, made):
    model = stirred(converted(family, **LIGHT))
    with mode():
        plain = plain_tokens(model, **call(family, **options))
        assert made == []
        tokens = model.generate(**call(family, **options))
        with model.weights_kept():
            again = [model.generate(**call(family, **options)) for _ in range(2)]
    assert torch.equal(tokens, plain)
    assert all(torch.equal(other, plain) for other in again), again
    of_generate, of_block = made
    assert built(of_generate) == 0
    assert of_generate.max_bytes == dense_bytes(experts(model))
    assert built(of_block) == 2 * len(experts(model))


WRITES = {
    "in place": lambda model: experts(model)[0].up.central.mul_(2),
    "of a bias": lambda model: experts(model)[0].up.bias.add_(1),
    "loaded": lambda model: model.load_state_dict(model.state_dict()),
    "replaced": lambda model: setattr(
        experts(model)[0].up,
        "central",
        torch.nn.Parameter(experts(model)[0].up.central.detach().clone()),
    ),
}


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_write_is_refused_while_weights_are_kept(write, converted):
    model = converted("gpt2", **LIGHT)
    tokens = {"input_ids": batch("gpt2")["input_ids"]}
    with torch.no_grad():
        with model.weights_kept():
            model(**tokens)
            write(model)
            refuses(RuntimeError, "weights must not change inside weights_kept", model, **tokens)
        after = model(**tokens).logits
        assert torch.equal(after, copy.deepcopy(model)(**tokens).logits)


@pytest.mark.usefixtures("always")
def test_no_core_takes_the_place_of_one_in_memory(converted):
    """Where it is and how often it was written would be the same."""
    model = converted("gpt2", shape="paper", num_experts=4)
    tokens = {"input_ids": batch("gpt2")["input_ids"]}
    for layer in experts(model):
        cores = layer.up.auxiliary
        for place in range(len(cores)):
            with torch.no_grad(), model.weights_kept():
                model(**tokens)
                for _ in range(2):
                    version = cores[place]._version
                    cores[place] = torch.nn.Parameter(torch.randn(cores[place].shape))
                    while cores[place]._version < version:
                        cores[place].mul_(1)
                refuses(RuntimeError, "weights must not change", model, **tokens)


@pytest.mark.usefixtures("always")
def test_weights_made_in_inference_mode(converted):
    model = converted("gpt2", **LIGHT)
    wanted = plain_tokens(model, **call("gpt2"))
    with torch.inference_mode():
        model = copy.deepcopy(model)
        assert torch.equal(model.generate(**call("gpt2")), wanted)
        with model.weights_kept():
            assert torch.equal(model.generate(**call("gpt2")), wanted)


@pytest.mark.usefixtures("always")
def test_blocks_of_two_models(converted, made):
    """In the inner one, the outer model's weights are kept too."""
    model = converted("gpt2", **LIGHT)
    other = converted("llama", **LIGHT)
    wanted = plain_tokens(model, **call("gpt2"))
    with model.weights_kept():
        with other.weights_kept(), torch.no_grad():
            other(**batch("llama"))
            assert torch.equal(model.generate(**call("gpt2")), wanted)
            assert [built(cache) for cache in made] == [2 * len(experts(model)), built(made[1])]
            assert built(made[1]) == 2 * len(experts(other))
            experts(model)[0].down.bias.add_(1)
            message = "weights must not change inside weights_kept"
            refuses(RuntimeError, message, model, **batch("gpt2"))
        refuses(RuntimeError, "is for passes without gradients", model, **batch("gpt2"))


def test_training_is_refused_while_weights_are_kept(converted):
    model = converted("gpt2", **LIGHT)
    other = converted("llama", **LIGHT)
    with model.weights_kept():
        refuses(RuntimeError, "is for passes without gradients", model, **batch("gpt2"))
        other(**batch("llama")).loss.backward()
    model(**batch("gpt2")).loss.backward()
    model.train()
    refuses(ValueError, "needs a model in evaluation", model.weights_kept().__enter__)
    refuses(ValueError, "max_bytes must be ", model.weights_kept(-5).__enter__)


@pytest.mark.usefixtures("always")
def test_full_weights_keep_to_their_bound(converted, made):
    model = converted("gpt2", **LIGHT)
    with torch.no_grad(), model.weights_kept(3 * dense_bytes(experts(model)) // 2):
        model(**batch("gpt2"))
    (cache,) = made
    assert 0 < built(cache) < 2 * len(experts(model))
    assert cache.reserved <= cache.max_bytes


@pytest.mark.usefixtures("always")
def test_zero_turns_it_off_and_none_on_again(converted, made):
    model = converted("gpt2", **LIGHT)
    model.cache_experts(0)
    model.generate(**call("gpt2"))
    copy.deepcopy(model).generate(**call("gpt2"))
    assert made == []
    model.cache_experts(None)
    model.generate(**call("gpt2"))
    assert len(made) == 1
    for value, error in ((-5, ValueError), (1.5, TypeError), (True, TypeError)):
        refuses(error, "max_bytes must be ", model.cache_experts, value)


@pytest.mark.usefixtures("always")
def test_a_limit_that_the_user_chose(converted, made, tmp_path):
    """Copies of a model have it, saved models do not."""
    model = converted("gpt2", **LIGHT)
    wanted = plain_tokens(model, **call("gpt2"))
    model.cache_experts(10**9)
    model.save_pretrained(tmp_path)
    for each in (model, copy.deepcopy(model)):
        assert torch.equal(each.generate(**call("gpt2")), wanted)
        cache = made.pop()
        assert cache.max_bytes == 10**9
        assert len(cache.layers) == len(experts(model))
    loaded = load_mpoe(tmp_path)
    assert torch.equal(loaded.generate(**call("gpt2")), wanted)
    assert made.pop().max_bytes == dense_bytes(experts(model))


@pytest.mark.usefixtures("always")
def test_gone_where_generate_fails(converted, made):
    model = converted("gpt2", **LIGHT)
    refuses(ValueError, "nonsense", model.generate, **call("gpt2"), nonsense=True)
    (cache,) = made
    assert current_routing() is None
    with torch.no_grad():
        model(**batch("gpt2"))
    assert cache.layers == {}
    with routing_context() as outer:
        refuses(ValueError, "nonsense", model.generate, **call("gpt2"), nonsense=True)
        assert current_routing() is outer


@pytest.mark.parametrize(
    "config, holds_blocks",
    [
        (LIGHT, True),
        ({"shape": "separable"}, True),
        ({"shape": "hidden"}, False),
        ({"shape": "neurons"}, False),
    ],
    ids=str,
)
def test_a_cache_is_made_where_there_is_something_to_fold(config, holds_blocks, converted, made):
    model = converted("gpt2", **config)
    for _ in range(2):
        model.generate(**call("gpt2"))
    assert len(made) == 2 * holds_blocks
    with torch.no_grad(), model.weights_kept():
        model(**batch("gpt2"))
    assert built(made[-1]) == 0, "full weights of models this small"


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("change", ["meta", "parametrised"])
def test_nothing_of_weights_that_may_not_be_kept(change, converted, made):
    model = converted("gpt2", **LIGHT)
    if change == "meta":
        model.to("meta")
    else:
        for layer in experts(model):
            torch.nn.utils.parametrize.register_parametrization(
                layer.up, "central", torch.nn.Identity()
            )
    for bound in (None, 10**9):
        with kept_while_generating(model, bound) as cache:
            assert cache is None
    assert made == []


@in_two_dtypes
def test_the_bound_is_the_size_of_the_dense_layers(dtype, converted):
    assert (
        dense_bytes(experts(converted("llama", **LIGHT).to(dtype)))
        == 4 * 3 * 24 * 48 * dtype.itemsize
    )


# ------------------------------------------------------------------ the cache with layers alone

PLENTY = 10**9
EXPERTS = 5


def feed_forward(shape="paper", gated=False, top_k=1, **options):
    config = MPOEConfig(num_experts=EXPERTS, shape=shape, router=RouterConfig(top_k=top_k))
    ffn = MPOEFeedForward(
        24, 48, config, activation="gelu_new", gated=gated, bias=True, **options
    ).eval()
    for projection in ffn.experts.projections().values():
        if projection.bias is not None:
            torch.nn.init.normal_(projection.bias)
    return ffn


@contextlib.contextmanager
def kept(*layers, max_bytes=PLENTY):
    with (
        torch.no_grad(),
        ExpertCache(
            max_bytes, [layer.experts for layer in layers], full_weights=True
        ).in_use() as cache,
    ):
        yield cache


def plain(ffn, x, mask=None):
    """The output in a thread that has no cache."""

    @torch.no_grad()
    def run(_):
        return ffn(x, mask)

    return in_threads(1, run)[0]


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@either("gated")
@pytest.mark.parametrize("shape", ["paper", "separable"])
def test_same_results(shape, gated, dtype):
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
def test_layers_share_the_bound_and_the_first_one_stays():
    """A layer has full weights for all its experts or for none: then every pass uses the cores and
    the kept blocks."""
    first, second, other = (feed_forward("light", top_k=2) for _ in range(3))
    with kept(first) as cache:
        first(torch.randn(1, 24))
        bound = cache.reserved
    for short in (0, 1):
        with kept(first, second, max_bytes=bound - short + (10**4 if short == 0 else 0)) as cache:
            for ffn in (first, second, first, other):
                x = torch.randn(40, 24)
                found, want = ffn(x), plain(ffn, x)
                assert_close(found, want, rtol=1e-4, atol=1e-5)
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
def test_it_ends_where_the_block_fails_and_gives_way_to_another():
    ffn, x = feed_forward(), torch.randn(9, 24)
    inner = []

    def fails():
        with kept(ffn) as cache:
            inner.append(cache)
            ffn(x)
            raise ValueError("of the caller")

    with kept(ffn) as outer:
        refuses(ValueError, "of the caller", fails)
        assert (built(inner[0]), built(outer)) == (EXPERTS, 0)
        ffn(x)
        assert built(outer) == EXPERTS
    with torch.no_grad():
        ffn.experts.up.central.zero_()
        assert torch.equal(ffn(x), plain(ffn, x))


@pytest.mark.usefixtures("always")
def test_dropout_another_dtype_and_compiled_graphs_use_the_cores():
    ffn, x = feed_forward(dropout=0.5).train(), torch.randn(9, 24)

    @torch.no_grad()
    def run():
        torch.manual_seed(3)
        return ffn(x)

    with kept(ffn) as cache:
        found = run()
        assert built(cache) == 0
    assert torch.equal(found, run())
    ffn.eval()
    with warnings.catch_warnings(), kept(ffn) as cache:
        warnings.simplefilter("ignore")  # torch.compile's warnings about itself
        torch._dynamo.reset()
        found = torch.compile(ffn, backend="aot_eager", fullgraph=True)(x)
        assert cache.layers == {}
        assert_close(found, plain(ffn, x))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            lowered = ffn(x)
        assert lowered.dtype == torch.bfloat16
        reserved = cache.reserved
        assert_close(ffn(x), plain(ffn, x))
        assert cache.reserved == reserved
        assert relative_error(lowered, plain(ffn, x)) < 4 * torch.finfo(torch.bfloat16).eps


@in_two_dtypes
def test_where_full_weights_pay(dtype):
    """Costly to rebuild: yes. Contracted at no more than a dense layer's cost: no, at any size."""
    costly = [MPOShape.paper(768, 3072), MPOShape.light(768, 3072, 64)]
    cheap = [
        MPOShape.separable(768, 3072, left=256, right=64),
        MPOShape.paper(768, 3072, max_bond=8),
    ]
    for experts, slots in ((1, 1), (4, 4), (8, 64), (14, 16)):
        for shape in costly:
            assert full_weights_pay((shape, shape.mirrored()), experts, slots, dtype)
        for shape in cheap:
            assert not full_weights_pay((shape, shape.mirrored()), experts, slots, dtype)
    shapes = {"up": costly[0], "down": costly[0].mirrored()}
    many = MPOExperts(shapes, 512, device="meta")
    assert many.full_weights_pay(1, dtype)  # of the one expert that can have a slot
