"""What other tools expect of a model class and do with a model: remote code, plans, models outside
the table."""

import os
import re
import sys

import pytest
import torch
import transformers
from transformers import dynamic_module_utils

import mpoe
from mpoe import MPOEConfig, convert_to_mpoe, load_mpoe, save_mpoe_only
from mpoe.layers import MPOEFeedForward, MPOLinear
from mpoe.models import MPOELlamaForCausalLM, MPOELlamaModel
from mpoe.models.base import ROUTING_FIELDS
from tests.assertions import read_json, refuses, run_python

from .tiny_models import batch, dense_model, relative_difference, tiny_batch, tiny_model

LLAMA_SITES = {
    "holder": "layers.*.mlp",
    "up": "up_proj",
    "gate_proj": "gate_proj",
    "down": "down_proj",
    "activation": "silu",
}


OPEN = (
    "import sys, transformers\n"
    "model = getattr(transformers, sys.argv[2]).from_pretrained(sys.argv[1], {})\n"
    "print(type(model).__name__)"
)


@pytest.mark.slow
def test_remote_code_opens_a_model_in_a_program_that_does_not_import_mpoe(
    converted, tmp_path, monkeypatch
):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    for shape in ("neurons", "separable"):
        converted("llama", shape=shape).save_pretrained(tmp_path / shape)
    opened = run_python(
        "-c", OPEN.format("trust_remote_code=True"), tmp_path / "neurons", "AutoModelForCausalLM"
    )
    assert opened.splitlines()[-1] == "MPOELlamaForCausalLM"
    (tmp_path / "separable").rename(tmp_path / "model")
    assert read_json(tmp_path / "model/config.json")["auto_map"] == {
        "AutoConfig": "modeling_mpoe.MPOELlamaConfig",
        "AutoModel": "modeling_mpoe.MPOELlamaModel",
        "AutoModelForCausalLM": "modeling_mpoe.MPOELlamaForCausalLM",
    }
    program = OPEN.format("trust_remote_code=True")
    for auto, name in (
        ("AutoModelForCausalLM", "MPOELlamaForCausalLM"),
        ("AutoModel", "MPOELlamaModel"),
    ):
        assert run_python("-c", program, tmp_path / "model", auto).splitlines()[-1] == name
    blocked = (
        "import sys; sys.modules['mpoe'] = None; sys.modules['mpoe.models'] = None\n" + program
    )
    told = run_python("-c", blocked, tmp_path / "model", "AutoModelForCausalLM", code=1)
    assert told.splitlines()[-1].startswith(
        "ImportError: this model needs the package mpoe: pip install"
    )
    assert told.rstrip().endswith(f'"mpoe>={mpoe.__version__}"')


def test_a_model_opened_by_remote_code_is_saved_as_ever(converted, tmp_path):
    model = converted("llama")
    model.save_pretrained(tmp_path / "one")
    type(model).register_for_auto_class("AutoModelForCausalLM")
    type(model.config).register_for_auto_class()
    model.save_pretrained(tmp_path / "two")
    assert sorted(os.listdir(tmp_path / "two")) == sorted(os.listdir(tmp_path / "one"))
    assert (tmp_path / "two/modeling_mpoe.py").read_text() == (
        tmp_path / "one/modeling_mpoe.py"
    ).read_text()


@torch.no_grad()
def test_base_model_of_a_model_with_a_head(converted, tmp_path):
    model, inputs = converted("llama"), batch("llama", labels=False)
    model.save_pretrained(tmp_path)
    base = transformers.AutoModel.from_pretrained(tmp_path)
    assert type(base) is MPOELlamaModel
    expected = model.model(**inputs).last_hidden_state
    found = base(**inputs)
    mask = inputs["attention_mask"].bool()
    torch.testing.assert_close(found.last_hidden_state[mask], expected[mask])
    assert found.expert_load.sum(1).tolist() == [int(mask.sum())] * 2


def test_the_tensor_parallel_plan_names_only_what_is_there(converted):
    for model in (converted("llama"), MPOELlamaForCausalLM(converted("llama").config)):
        assert not [key for key in model.tp_plan if ".mlp." in key]
        assert "model.layers.*.self_attn.q_proj" in model.tp_plan
    assert "model.layers.*.mlp.up_proj" in converted("llama", shape="neurons").tp_plan
    hidden = converted("llama", shape="hidden", layers_to_transform=[0])
    assert not [key for key in hidden.tp_plan if ".mlp." in key]
    assert not {"lm_head", "model.embed_tokens"} & {
        *converted("llama", target_modules=["ffn", "embedding"]).tp_plan
    }
    partly = converted("llama", layers_to_transform=[1])
    assert "model.layers.*.mlp.up_proj" in partly.tp_plan
    attention = converted(
        "llama",
        target_modules=["ffn", "attention"],
        exclude_modules=["model.layers.0.self_attn.o_proj"],
    )
    assert any(isinstance(module, MPOLinear) for module in attention.modules())
    assert not [key for key in attention.tp_plan if ".layers." in key and "_proj" in key]


