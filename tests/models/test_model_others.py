"""What other tools do with a model: ways to compute dense experts, quantisers, PEFT."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn
from transformers.quantizers import auto as quantizers
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from mpoe import MPOEConfig, convert_to_mpoe, load_mpoe, merge_experts
from mpoe.layers.dense import IMPLEMENTATIONS, grouped_dense_linear
from mpoe.models import quantisable_parameters

from .small_models import batch
from .tiny_families import tiny_batch, tiny_model


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("own_bias", [False, True])
def test_every_way_to_compute_experts_gives_the_same(implementation, own_bias):
    torch.manual_seed(0)
    offsets = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    weight, bias = torch.randn(3, 8, 12), torch.randn(3, 12) if own_bias else torch.randn(12)
    x = torch.randn(6, 8)
    x[5] = torch.nan  # past the last offset

    def results(way):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        y = grouped_dense_linear(leaves[0], leaves[1], offsets, leaves[2], way)
        return [y, *torch.autograd.grad(y.sum(), leaves)]

    for found, expected in zip(results(implementation), results("eager"), strict=True):
        torch.testing.assert_close(found, expected)


def test_dense_experts_are_computed_as_transformers_option_says(converted, monkeypatch, tmp_path):
    model, inputs = merge_experts(converted("llama")).eval(), batch("llama")
    used = []

    def spied(*arguments):
        used.append(arguments[4])
        return grouped_dense_linear(*arguments)

    monkeypatch.setattr("mpoe.layers.dense.grouped_dense_linear", spied)
    expected = model(**inputs).logits
    assert set(used) == {"grouped_mm"}
    for name in IMPLEMENTATIONS:
        used.clear()
        model.set_experts_implementation(name)
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-5, atol=1e-5)
        assert set(used) == {name}
    with pytest.raises(ValueError, match=r"experts_implementation must be one of 'eager', .*; got 'sonicmoe'"):
        model.set_experts_implementation("sonicmoe")
    used.clear()
    model.gradient_checkpointing_enable()
    model.train()(**inputs).loss.backward()
    assert set(used) == {"grouped_mm"}  # the last setting, also in the recomputation
    model.save_pretrained(tmp_path)
    again = load_mpoe(tmp_path, experts_implementation="batched_mm")
    assert again.get_experts_implementation() == {"": "batched_mm"}


def test_a_mixture_keeps_the_ways_that_its_experts_have():
    model = tiny_model("mixtral", "MixtralForCausalLM")
    model.set_experts_implementation("eager")
    inputs, kept = tiny_batch(model, "mixtral"), convert_to_mpoe(model)
    assert kept.get_experts_implementation() == {"": "eager"}
    expected = model(**inputs).logits
    for name in ("eager", "batched_mm", "grouped_mm"):
        kept.set_experts_implementation(name)
        torch.testing.assert_close(kept(**inputs).logits, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="is not supported"):
        kept.set_experts_implementation("nothing")


# ----------------------------------------------------------------- quantisers


class Halving(QuantizationConfigMixin):
    """A quantiser that, like all of them, replaces linear layers; here by half-precision ones."""

    def __init__(self, **kwargs):
        self.quant_method = "halving"


class HalvingQuantizer(HfQuantizer):
    requires_calibration = False
    is_trainable = False

    def _process_model_after_weight_loading(self, model, **kwargs):
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.to(torch.bfloat16)
        return model

    def is_serializable(self, *args, **kwargs):
        return False


@pytest.fixture
def halving(monkeypatch):
    monkeypatch.setitem(quantizers.AUTO_QUANTIZER_MAPPING, "halving", HalvingQuantizer)
    monkeypatch.setitem(quantizers.AUTO_QUANTIZATION_CONFIG_MAPPING, "halving", Halving)


def test_a_quantiser_that_leaves_cores_alone_is_named(halving, converted, tmp_path):
    model = converted("llama")
    numbers = quantisable_parameters(model)
    assert sum(numbers.values()) == sum(p.numel() for p in model.parameters())
    assert numbers["linear"] == sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    assert numbers["central"] > 0
    model.save_pretrained(tmp_path)
    share = numbers["linear"] / sum(numbers.values())
    words = (
        rf"halving quantises linear layers, {share:.0%} of the parameters of MPOELlamaForCausalLM at most; .*central"
    )
    with pytest.warns(UserWarning, match=words):
        load_mpoe(tmp_path, quantization_config=Halving())
    with pytest.warns(UserWarning, match=words):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=Halving())


def test_a_quantiser_that_reaches_all_there_is_goes_without_a_word(halving, recwarn, tmp_path):
    model = tiny_model("llama", "LlamaForCausalLM")
    convert_to_mpoe(model, MPOEConfig(shape="hidden", moe_type="none")).save_pretrained(tmp_path)
    load_mpoe(tmp_path)
    assert not [w for w in recwarn if "quantises" in str(w.message)]
