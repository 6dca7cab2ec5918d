"""Forward passes: padding, losses, generation, checkpointing, compilation, parameter counts."""

import copy
import os
import shutil
from contextlib import nullcontext

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from mpoe import RouterConfig
from mpoe.layers import load_balancing_loss, router_z_loss
from tests.assertions import in_threads
from tests.cases import pairwise

from .tiny_models import (
    FAMILIES,
    MASK,
    batch,
    dense_model,
    generation,
    result,
    stirred,
    text_rows,
)


@pytest.mark.parametrize(
    "family, shape", pairwise(list(FAMILIES), ["separable", "hidden", "neurons"])
)
@torch.no_grad()
def test_padding_is_neither_routed_nor_counted(family, shape, converted):
    model = stirred(
        converted(family, shape=shape, router=RouterConfig(top_k=2, z_loss_weight=1e-3))
    )
    inputs = batch(family)
    out = model(**inputs)
    expected = 2 * int(MASK.sum())
    loads = out.expert_load.sum(1).tolist()
    if family.startswith("t5"):
        assert loads == [expected] * 2 + [2 * int(inputs["labels"].ne(-100).sum())]
    else:
        assert loads == [expected] * 2
    other = dict(inputs, input_ids=torch.where(MASK.bool(), inputs["input_ids"], 7))
    again = model(**other)
    assert torch.equal(again.expert_load, out.expert_load)
    assert_close(again.aux_loss, out.aux_loss, rtol=1e-6, atol=0)
    rows, more = (text_rows(result(o), inputs) for o in (out, again))
    assert_close(rows, more, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_without_a_mask_every_token_counts(converted):
    out = converted("gpt2")(input_ids=batch("gpt2")["input_ids"])
    assert out.expert_load.sum(1).tolist() == [24, 24]
    assert out.expert_load.dtype == torch.int64
    assert "loss" not in out


@torch.no_grad()
def test_prompt_labels_are_not_a_padding_mask_for_gpt2(converted):
    inputs = batch("gpt2")
    inputs["labels"][:, :2] = -100
    assert converted("gpt2")(**inputs).expert_load.sum(1).tolist() == [int(MASK.sum())] * 2


def test_auxiliary_loss_by_hand(converted):
    model = converted(
        "t5", router=RouterConfig(top_k=2, balance_loss_weight=0.03, z_loss_weight=0.2)
    )
    inputs = batch("t5")
    out = model(**inputs)
    masks = [MASK.bool()] * 2 + [inputs["labels"] != -100]
    expected = 0.0
    for logits, mask in zip(out.router_logits, masks, strict=True):
        valid = logits[mask.reshape(-1)]
        index = valid.topk(2).indices
        expected = expected + 0.03 * load_balancing_loss(valid, index) + 0.2 * router_z_loss(valid)
    assert_close(out.aux_loss, expected)
    assert_close(out.loss, out.task_loss + out.aux_loss)
    out.loss.backward()
    assert all(
        m.router.weight.grad.abs().sum() > 0 for m in model.modules() if hasattr(m, "router")
    )


def test_tuple_output_starts_like_the_dense_one(converted):
    dense, model, inputs = dense_model("gpt2"), converted("gpt2"), batch("gpt2")
    a, b = dense(**inputs, return_dict=False), model(**inputs, return_dict=False)
    assert_close(a[1][MASK.bool()], b[1][MASK.bool()], rtol=1e-4, atol=1e-4)
    positional = model(inputs["input_ids"], None, inputs["attention_mask"])
    assert positional.expert_load.sum(1).tolist() == [int(MASK.sum())] * 2


def test_hidden_states_and_attentions_are_recorded(converted):
    for family in ("gpt2", "bert", "gpt2_base", "t5"):
        out = converted(family)(**batch(family), output_hidden_states=True)
        states = out.encoder_hidden_states if family == "t5" else out.hidden_states
        assert len(states) == 3


def test_auxiliary_loss_is_averaged_over_micro_batches(converted):
    model, inputs = converted("gpt2"), batch("gpt2")
    items = int(inputs["labels"][:, 1:].ne(-100).sum())
    out = model(**inputs, num_items_in_batch=torch.tensor(2 * items))
    assert_close(out.loss - out.task_loss, out.aux_loss / 2)
    assert converted("t5").accepts_loss_kwargs is False
    assert model.accepts_loss_kwargs is True


@pytest.mark.parametrize(
    "family, options", pairwise(["t5", "t5_gated", "gpt2"], [{}, {"num_beams": 2}])
)
def test_generation_with_and_without_cache_equals_dense(family, options, converted):
    dense, model = dense_model(family), converted(family)
    call = generation(family, **options)
    cached = model.generate(**call)
    assert torch.equal(cached, model.generate(**call, use_cache=False))
    assert torch.equal(cached, dense.generate(**call))


def test_generation_does_not_route_padding_in_the_encoder(converted):
    model = converted("t5", router=RouterConfig(eval_capacity_factor=1.0))
    inputs = batch("t5", labels=False)
    call = {
        "attention_mask": MASK,
        "max_new_tokens": 1,
        "output_scores": True,
        "return_dict_in_generate": True,
    }
    other = torch.where(MASK.bool(), inputs["input_ids"], 9)
    scores = [model.generate(ids, **call).scores[0] for ids in (inputs["input_ids"], other)]
    # With a capacity, routed padding would push text tokens out of their experts.
    assert torch.equal(scores[0], scores[1])


@pytest.mark.parametrize(
    "family, reentrant",
    [("t5", False), ("gpt2", False), ("bert_classifier", False), ("gpt2", True)],
)
def test_checkpointing_gives_the_same_gradients(family, reentrant, converted):
    """A reentrant one is replaced, with a warning."""
    model, inputs = (
        converted(family, router=RouterConfig(z_loss_weight=1e-2, capacity_factor=1.5)),
        batch(family),
    )
    model.train()
    plain = model(**inputs)
    plain.loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with pytest.warns(UserWarning, match="use_reentrant=False") if reentrant else nullcontext():
        model.activation_checkpointing_enable({"use_reentrant": True} if reentrant else None)
    out = model(**inputs)
    out.loss.backward()
    assert torch.equal(out.expert_load, plain.expert_load)
    assert len(out.router_logits) == len(plain.router_logits)
    for name, parameter in model.named_parameters():
        if name in expected:
            assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_a_users_checkpoint_contexts_run_too(converted):
    entered = []

    def contexts():
        entered.append(1)
        return nullcontext(), nullcontext()

    model = converted("gpt2").train()
    model.activation_checkpointing_enable({"context_fn": contexts})
    model(**batch("gpt2")).loss.backward()
    assert len(entered) == 2


@pytest.fixture
def inductor(tmp_path, monkeypatch, lacks):
    """A separate compiler cache, independent of earlier runs."""
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        lacks("inductor needs a C++ compiler")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


@pytest.mark.slow
@pytest.mark.usefixtures("inductor")
@pytest.mark.parametrize(
    "family, backend",
    [
        *(
            ("gpt2", "aot_eager"),
            ("t5", "aot_eager"),
            ("bert_classifier", "aot_eager"),
            ("t5", "inductor"),
        ),
        pytest.param("gpt2", "inductor", marks=pytest.mark.exhaustive),
    ],
)
def test_training_steps_compile_fullgraph(family, backend, converted):
    model, inputs = converted(family), batch(family)
    model.train(family != "bert_classifier")  # which drops at random
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend=backend, fullgraph=True)
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-2) for m in (model, twin)]
    for _ in range(2):
        expected, found = model(**inputs), compiled(**inputs)
        assert_close(found.loss, expected.loss, rtol=1e-4, atol=1e-4)
        assert torch.equal(found.expert_load, expected.expert_load)
        for output in (expected, found):
            output.loss.backward()
        for (name, eager), other in zip(model.named_parameters(), twin.parameters(), strict=True):
            assert_close(
                other.grad, eager.grad, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
            )
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    graphs = 2 if family == "bert_classifier" else 1  # its first call settles the kind of problem
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


