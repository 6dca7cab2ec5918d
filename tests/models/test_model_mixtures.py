"""Models that are already mixtures: their experts stay or become MPO experts, and can be converted back."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from mpoe import MPOEConfig, RouterConfig, convert_to_mpoe, load_mpoe, merge_experts
from mpoe.cli import export as command
from mpoe.estimation import take_inventory
from mpoe.layers import MixtureExperts, MPOLinear
from mpoe.models.find import expert_modules, router_modules
from mpoe.models.table import TABLE

from .tiny_models import EXPERTS, first_result, heads_of, text_rows, tiny_batch, tiny_model

MIXTURES = [model_type for model_type, row in TABLE.items() if row.is_mixture]
DAILY = ("qwen2_moe", "deepseek_v3")
CASES = [
    pytest.param(
        *case, id="-".join(case[::2]), marks=[] if case[0] in DAILY and "CausalLM" in case[1] else [pytest.mark.slow]
    )
    for case in heads_of(MIXTURES)
]


def result(model, inputs):
    with torch.no_grad():
        return text_rows(first_result(model(**inputs)), inputs)


def close(found, expected, bound=1e-5):
    return float((found - expected).abs().max()) <= bound * float(expected.abs().max())


def alike(model, relative=0.0):
    """``model`` with every expert a copy of the first plus noise, so that MPOs around one centre fit them."""
    with torch.no_grad():
        for _, experts in expert_modules(model):
            for weight in experts.parameters():
                weight.copy_(weight[:1] + relative * torch.randn_like(weight))
    return model


@pytest.mark.parametrize(("model_type", "auto", "name"), CASES)
def test_experts_stay_or_become_mpos_and_come_back(model_type, auto, name, tmp_path):
    model = alike(tiny_model(model_type, name))
    inputs = tiny_batch(model, model_type)
    expected = result(model, inputs)
    kept = convert_to_mpoe(model)
    assert type(kept).__name__ == f"MPOE{name}"
    assert torch.equal(result(kept, inputs), expected)
    assert kept.mpoe_config.num_experts == EXPERTS
    assert list(kept.state_dict()) == list(model.state_dict())
    changed = convert_to_mpoe(model, MPOEConfig(existing_experts="mpo"))
    assert any(isinstance(module, MixtureExperts) for module in changed.modules())
    assert close(result(changed, inputs), expected)
    for place, one in enumerate((kept, changed)):
        one.save_pretrained(tmp_path / str(place))
        for again in (
            load_mpoe(tmp_path / str(place)),
            getattr(transformers, auto).from_pretrained(tmp_path / str(place)),
        ):
            assert type(again) is type(one)
            own, other = one.state_dict(), again.state_dict()
            assert list(own) == list(other)
            assert all(torch.equal(own[key], other[key]) for key in own)
            # The weights are elsewhere in memory, so PyTorch's short products may end in other bits.
            assert close(result(again, inputs), result(one, inputs), 1e-6)
    stock = merge_experts(changed, as_=model_type)
    assert type(stock) is type(model)
    assert close(result(stock, inputs), result(changed, inputs))
    assert close(result(merge_experts(changed), inputs), expected)
    assert torch.equal(result(merge_experts(kept, as_=model_type), inputs), expected)


def test_the_error_of_every_layer_and_expert_is_told(capsys):
    torch.manual_seed(0)
    model = alike(tiny_model("olmoe", "OlmoeForCausalLM"), relative=0.02)
    with pytest.warns(UserWarning, match=r"differ from the model's own by [\d.]+% to [\d.]+% of their norm"):
        changed = convert_to_mpoe(model, MPOEConfig(existing_experts="mpo", layers_to_transform=[1]))
    names = [f"model.layers.1.mlp.experts.{kind}" for kind in ("down", "gate_proj", "up")]
    assert sorted(changed.conversion_report) == names
    stock, mine = model.model.layers[1].mlp.experts, changed.model.layers[1].mlp.experts
    gate, up = stock.gate_up_proj.chunk(2, 1)
    for kind, weights in {"gate_proj": gate, "up": up, "down": stock.down_proj}.items():
        told = changed.conversion_report[f"model.layers.1.mlp.experts.{kind}"]
        off = (mine.projections()[kind].dense_weights() - weights.transpose(1, 2)).flatten(1).norm(dim=1)
        found = off / weights.flatten(1).norm(dim=1)
        torch.testing.assert_close(torch.tensor(told["expert_errors"]), found.detach(), rtol=1e-3, atol=1e-6)
        assert 0 < told["relative_error_bound"] < 0.2
    assert set(changed.config.conversion_errors) == set(names)
    assert isinstance(changed.model.layers[0].mlp.experts, type(stock))
    changed.mpoe_summary()
    shown = capsys.readouterr().out
    assert all(f"{error:.1e}" in shown for error in changed.config.conversion_errors.values())


@pytest.mark.filterwarnings("ignore:experts around one centre")
def test_trains_and_counts():
    model = tiny_model("mixtral", "MixtralForCausalLM", output_router_logits=True, router_aux_loss_coef=0.5)
    dense = sum(p.numel() for p in model.parameters())
    changed = convert_to_mpoe(model, MPOEConfig(existing_experts="mpo"))
    kept = convert_to_mpoe(model)
    for one in (changed, kept):
        report = one.parameter_report()
        assert report["dense_total"] == report["switch_total"] == dense
        assert report["total"] == sum(p.numel() for p in one.parameters())
    assert kept.parameter_report()["expert"] > 0
    inputs = tiny_batch(model, "mixtral")
    output = changed(**inputs, labels=inputs["input_ids"])
    assert changed.config.router_aux_loss_coef == 0.5
    output.loss.backward()
    assert output.aux_loss > 0
    assert all(p.grad is not None for p in changed.parameters())
    changed.freeze_experts()
    assert not any(p.requires_grad for _, m in expert_modules(changed) for p in m.parameters())
    kept.freeze_router()
    assert not any(p.requires_grad for m in router_modules(kept) for p in m.parameters())
    kept.freeze_router(False)
    assert all(p.requires_grad for p in kept.parameters())


@pytest.mark.filterwarnings("ignore:experts around one centre")
def test_plans_name_what_is_there():
    model = tiny_model("mixtral", "MixtralForCausalLM")
    kept, changed = convert_to_mpoe(model), convert_to_mpoe(model, MPOEConfig(existing_experts="mpo"))
    assert kept.tp_plan == model.tp_plan
    assert [key for key in kept.tp_plan if key.endswith("experts.gate_up_proj")]
    assert not [key for key in changed.tp_plan if "experts" in key]
    assert [key for key in changed.tp_plan if key.endswith("q_proj")]
    assert not changed._ep_plan


def test_attention_of_a_mixture_becomes_mpos():
    model = tiny_model("olmoe", "OlmoeForCausalLM")
    inputs = tiny_batch(model, "olmoe")
    changed = convert_to_mpoe(model, MPOEConfig(target_modules=["ffn", "attention"]))
    assert any(isinstance(module, MPOLinear) for module in changed.modules())
    assert close(result(changed, inputs), result(model, inputs))
    with pytest.raises(ValueError, match="only the feed-forward networks may be in MPO form"):
        merge_experts(changed, as_="olmoe")


def test_an_adapted_olmoe_is_exported(tmp_path, monkeypatch, capsys):
    class Tokenizer:
        def save_pretrained(self, folder):
            """Saves nothing: the tiny model has no tokenizer."""

    monkeypatch.setattr("mpoe.cli.models.load_tokenizer", lambda source: Tokenizer())
    model = tiny_model("olmoe", "OlmoeForCausalLM")
    inputs = tiny_batch(model, "olmoe")
    convert_to_mpoe(model).save_pretrained(tmp_path / "kept")
    command.command([str(tmp_path / "kept"), str(tmp_path / "out"), "--to", "olmoe"])
    assert "a OlmoeForCausalLM whose logits differ by 0.0e+00" in capsys.readouterr().out
    assert torch.equal(
        result(transformers.OlmoeForCausalLM.from_pretrained(tmp_path / "out"), inputs), result(model, inputs)
    )


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_experts": 3}, "num_experts must be left out for MixtralForCausalLM, which has 4 experts"),
        ({"moe_type": "none"}, "moe_type must be left out"),
        ({"expert_type": "dense"}, "expert_type must be left out"),
        ({"router": RouterConfig(top_k=2)}, "router must be left out"),
        ({"existing_experts": "mpo", "shape": "hidden"}, "shape 'hidden' needs one dense projection for all experts"),
        (
            {"existing_experts": "mpo", "shape_pattern": {"layers.0.mlp.experts": "hidden"}},
            "shape 'hidden' needs one dense projection for all experts",
        ),
        ({"existing_experts": "mpo", "separable_left": 7}, r"experts\.up: .*7"),
        ({"existing_experts": "mpo", "layers_to_transform": [2]}, r"layer indices 0\.\.1; got 2"),
    ],
)
def test_settings_that_do_not_fit_a_mixture(values, words):
    with pytest.raises(ValueError, match=words):
        convert_to_mpoe(tiny_model("mixtral", "MixtralForCausalLM"), MPOEConfig(**values))


def test_what_does_not_fit_is_refused(tmp_path):
    saved = tmp_path / "config.json"
    tiny_model("mixtral", "MixtralForCausalLM").config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="existing_experts must be one of 'keep', 'mpo'; got 'drop'"):
        MPOEConfig(existing_experts="drop")
    with pytest.raises(ValueError, match="must be a dense model to be planned; mixtral is a mixture already"):
        take_inventory(str(saved))
    with pytest.raises(ValueError, match="LlamaForCausalLM has no experts"):
        convert_to_mpoe(tiny_model("llama", "LlamaForCausalLM"), MPOEConfig(existing_experts="mpo"))
    dense = tiny_model("qwen3_moe", "Qwen3MoeForCausalLM", mlp_only_layers=[0, 1])
    with pytest.raises(ValueError, match="Qwen3MoeForCausalLM must have layers with experts; this one has none"):
        convert_to_mpoe(dense)
    kept = convert_to_mpoe(tiny_model("mixtral", "MixtralForCausalLM"))
    with pytest.raises(ValueError, match=r"must have MPO experts; got .* existing_experts='keep'"):
        merge_experts(kept)
    with pytest.raises(ValueError, match="olmoe: this is a mixtral already, and stays one"):
        merge_experts(kept, as_="olmoe")
    with pytest.raises(ValueError, match="as_ must be one of 'mixtral'; got 'gpt2'"):
        merge_experts(kept, as_="gpt2")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda e: e.register_parameter("bias", nn.Parameter(torch.zeros(1))), "they also hold bias"),
        (lambda e: setattr(e, "is_concatenated", False), r"in another way than act\(gate\) \* up"),
        (
            lambda e: setattr(e, "down_proj", nn.Parameter(e.down_proj.mT.clone())),
            r"must be \[E, 2F, I\] beside down_proj",
        ),
    ],
)
def test_experts_of_another_kind_are_refused(change, words):
    model = tiny_model("mixtral", "MixtralForCausalLM")
    change(model.model.layers[0].mlp.experts)
    with pytest.raises(ValueError, match=words):
        convert_to_mpoe(model, MPOEConfig(existing_experts="mpo"))
