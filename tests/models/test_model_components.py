"""Embedding, head, pooler and attention in MPO form, every `moe_type`, and shapes by pattern."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mpoe import MPOEConfig, MPOEmbedding, convert_to_mpoe, load_mpoe, merge_experts
from mpoe.layers import MPOEFeedForward, MPOLinear, TiedHead
from mpoe.models import mpo_modules
from mpoe_kernels import MPOShape

from .tiny_models import FAMILIES, batch, dense_model, relative_difference, result

ALL = ["ffn", "attention", "embedding", "pooler"]


def targets(family):
    return ALL if family in ("bert", "bert_classifier") else ALL[:3]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_component_at_once_changes_nothing_and_reloads(family, tmp_path):
    model, inputs = dense_model(family), batch(family)
    converted = convert_to_mpoe(model, MPOEConfig(num_experts=2, target_modules=targets(family), shape="separable"))
    after = converted(**inputs)
    assert relative_difference(family, model(**inputs), after, inputs) <= 2e-5
    assert isinstance(converted.get_input_embeddings(), MPOEmbedding)
    tables = [name for name, _ in mpo_modules(converted) if "emb" in name or "shared" in name or "wte" in name]
    assert len(tables) == 1
    assert set(converted.conversion_report) == {name for name, _ in mpo_modules(converted)}
    converted.save_pretrained(tmp_path)
    again = load_mpoe(tmp_path)
    assert torch.equal(result(again(**inputs)), result(after))
    assert list(again.state_dict()) == list(converted.state_dict())
    assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in converted.parameters())
    if family in ("t5", "gpt2", "llama"):
        call = {"input_ids": inputs["input_ids"][:1], "max_new_tokens": 5, "do_sample": False}
        assert torch.equal(converted.generate(**call), model.generate(**call))


@pytest.mark.parametrize("family", ["t5", "gpt2", "llama", "bert_mlm"])
def test_tied_head_and_table_learn_together(family):
    model = convert_to_mpoe(
        dense_model(family), MPOEConfig(num_experts=2, target_modules=["ffn", "embedding"], shape="separable")
    )
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(head, TiedHead)
    x = torch.randn(3, table.embedding_dim)
    bias = 0 if head.bias is None else head.bias
    torch.testing.assert_close(head(x), x @ table.weight.T + bias, rtol=1e-4, atol=1e-4)
    model(**batch(family)).loss.backward()
    assert all(core.grad is not None and core.grad.abs().sum() > 0 for core in table.cores.parameters())
    names = [name for name, _ in model.named_parameters() if "head" in name or "decoder.cores" in name]
    assert not [name for name in names if "cores" in name]


@torch.no_grad()
def test_heads_of_their_own_stay_dense(tmp_path):
    model, inputs = dense_model("t5"), batch("t5")
    model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight))
    converted = convert_to_mpoe(
        model, MPOEConfig(num_experts=2, target_modules=["ffn", "embedding"], shape="separable")
    )
    assert type(converted.lm_head) is nn.Linear
    assert relative_difference("t5", model(**inputs), converted(**inputs), inputs) <= 1e-5
    converted.save_pretrained(tmp_path)
    assert torch.equal(load_mpoe(tmp_path)(**inputs).logits, converted(**inputs).logits)


def test_tables_that_are_not_shared_are_refused():
    model = dense_model("t5")
    model.decoder.embed_tokens.weight = nn.Parameter(torch.randn_like(model.shared.weight))
    with pytest.raises(ValueError, match=r"decoder\.embed_tokens must share the table of shared"):
        convert_to_mpoe(model, MPOEConfig(target_modules=["embedding"], shape="separable"))


@torch.no_grad()
def test_caps_of_each_component():
    caps = {"max_bond": 7, "attention_max_bond": 6, "embedding_max_bond": 5, "pooler_max_bond": 4}
    model = convert_to_mpoe(dense_model("bert"), MPOEConfig(shape="paper", target_modules=ALL, **caps))
    largest = {}
    for name, cores in mpo_modules(model):
        kind = next(k for k in ("pooler", "embedding", "attention", "experts") if k in name)
        largest[kind] = max(largest.get(kind, 0), *cores.shape.bond_dims)
    assert largest == {"experts": 7, "attention": 6, "embedding": 5, "pooler": 4}
    assert isinstance(model.pooler.dense, MPOLinear)


@torch.no_grad()
def test_vocabularies_are_padded_and_unknown_ids_refused():
    model = dense_model("gpt2")
    shape = MPOShape((4, 4, 4), (2, 4, 3), None, None, 60, 24)
    config = MPOEConfig(target_modules=["embedding"], shape_pattern={"wte": shape}, shape="separable")
    converted = convert_to_mpoe(model, config)
    table = converted.get_input_embeddings()
    assert (table.cores.shape.padded_in, table.num_embeddings) == (64, 60)
    assert converted(input_ids=torch.tensor([[59]])).logits.shape[-1] == 60
    with pytest.raises(IndexError):
        converted(input_ids=torch.tensor([[60]]))
    with pytest.raises(ValueError, match="new_num_tokens must be None for an MPO embedding of 60 tokens; got 64"):
        converted.resize_token_embeddings(64)


@torch.no_grad()
def test_shapes_by_pattern(tmp_path):
    pattern = {
        r"h\.0\.mlp": "paper",
        "mlp": {"up": MPOShape.light(24, 96, 8), "down": MPOShape.light(96, 24, 8)},
        r"attn\.c_attn": 5,
    }
    model, inputs = dense_model("gpt2"), batch("gpt2")
    config = MPOEConfig(num_experts=2, target_modules=["ffn", "attention"], shape_pattern=pattern, shape="separable")
    converted = convert_to_mpoe(model, config)
    shapes = {name: cores.shape for name, cores in mpo_modules(converted)}
    assert shapes["transformer.h.0.mlp.experts.up"] == MPOShape.paper(24, 96)
    assert shapes["transformer.h.1.mlp.experts.up"] == MPOShape.light(24, 96, 8)
    assert shapes["transformer.h.1.attn.c_attn.cores"] == MPOShape.paper(24, 72, max_bond=5)
    assert shapes["transformer.h.1.attn.c_proj.cores"].is_full
    converted.save_pretrained(tmp_path)
    again = load_mpoe(tmp_path)
    assert torch.equal(again(**inputs).logits, converted(**inputs).logits)


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ({r"h\.7\.mlp": "paper"}, "which is none of the"),
        ({"mlp": MPOShape.paper(24, 96)}, "a mapping with 'up' and 'down'"),
        ({"wte": {"up": MPOShape.paper(24, 96), "down": MPOShape.paper(96, 24)}}, "which is one matrix"),
        ({"wte": MPOShape.paper(24, 24)}, "must be for a weight [60, 24]; got one for [24, 24]"),
    ],
)
def test_patterns_that_do_not_fit(pattern, words):
    config = MPOEConfig(target_modules=["ffn", "embedding"], shape_pattern=pattern, shape="separable")
    with pytest.raises(ValueError) as caught:
        convert_to_mpoe(dense_model("gpt2"), config)
    assert words in str(caught.value)


@pytest.mark.parametrize("family", ["t5", "gpt2", "bert", "llama"])
@pytest.mark.parametrize("moe_type", ["moe", "none"])
@pytest.mark.parametrize("expert_type", ["mpo", "dense"])
@torch.no_grad()
def test_every_mixture_starts_as_the_dense_model_and_reloads(family, moe_type, expert_type, tmp_path):
    model, inputs = dense_model(family), batch(family)
    # every expert has room for all tokens: nothing is dropped
    router = {"eval_capacity_factor": 4.0} if moe_type == "moe" else {}
    config = MPOEConfig(num_experts=4, moe_type=moe_type, expert_type=expert_type, router=router)
    converted = convert_to_mpoe(model, config)
    after = converted(**inputs)
    assert relative_difference(family, model(**inputs), after, inputs) <= 1e-5
    assert ("aux_loss" in after) == (moe_type == "moe")
    layers = [m for m in converted.modules() if isinstance(m, MPOEFeedForward)]
    assert {layer.num_experts for layer in layers} == {4 if moe_type == "moe" else 1}
    converted.save_pretrained(tmp_path)
    assert torch.equal(result(load_mpoe(tmp_path)(**inputs)), result(after))
    if expert_type == "mpo":
        assert relative_difference(family, after, merge_experts(converted)(**inputs), inputs) <= 1e-5


@torch.no_grad()
def test_llama_gates_with_biases_are_refused():
    model = dense_model("llama")
    for layer in model.model.layers:
        layer.mlp.gate_proj.bias = nn.Parameter(torch.ones(48))
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.gate_proj must have no bias"):
        convert_to_mpoe(model)