def test_expert_parallelism_leaves_experts_whole(converted):
    model = converted("llama", expert_type="dense")
    assert model.config.base_model_ep_plan == {}  # an empty plan, not a missing one
    assert model._ep_plan == {}


def test_float32_modules_that_are_gone_are_not_named(converted):
    assert converted("t5")._keep_in_fp32_modules == set()
    assert converted("t5", layers_to_transform=[1])._keep_in_fp32_modules == {"wo"}


@torch.no_grad()
def test_router_outputs_by_the_usual_names(converted):
    model, inputs = converted("gpt2"), batch("gpt2")
    assert set(ROUTING_FIELDS) <= set(model(**inputs))
    hidden = model(**inputs, output_router_logits=False)
    assert not set(ROUTING_FIELDS) & set(hidden)
    torch.testing.assert_close(hidden.loss, model(**inputs).loss)
    model.config.output_router_logits = False
    assert "router_logits" not in model(**inputs)
    assert "router_logits" in model(**inputs, output_router_logits=True)


@pytest.mark.parametrize("model_type", ["bert", "deberta-v2"])
@torch.no_grad()
def test_feed_forward_chunks_give_the_same(model_type):
    name = {"bert": "BertModel", "deberta-v2": "DebertaV2Model"}[model_type]
    model = tiny_model(model_type, name, chunk_size_feed_forward=3)
    inputs = tiny_batch(model, model_type)
    converted = convert_to_mpoe(model, MPOEConfig(num_experts=2, shape="separable"))
    assert relative_difference(model(**inputs), converted(**inputs), inputs) <= 1e-5
    assert type(converted)(converted.config).config.chunk_size_feed_forward == 3


# ------------------------------------------------------------ a model that is not in the table


OUTSIDER = ("granite", "GraniteForCausalLM")


@torch.no_grad()
def test_sites_convert_a_model_outside_the_table(tmp_path, monkeypatch):
    model = tiny_model(*OUTSIDER)
    inputs = batch("llama")
    converted = convert_to_mpoe(
        model, MPOEConfig(num_experts=2, shape="separable"), sites=LLAMA_SITES
    )
    assert relative_difference(model(**inputs), converted(**inputs), inputs) <= 1e-5
    assert len([m for m in converted.modules() if isinstance(m, MPOEFeedForward)]) == 2
    converted.save_pretrained(tmp_path)
    again = load_mpoe(tmp_path)
    assert type(again).__name__ == "MPOEGraniteForCausalLM"
    assert torch.equal(again(**inputs).logits, converted(**inputs).logits)
    beside = convert_to_mpoe(model, MPOEConfig(num_experts=2, shape="neurons"), sites=LLAMA_SITES)
    assert torch.equal(beside(**inputs).logits, model(**inputs).logits)
    save_mpoe_only(converted, tmp_path / "only", model)
    assert torch.equal(
        load_mpoe(tmp_path / "only", model)(**inputs).logits, converted(**inputs).logits
    )
    # In this process, with its own folder for remote code; a program without mpoe is tested above,
    # with a Llama.
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(opened).__name__ == "MPOEGraniteForCausalLM"


def test_sites_of_an_encoder_see_its_padding():
    inside = {kind: f"DenseReluDense.{name}" for kind, name in (("up", "wi"), ("down", "wo"))}
    sites = {
        **inside,
        "holder": "encoder.block.*.layer.1",
        "place": "DenseReluDense",
        "activation": "relu",
    }
    model = convert_to_mpoe(
        dense_model("t5"), MPOEConfig(num_experts=2), sites={**sites, "stream": "encoder"}
    )
    tokens = int(batch("t5")["attention_mask"].sum())
    assert model(**batch("t5")).expert_load.sum(1).tolist() == [2 * tokens] * 2


