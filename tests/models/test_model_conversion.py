"""Conversion keeps the results, leaves its input unchanged, and refuses what it cannot do; wider dense models."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import GPT2LMHeadModel
from transformers.models.distilbert import DistilBertConfig, DistilBertModel

from mpoe import MPOEConfig, RouterConfig, convert_to_mpoe, load_mpoe, merge_experts
from mpoe.data.embedded import load_stand_in
from mpoe.layers import MPOEFeedForward
from mpoe.models import mpo_modules
from mpoe.models.find import hidden_size_as_mixture, widened
from mpoe.models.table import DENSE
from mpoe_kernels import MPOShape
from tests.cases import pairwise

from .tiny_models import (
    FAMILIES,
    GENERATED,
    batch,
    dense_model,
    first_result,
    relative_difference,
    result,
    text_rows,
    tiny_batch,
    tiny_model,
    valid_rows,
)


@pytest.mark.parametrize(
    ("family", "shape", "gauge"),
    pairwise(list(FAMILIES), ["paper", "light", "separable"], ["symmetric", "orthogonal"])
    + [(family, "separable", "identity") for family in FAMILIES],
)
@torch.no_grad()
def test_full_bonds_change_nothing(family, shape, gauge):
    model, inputs = dense_model(family), batch(family)
    converted = convert_to_mpoe(model, MPOEConfig(num_experts=4, shape=shape, gauge=gauge))
    before, after = model(**inputs), converted(**inputs)
    assert relative_difference(family, before, after, inputs) <= 1e-5
    if "loss" in before:
        torch.testing.assert_close(after.task_loss, before.loss, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(after.loss, after.task_loss + after.aux_loss)


@pytest.mark.parametrize("family", ["t5", "gpt2", "bert"])
def test_the_input_is_left_alone(family):
    model = dense_model(family)
    state, kind = copy.deepcopy(model.state_dict()), type(model)
    converted = convert_to_mpoe(model, MPOEConfig(num_experts=2, shape="separable"))
    with torch.no_grad():
        for parameter in converted.parameters():
            parameter.add_(1.0)
    assert type(model) is kind
    assert model.config.model_type == family
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(isinstance(module, MPOEFeedForward) for module in model.modules())


def test_inplace_returns_the_same_object():
    model = dense_model("gpt2").train()
    embedding = model.transformer.wte.weight
    converted = convert_to_mpoe(model, inplace=True)
    assert converted is model
    assert converted.lm_head.weight is embedding
    assert all(module.training for module in converted.modules())


def test_ties_dtype_and_attention_are_kept():
    model = dense_model("t5").to(torch.bfloat16)
    model.set_attn_implementation("eager")
    converted = convert_to_mpoe(model, MPOEConfig(shape="separable"))
    assert converted.lm_head.weight is converted.shared.weight
    assert converted.config._attn_implementation == "eager"
    assert converted.encoder.block[0].layer[1].DenseReluDense.experts.up.central.dtype == torch.bfloat16
    assert converted.encoder.block[0].layer[1].DenseReluDense.router.weight.dtype == torch.float32
    untied = dense_model("t5")
    untied.lm_head.weight = nn.Parameter(torch.randn_like(untied.lm_head.weight))
    converted = convert_to_mpoe(untied)
    assert torch.equal(converted.lm_head.weight, untied.lm_head.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("family", ["t5", "gpt2", "bert"])
@torch.no_grad()
def test_other_dtypes(family, dtype):
    model, inputs = dense_model(family).to(dtype), batch(family)
    converted = convert_to_mpoe(model, MPOEConfig(num_experts=2, shape="separable"))
    exact = convert_to_mpoe(model.float(), MPOEConfig(num_experts=2, shape="separable"))
    a, b = (valid_rows(family, result(m(**inputs)).float(), inputs) for m in (converted, exact))
    assert result(converted(**inputs)).dtype == dtype
    assert (a - b).abs().max() / b.abs().max() < (1e-5 if dtype == torch.float64 else 0.1)


def test_report_and_rate_ratios():
    model = dense_model("t5_gated")
    converted = convert_to_mpoe(model, MPOEConfig(num_experts=2, shape="paper", max_bond=8))
    names = [name for name, _ in mpo_modules(converted)]
    assert len(names) == 3 * 3
    assert set(converted.conversion_report) == set(converted.config.mpoe["rate_ratios"]) == set(names)
    cores = converted.get_submodule(names[0])
    weight = model.encoder.block[0].layer[1].DenseReluDense.wi_1.weight.T
    error = (cores.dense_weights()[0] - weight).norm().item()
    entry = converted.conversion_report[names[0]]
    assert 0 < error <= entry["error_bound"] * (1 + 1e-5)
    assert len(entry["local_errors"]) == 4
    assert list(cores.rate_ratios) == converted.config.mpoe["rate_ratios"][names[0]]


def test_each_matrix_is_decomposed_once(monkeypatch):
    import mpoe.layers.cores as module

    calls = []
    original = module.decompose_with_errors
    monkeypatch.setattr(module, "decompose_with_errors", lambda *args: calls.append(1) or original(*args))
    convert_to_mpoe(dense_model("gpt2"), MPOEConfig(num_experts=8, shape="separable"))
    assert len(calls) == 4


def test_layers_and_exclusions():
    model = dense_model("t5")
    converted = convert_to_mpoe(model, MPOEConfig(layers_to_transform=[1], shape="separable"))
    names = [n for n, m in converted.named_modules() if isinstance(m, MPOEFeedForward)]
    assert names == ["encoder.block.1.layer.1.DenseReluDense"]
    converted = convert_to_mpoe(
        model, MPOEConfig(exclude_modules=["encoder.block.0.layer.1.DenseReluDense"], shape="separable")
    )
    assert len([m for m in converted.modules() if isinstance(m, MPOEFeedForward)]) == 2
    with pytest.raises(ValueError, match=r"close matches: .*DenseReluDense"):
        convert_to_mpoe(model, MPOEConfig(exclude_modules=["encoder.block.0.layer.1.DenseReluDens"], shape="separable"))
    with pytest.raises(ValueError, match=r"layer indices 0\.\.1; got 7"):
        convert_to_mpoe(model, MPOEConfig(layers_to_transform=[7], shape="separable"))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_merged_experts_compute_the_same(family, converted):
    model = converted(family, auxiliary_noise=0.3, router=RouterConfig(top_k=2))
    merged, inputs = merge_experts(model), batch(family)
    assert type(merged) is type(model)
    assert merged.config.mpoe["expert_type"] == "dense"
    assert model.config.mpoe["expert_type"] == "mpo"
    assert list(mpo_modules(merged)) == []
    assert relative_difference(family, model(**inputs), merged(**inputs), inputs) <= 1e-5
    with pytest.raises(ValueError, match="expert_type='dense'"):
        merge_experts(merged)


def test_refusals_come_before_any_work():
    model = dense_model("gpt2")
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[0, 0] = float("nan")
        model.transformer.h[0].ln_1.bias[0] = float("inf")
    with pytest.raises(ValueError, match=r"transformer\.h\.0\.ln_1\.bias, transformer\.h\.1\.mlp\.c_fc\.weight"):
        convert_to_mpoe(model, inplace=True)
    assert type(model) is GPT2LMHeadModel
    tiny = DistilBertModel(DistilBertConfig(dim=8, n_heads=2, hidden_dim=8, n_layers=1, vocab_size=9))
    with pytest.raises(ValueError, match=r"a model of t5, .* vit, .*; got DistilBertModel .*sites="):
        convert_to_mpoe(tiny)
    with pytest.raises(TypeError, match="config must be an MPOEConfig; got dict"):
        convert_to_mpoe(dense_model("gpt2"), {"num_experts": 2})
    with pytest.raises(ValueError, match="an MPOE model already"):
        convert_to_mpoe(convert_to_mpoe(dense_model("gpt2")))
    shapes = {"up": MPOShape.paper(24, 40), "down": MPOShape.paper(40, 24)}
    with pytest.raises(ValueError, match=r"transformer\.h\.0\.mlp\.c_fc.*\[24, 96\]"):
        convert_to_mpoe(dense_model("gpt2"), MPOEConfig(shape=shapes))
    with pytest.raises(ValueError, match="did you mean 'gelu"):
        convert_to_mpoe(tiny_model("gpt2", "GPT2LMHeadModel", activation_function="quick_gelu"))


def test_scale_decoder_outputs_survives():
    for tied in (True, False):
        sizes = {"tie_word_embeddings": tied, "num_decoder_layers": 1}
        converted = convert_to_mpoe(tiny_model("t5", "T5ForConditionalGeneration", **sizes))
        assert converted.config.scale_decoder_outputs is tied
        assert converted.decoder.config.is_decoder is True
        assert converted.decoder.config.num_layers == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "egaer"}, r"backend must be one of \['auto', 'eager'.*got 'egaer'"),
        ({"layers_to_transform": []}, "nothing is left to convert"),
    ],
)
def test_refused_before_any_work(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert_to_mpoe(dense_model("t5"), MPOEConfig(num_experts=2, **options))


def test_float16_t5_is_warned_about() -> None:
    with pytest.warns(UserWarning, match="Prefer bfloat16"):
        convert_to_mpoe(dense_model("t5").half(), MPOEConfig(num_experts=2, shape="separable"))


def test_a_model_without_weights_and_a_path_that_is_none_are_refused():
    with torch.device("meta"):
        model = dense_model("gpt2")
    with pytest.raises(ValueError, match=r"model must hold weights; .* is on the device meta"):
        convert_to_mpoe(model)
    for path in (None, 3):
        with pytest.raises(TypeError, match="path must be the folder of a saved model; got"):
            load_mpoe(path)


@pytest.mark.parametrize("family", DENSE)
def test_of_every_family(family: str) -> None:
    name = next(name for model_type, _, name in GENERATED if model_type == family)
    dense = tiny_model(family, name)
    mixture = convert_to_mpoe(dense, MPOEConfig(num_experts=4))
    hidden = hidden_size_as_mixture(dense, mixture.mpoe_config)
    wide, less = widened(dense, hidden), widened(dense, hidden - 1)
    size, smaller, wanted = (sum(p.numel() for p in model.parameters()) for model in (wide, less, mixture))
    assert abs(size - wanted) <= (size - smaller) / 2
    batch = tiny_batch(dense, family)
    with torch.inference_mode():
        first, second = (text_rows(first_result(model(**batch)), batch) for model in (wide, dense))
    assert torch.allclose(first, second, atol=1e-4)


@pytest.mark.parametrize("kind", ["t5", "gpt2"])
def test_new_units_learn_from_the_first_step_on(kind: str) -> None:
    dense, _ = load_stand_in(kind)
    size = dense.config.d_ff if kind == "t5" else 4 * dense.config.n_embd
    wide = widened(dense, size + 24)
    assert getattr(wide, "loss_type", None) == getattr(dense, "loss_type", None)  # without it GPT-2 warns
    tokens = torch.randint(0, 100, (2, 9))
    wide(tokens, labels=tokens).loss.backward()
    (name,) = [n for n, _ in wide.named_parameters() if n.endswith(("wo.weight", "mlp.c_proj.weight"))][:1]
    grad = wide.get_parameter(name).grad
    assert (grad[:, size:] if kind == "t5" else grad[size:]).abs().sum() > 0


def test_a_mixture_cannot_be_widened() -> None:
    with pytest.raises(ValueError, match=r"a wider model must be of t5, .*; got mixtral"):
        hidden_size_as_mixture(tiny_model("mixtral", "MixtralForCausalLM"), MPOEConfig())