@pytest.mark.exhaustive
@pytest.mark.usefixtures("inductor")
@pytest.mark.parametrize("family, shape", [("t5", "separable"), ("gpt2", "paper")])
def test_decoding_steps_compile(family, shape, converted):
    """With a cache of fixed size, one graph serves every step after the first."""
    model = converted(family, shape=shape)
    call = generation(
        family,
        cache_implementation="static",
        output_logits=True,
        return_dict_in_generate=True,
    )
    expected = model.generate(**call)
    model.forward = torch.compile(model.forward, fullgraph=True)
    found = model.generate(**call)
    assert torch.equal(found.sequences, expected.sequences)
    assert_close(torch.stack(found.logits), torch.stack(expected.logits), rtol=1e-4, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


@torch.no_grad()
def test_concurrent_calls_keep_their_masks_apart(converted):
    model, inputs = converted("t5"), batch("t5")
    masks = [MASK, torch.ones_like(MASK), MASK.flip(0)]
    alone = [model(**{**inputs, "attention_mask": mask}) for mask in masks]

    def work(k):
        return [model(**{**inputs, "attention_mask": masks[k]}) for _ in range(5)]

    for results, expected in zip(in_threads(3, work), alone, strict=True):
        for found in results:
            assert torch.equal(found.expert_load, expected.expert_load)
            assert_close(found.logits, expected.logits)


@torch.no_grad()
def test_dense_experts_from_scratch_train_and_differ(converted):
    config = converted("gpt2", expert_type="dense").config
    model = AutoModelForCausalLM.from_config(config)
    weight = model.transformer.h[0].mlp.experts.up.weight
    assert float(weight.std()) == pytest.approx(0.02, rel=0.1)
    assert not torch.equal(weight[0], weight[1])
    assert model(**batch("gpt2")).aux_loss > 0
    ignored = set(config.keys_to_ignore_at_inference)  # when the Trainer gathers predictions
    assert {"aux_loss", "task_loss", "router_logits", "expert_load", "cache"} <= ignored


def test_ignored_labels_inside_a_target_are_not_padding(converted):
    dense, model = dense_model("t5"), converted("t5")
    ids, labels = torch.randint(2, 60, (2, 7)), torch.randint(2, 60, (2, 6))
    labels[:, 2] = -100
    labels[1, 4:] = -100  # this is padding
    with torch.no_grad():
        expected, got = dense(input_ids=ids, labels=labels), model(input_ids=ids, labels=labels)
    kept = labels.ne(-100)
    assert torch.allclose(got.logits[kept], expected.logits[kept], atol=1e-5)
    assert int(got.expert_load[-1].sum()) == 6 + 4


def test_generate_when_padding_is_the_end_token(converted):
    dense, model = dense_model("t5"), converted("t5")
    ids = torch.randint(2, 60, (1, 7))
    ids[0, 3] = 1
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 1, "eos_token_id": 1}
    for m in (dense, model):
        m.generation_config.pad_token_id = m.generation_config.eos_token_id = 1
    assert torch.equal(model.generate(ids, **options), dense.generate(ids, **options))