@torch.no_grad()
def test_sites_with_fused_projections_and_parts_left_empty():
    """A user gives the same sites as the table's rows for Phi-3 and OPT."""
    for model_type, name, sites in (
        (
            "phi3",
            "Phi3ForCausalLM",
            {
                "up": "gate_up_proj",
                "down": "down_proj",
                "fused": ["gate_proj", "up"],
                "activation": "silu",
            },
        ),
        (
            "opt",
            "OPTForCausalLM",
            {
                "up": "fc1",
                "down": "fc2",
                "place": "fc1",
                "emptied": ["activation_fn", "fc2"],
                "activation": "relu",
            },
        ),
    ):
        holder = "layers.*.mlp" if model_type == "phi3" else "decoder.layers.*"
        model = tiny_model(model_type, name)
        inputs = tiny_batch(model, model_type)
        converted = convert_to_mpoe(
            model, MPOEConfig(num_experts=2, shape="separable"), sites={"holder": holder, **sites}
        )
        assert relative_difference(model(**inputs), converted(**inputs), inputs) <= 1e-5


@pytest.mark.parametrize(
    "sites, kind, words",
    [
        (
            "mlp",
            TypeError,
            "sites must be a mapping with 'holder', 'up', 'down', 'activation'; got str",
        ),
        ({**LLAMA_SITES, "gate": "x"}, ValueError, "sites has no field 'gate'"),
        ({"holder": "layers.*.mlp", "up": "up_proj"}, ValueError, "it lacks down, activation"),
        (
            {**LLAMA_SITES, "fused": ["up", "x"]},
            ValueError,
            "sites['fused'][1] must be one of 'gate_proj', 'up'; got 'x'",
        ),
        (
            {**LLAMA_SITES, "place": "x"},
            ValueError,
            "sites['place'] names 'x', which model.layers.0.mlp does not hold",
        ),
        ({**LLAMA_SITES, "emptied": ["x"]}, ValueError, "sites['emptied'] names 'x', which"),
        ({**LLAMA_SITES, "holder": "a,b.*"}, ValueError, "commas in {a,b} alone; got 'a,b.*'"),
        ({**LLAMA_SITES, "holder": "layers.*.{mlp"}, ValueError, "got 'layers.*.{mlp'"),
        ({**LLAMA_SITES, "up": 3}, TypeError, "sites['up'] must be a name; got int 3"),
        (
            {**LLAMA_SITES, "emptied": "act"},
            TypeError,
            "sites['emptied'] must be a list of names; got 'act'",
        ),
        (
            {**LLAMA_SITES, "holder": "mlp"},
            ValueError,
            "must hold a * for the number of the layer, and commas in {a,b} alone; got 'mlp'",
        ),
        (
            {**LLAMA_SITES, "gate_proj": 0},
            TypeError,
            "sites['gate_proj'] must be a name; got int 0",
        ),
        (
            {**LLAMA_SITES, "zeroed": ["p", 1]},
            TypeError,
            "sites['zeroed'][1] must be a name; got int 1",
        ),
        (
            {**LLAMA_SITES, "dropout": "x"},
            TypeError,
            "sites['dropout'] must be a number; got str 'x'",
        ),
        (
            {**LLAMA_SITES, "output_dropout": 2},
            ValueError,
            "sites['output_dropout'] must be at least 0 and at most 1; got 2",
        ),
        (
            {**LLAMA_SITES, "output_dropout": "p_drop"},
            ValueError,
            "output_dropout must be a rate or a field of the model's configuration; got 'p_drop'",
        ),
        (
            {**LLAMA_SITES, "stream": "other"},
            ValueError,
            "sites['stream'] must be one of 'main', 'encoder', 'decoder'; got 'other'",
        ),
        ({**LLAMA_SITES, "activation": "silo"}, ValueError, "did you mean 'silu'"),
        (
            {**LLAMA_SITES, "holder": "blocks.*.mlp"},
            ValueError,
            "has no dense ffn modules to convert",
        ),
    ],
)
def test_sites_that_do_not_fit(sites, kind, words):
    refuses(
        kind,
        re.escape(words),
        convert_to_mpoe,
        tiny_model(*OUTSIDER),
        MPOEConfig(num_experts=2, shape="separable"),
        sites=sites,
    )


def test_classes_of_a_known_family_without_a_usual_head_are_refused():
    model = transformers.BertForNextSentencePrediction(dense_model("bert").config)
    refuses(
        ValueError,
        r"one of .*BertForMaskedLM.*; got BertForNextSentencePrediction .*sites=",
        convert_to_mpoe,
        model,
    )


def test_tables_that_scale_their_rows_are_refused():
    refuses(
        ValueError,
        r"embed_tokens is a Gemma3TextScaledWordEmbedding, which does more than look",
        convert_to_mpoe,
        tiny_model("gemma3_text", "Gemma3ForCausalLM"),
        MPOEConfig(target_modules=["ffn", "embedding"], shape="separable"),
    )
