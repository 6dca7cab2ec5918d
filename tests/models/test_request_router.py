"""Routers that see the whole request: the same results however a request is cut into calls, with
padding, in batches, with beams and after crops."""

import pytest
import torch
from torch.testing import assert_close
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)

from mpoe import MPOEConfig, RouterConfig, convert_to_mpoe
from mpoe.layers.request import Evidence, join_request
from mpoe.models.request_cache import EvidenceLayer, cache_in
from tests.assertions import refuses

EXPERTS = 4
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # products of other sizes round otherwise


def request_model(weight=0.5):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    # decided routers, so that what they see of a request matters
    router = RouterConfig(top_k=2, request_weight=weight, init_scale=30.0)
    mixed = MPOEConfig(num_experts=EXPERTS, shape="neurons", neurons=8, router=router)
    model = convert_to_mpoe(LlamaForCausalLM(config), mixed).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("experts.down"):
            parameter.data.normal_(0.0, 0.5)
    return model


@pytest.fixture(scope="module")
def model():
    return request_model()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(2, 61, (3, 16), generator=torch.Generator().manual_seed(1))


def logits_in_parts(model, ids, lengths, cache=None):
    found = []
    for part in ids.split(lengths, 1):
        output = model(part, past_key_values=cache, use_cache=True)
        cache = cache_in(output)
        found.append(output.logits)
    return torch.cat(found, 1), cache


def test_logits_join_the_mean_over_the_request_so_far():
    torch.manual_seed(0)
    logits = torch.randn(10, EXPERTS)
    mask = torch.ones(10, dtype=torch.bool)
    mask[[0, 1, 7]] = False
    found = join_request(logits, 0.3, Evidence(), (2, 5), mask).view(2, 5, EXPERTS)
    rows, counted = logits.view(2, 5, EXPERTS), mask.view(2, 5)
    for row in range(2):
        for token in counted[row].nonzero().flatten().tolist():
            seen = rows[row, : token + 1][counted[row, : token + 1]]
            assert_close(found[row, token], 0.7 * rows[row, token] + 0.3 * seen.mean(0))


@torch.no_grad()
def test_the_request_matters(model, ids):
    assert (model(ids).logits - request_model(0.0)(ids).logits).abs().max() > 0.01


@torch.no_grad()
@pytest.mark.parametrize("lengths", [[5, 11], [7, *[1] * 9], [1] * 16], ids=str)
@pytest.mark.parametrize("kind", ["growing", "of one size"])
def test_a_request_in_several_calls(model, ids, lengths, kind):
    cache = None if kind == "growing" else StaticCache(config=model.config, max_cache_len=16)
    found, _ = logits_in_parts(model, ids, lengths, cache)
    assert_close(found, model(ids).logits, **CLOSE)


@torch.no_grad()
def test_padding_counts_for_nothing(model, ids):
    padded = torch.cat([torch.full((3, 5), 9), ids], 1)
    mask = (torch.arange(21) >= 5).long().expand(3, -1)
    found = model(padded, attention_mask=mask).logits[:, 5:]
    assert_close(found, model(ids).logits, **CLOSE)


@torch.no_grad()
def test_a_cropped_cache_continues_as_if_nothing_had_been_read(model, ids):
    _, cache = logits_in_parts(model, ids, [6, 1, 1, 8])
    cache.crop(-9)
    found, _ = logits_in_parts(model, ids[:, 7:], [2, 7], cache)
    assert_close(found, model(ids).logits[:, 7:], **CLOSE)


@torch.no_grad()
def test_a_reset_cache_begins_again(model, ids):
    cache = DynamicCache(config=model.config)
    logits_in_parts(model, ids, [9, 7], cache)
    cache.reset()
    found, _ = logits_in_parts(model, ids, [4, 12], cache)
    assert_close(found, model(ids).logits, **CLOSE)


@torch.no_grad()
def test_rows_of_a_cache_take_their_evidence_along(model, ids):
    order = torch.tensor([2, 0, 0])
    _, cache = logits_in_parts(model, ids[:, :9], [9])
    cache.reorder_cache(order)
    found, _ = logits_in_parts(model, ids[order, 9:], [7], cache)
    assert_close(found, model(ids[order]).logits[:, 9:], **CLOSE)


@torch.no_grad()
def test_tokens_that_no_router_saw_do_not_count(model, ids):
    cache = DynamicCache(config=model.config)
    request_model(0.0)(ids[:, :6], past_key_values=cache, use_cache=True)
    found, cache = logits_in_parts(model, ids[:, 6:], [10], cache)
    layer = cache.layers[-1]
    assert isinstance(layer, EvidenceLayer)
    assert layer.get_seq_length() == 16
    assert layer.values[0, 0, :, 0].tolist() == [0.0] * 6 + [float(n) for n in range(1, 11)]
    assert found.isfinite().all()


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"prompt_lookup_num_tokens": 3},
        {"cache_implementation": "static"},
        {"num_beams": 2, "num_return_sequences": 2},
    ],
    ids=str,
)
def test_generate_is_the_same_with_a_cache(model, ids, options):
    given = {"max_new_tokens": 12, "do_sample": False}
    beams = {
        name: value for name, value in options.items() if "num_" in name and "look" not in name
    }
    wanted = model.generate(ids[:1], **given, **beams, use_cache=False)
    assert torch.equal(model.generate(ids[:1], **given, **options), wanted)


def test_a_batch_with_padding_on_the_left(model, ids):
    given = {"max_new_tokens": 8, "do_sample": False}
    alone = model.generate(ids[:1, 6:], **given)
    padded = torch.cat([torch.zeros(1, 6, dtype=torch.int64), ids[:1, 6:]], 1)
    mask = torch.ones(2, 16, dtype=torch.int64)
    mask[0, :6] = 0
    both = model.generate(torch.cat([padded, ids[1:2]]), attention_mask=mask, **given)
    assert torch.equal(both[0, 6:], alone[0])


def test_gradients_reach_the_routers(ids):
    model = request_model().train()
    model(ids, labels=ids, use_cache=False).loss.backward()
    gradients = [p.grad for name, p in model.named_parameters() if name.endswith("router.weight")]
    assert len(gradients) == 3
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


def test_another_cache_is_refused(model, ids):
    message = "past_key_values must be a Cache of Transformers"
    refuses(TypeError, message, model, ids, past_key_values=((None, None),))


def test_the_weight_is_a_share():
    refuses(ValueError, "request_weight", RouterConfig, request_weight=1.5)


def test_the_weight_needs_a_causal_model():
    router = RouterConfig(request_weight=0.5)
    mixed = MPOEConfig(num_experts=2, shape="neurons", neurons=4, router=router)
    sizes = {"d_model": 16, "d_ff": 32, "d_kv": 4, "num_heads": 4, "num_layers": 1, "vocab_size": 9}
    dense = T5ForConditionalGeneration(T5Config(**sizes))
    refuses(ValueError, "request_weight needs a causal", convert_to_mpoe, dense, mixed)


def test_the_weight_needs_neurons():
    router = RouterConfig(request_weight=0.5)
    refuses(ValueError, "request_weight", MPOEConfig, num_experts=2, router=router)
