"""What a model itself says, sampled and pooled into the background of *none*."""

from types import SimpleNamespace

import pytest
import torch

from mpoe import collect_statistics, compose_experts, start_expert
from mpoe.data.stand_in_models import load_stand_in
from mpoe.models import background
from mpoe.models.background import (
    background_parts,
    chat_opening,
    collect_background,
    own_texts,
    pooled_background,
    sample_tokens,
    start_token,
    token_batches,
)
from mpoe.models.quiet import measure_change, sample_own_words
from tests.assertions import differing, refuses

from .tiny_models import domain

TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


@pytest.fixture
def model_and_tokenizer(monkeypatch):
    monkeypatch.setattr(background, "SAMPLES", 4)
    monkeypatch.setattr(background, "TEXT_LENGTH", 16)
    monkeypatch.setattr(background, "CHAT_LENGTH", 12)
    return load_stand_in("gpt2")


def test_samples_depend_on_the_seed_alone(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    prompt = torch.full((3, 1), tokenizer.eos_token_id)
    torch.manual_seed(7)
    state = torch.random.get_rng_state()
    first = sample_tokens(model, prompt, 9, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state), "torch's own generator has moved"
    torch.manual_seed(8)
    assert torch.equal(sample_tokens(model, prompt, 9, seed=1), first)
    assert not torch.equal(sample_tokens(model, prompt, 9, seed=2), first)
    assert first.shape == (3, 10)
    assert first[:, 0].eq(tokenizer.eos_token_id).all()


def test_samples_follow_the_models_probabilities(model_and_tokenizer):
    """The shares of many second tokens are near the probabilities, and no end token ends a
    sample."""
    model, tokenizer = model_and_tokenizer
    start = torch.full((2_000, 1), tokenizer.eos_token_id)
    sampled = sample_tokens(model, start, 1, seed=0)[:, 1]
    with torch.no_grad():
        probabilities = model(start[:1]).logits[0, -1].softmax(-1)
    shares = torch.bincount(sampled, minlength=len(probabilities)) / len(sampled)
    likely = probabilities > 0.01
    assert likely.sum() > 3
    torch.testing.assert_close(shares[likely], probabilities[likely], atol=0.03, rtol=0)


def test_a_chat_begins_with_the_users_turn(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    assert chat_opening(tokenizer) is None
    assert set(background_parts(model, tokenizer)) == {"texts", "general"}
    tokenizer.chat_template = TURNS
    assert tokenizer.decode(chat_opening(tokenizer)) == "<|im_start|>user\n"
    parts = background_parts(model, tokenizer)
    assert set(parts) == {"texts", "chats", "general"}
    opening = chat_opening(tokenizer)
    assert parts["chats"].shape == (4, len(opening) + 12)
    assert parts["chats"][:, : len(opening)].tolist() == [opening] * 4
    tokenizer.chat_template = "always the same"
    assert chat_opening(tokenizer) is None


def test_a_token_that_opens_every_turn_starts_no_text(model_and_tokenizer):
    _, tokenizer = model_and_tokenizer
    tokenizer.add_special_tokens({"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"})
    assert start_token(tokenizer) == tokenizer.bos_token_id
    tokenizer.chat_template = "<|im_start|>" + TURNS.replace("<|im_start|>", "[turn]")
    assert start_token(tokenizer) == tokenizer.bos_token_id
    tokenizer.chat_template = TURNS
    assert start_token(tokenizer) == tokenizer.eos_token_id


def test_the_default_background_pools_the_parts(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    parts = background_parts(model, tokenizer, seed=3)
    pooled = collect_background(model, tokenizer, seed=3)
    started = start_expert(model, 1)
    each_part = [collect_statistics(started, token_batches(ids), 512) for ids in parts.values()]
    for name, value in pooled.items():
        if name.endswith(".mean"):
            expected = torch.stack([statistics[name] for statistics in each_part]).mean(0)
            torch.testing.assert_close(
                value, expected, msg=lambda text, name=name: f"{name}: {text}"
            )
    again = pooled_background(model, [token_batches(ids) for ids in parts.values()])
    assert not differing(pooled, again)


def test_a_model_without_a_start_token_has_the_general_text(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    tokenizer.bos_token = tokenizer.eos_token = None
    assert set(background_parts(model, tokenizer)) == {"general"}
    refuses(
        ValueError,
        "tokenizer must have a token that begins or ends a text; it has neither",
        own_texts,
        model,
        tokenizer,
    )


def test_tokens_that_the_model_lacks(model_and_tokenizer, monkeypatch):
    model, tokenizer = model_and_tokenizer
    monkeypatch.setattr(model.get_input_embeddings(), "num_embeddings", 5)
    refuses(ValueError, "tokenizer must be the base's", collect_background, model, tokenizer)


def test_the_preference_is_the_dial_between_kept_and_quiet(domains):
    """More preference of *none*: nearer to the base on what it says, farther from the expert on its
    domain."""
    tokens = torch.cat([batch["input_ids"] for batch in domain(2, seed=5)])
    own = SimpleNamespace(texts=tokens, chats=None, opening=0)
    held_out = domain(0, seed=9)
    mixtures = {
        str(preference): compose_experts(
            domains.base, domains.files[:1], background=domains.background, preference=preference
        )
        for preference in (0.0, 3.0)
    }
    changes = measure_change(domains.base, mixtures, own, held_out)
    base, kept, quiet = (changes[name] for name in ("base", "0.0", "3.0"))
    assert base.answers == pytest.approx(0, abs=1e-6)
    assert base.same == 1
    assert quiet.answers < kept.answers
    assert kept.domain < quiet.domain < base.domain


def test_own_words_are_held_out(model_and_tokenizer, monkeypatch):
    model, tokenizer = model_and_tokenizer
    tokenizer.chat_template = TURNS
    own = sample_own_words(model, tokenizer)
    assert own.opening == len(chat_opening(tokenizer))
    known = {
        tuple(row) for ids in background_parts(model, tokenizer).values() for row in ids.tolist()
    }
    assert not known & {tuple(row[:16]) for row in own.texts.tolist()}
    identical = measure_change(model, {"same": model}, own, None)["same"]
    assert identical.domain is None
    assert identical.answers == pytest.approx(0, abs=1e-6)
    assert identical.same == 1
