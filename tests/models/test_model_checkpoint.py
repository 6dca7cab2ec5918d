"""Round trips through save_pretrained, from_pretrained, load_mpoe and the Auto classes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from mpoe import RouterConfig, load_mpoe, save_mpoe_only
from mpoe.models import MPOEBertModel, mpo_modules
from mpoe.models.weight_files import check_shapes

from .tiny_models import FAMILIES, batch, dense_model, result

AUTO = {
    "t5": AutoModelForSeq2SeqLM,
    "t5_gated": AutoModelForSeq2SeqLM,
    "gpt2": AutoModelForCausalLM,
    "bert": AutoModel,
    "bert_classifier": AutoModelForSequenceClassification,
    "bert_mlm": AutoModelForMaskedLM,
    "llama": AutoModelForCausalLM,
    "gpt2_base": AutoModel,
}


def same_state(one, other):
    a, b = one.state_dict(), other.state_dict()
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_bit_exact_round_trip(family, converted, tmp_path):
    model = converted(family, auxiliary_noise=0.1, router=RouterConfig(top_k=2), shape="paper", max_bond=6)
    model.save_pretrained(tmp_path)
    inputs = batch(family)
    expected = result(model(**inputs))
    for again in (load_mpoe(tmp_path), AUTO[family].from_pretrained(tmp_path), type(model).from_pretrained(tmp_path)):
        assert type(again) is type(model)
        assert same_state(model, again)
        assert torch.equal(result(again(**inputs)), expected)
        assert again.config.mpoe == model.config.mpoe
        for (name, cores), (_, other) in zip(mpo_modules(model), mpo_modules(again), strict=True):
            assert cores.rate_ratios == other.rate_ratios, name
    assert AutoConfig.from_pretrained(tmp_path).mpoe["max_bond"] == 6
    assert sorted(p.suffix for p in tmp_path.iterdir()) in (
        [".json", ".md", ".py", ".safetensors"],
        [".json", ".json", ".md", ".py", ".safetensors"],
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_round_trip(dtype, converted, tmp_path):
    model = converted("t5").to(dtype)
    for module in model.modules():
        if hasattr(module, "router"):
            module.router.float()
    model.save_pretrained(tmp_path)
    assert same_state(model, load_mpoe(tmp_path))


@pytest.mark.parametrize(
    "key", ["experts.up.central", "experts.down.auxiliary.0", "router.weight", "experts.up.auxiliary.1"]
)
@pytest.mark.parametrize("family", ["t5", "gpt2", "bert"])
def test_a_dropped_key_never_leaves_garbage(family, key, converted, tmp_path):
    model = converted(family)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    dropped = next(name for name in tensors if name.endswith(key))
    shape = tensors.pop(dropped).shape
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again = type(model).from_pretrained(tmp_path)
    value = again.get_parameter(dropped)
    assert value.shape == shape
    assert torch.isfinite(value).all()
    assert 0 < value.abs().max() < 10
    kept = again.state_dict()
    assert all(torch.equal(kept[name], tensor) for name, tensor in tensors.items())
    with pytest.raises(ValueError, match=f"missing: {dropped}"):
        load_mpoe(tmp_path)


def test_base_model_opens_a_checkpoint_with_a_head(converted, tmp_path):
    model = converted("bert_classifier")
    model.save_pretrained(tmp_path)
    base = MPOEBertModel.from_pretrained(tmp_path)
    cores = dict(mpo_modules(base))["encoder.layer.0.intermediate.experts.up"]
    theirs = dict(mpo_modules(model))["bert.encoder.layer.0.intermediate.experts.up"]
    assert torch.equal(cores.central, theirs.central)
    assert cores.rate_ratios == theirs.rate_ratios


def test_from_config_initialises_everything(converted):
    config = converted("t5_gated").config
    model = AutoModelForSeq2SeqLM.from_config(config)
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter).all(), name
        assert parameter.abs().max() < 20, name
    up = model.encoder.block[0].layer[1].DenseReluDense.experts.up
    assert float(up.dense_weights().detach().std()) == pytest.approx(24**-0.5, rel=0.2)


def test_load_mpoe_refusals(converted, tmp_path):
    with pytest.raises(ValueError, match="must be a folder"):
        load_mpoe(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"must hold config\.json"):
        load_mpoe(tmp_path)
    dense_model("gpt2").save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match=r"config\.json is a dense gpt2: load it with transformers"):
        load_mpoe(tmp_path / "dense")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text("{")
    with pytest.raises(ValueError, match="must be a JSON file"):
        load_mpoe(tmp_path / "odd")
    model = converted("gpt2")
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="base is for MPOE-only saves"):
        load_mpoe(tmp_path / "model", base=dense_model("gpt2"))
    path = tmp_path / "model" / "config.json"
    values = json.loads(path.read_text())
    values["mpoe"]["num_experts"] = 5
    path.write_text(json.dumps(values))
    with pytest.raises((ValueError, RuntimeError), match=r"shape|mismatch"):
        load_mpoe(tmp_path / "model")
    values["mpoe"]["num_expert"] = values["mpoe"].pop("num_experts")
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="did you mean 'num_experts'"):
        load_mpoe(tmp_path / "model")


def test_configs_bases_and_disks_that_do_not_fit(converted, tmp_path, monkeypatch):
    model = converted("gpt2")
    with pytest.raises(ValueError, match="base must be a dense model or its folder; 'absent' is not a folder"):
        save_mpoe_only(model, tmp_path / "parts", "absent")
    with pytest.raises(ValueError, match="base must be a GPT2LMHeadModel or its folder; got T5For"):
        save_mpoe_only(model, tmp_path / "parts", dense_model("t5"))
    with pytest.raises(TypeError, match="path must be a folder's path; got int"):
        save_mpoe_only(model, 7, dense_model("gpt2"))
    model.save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "n_embd": "wide"}))
    with pytest.raises(
        ValueError, match=r"JSON files in .*model do not describe a MPOEGPT2LMHeadModel that can be .*n_"
    ):
        load_mpoe(tmp_path / "model")
    with pytest.raises(
        ValueError, match=r"must match its config\.json; it describes 2,001,000 numbers, they hold 0 of"
    ):
        check_shapes(torch.nn.Linear(2000, 1000, device="meta"), {}, tmp_path)

    def full(*_, **__):
        raise SafetensorError("no space left")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    with pytest.raises(OSError, match=r"weights could not be written to .*out: no space left"):
        model.save_pretrained(tmp_path / "out")


@pytest.mark.parametrize(
    ("family", "more"), [("t5", ["embedding"]), ("gpt2", []), ("bert", []), ("bert_mlm", ["embedding"])]
)
def test_mpoe_only_save(family, more, converted, tmp_path):
    model, base = converted(family, auxiliary_noise=0.1, target_modules=["ffn", *more]), dense_model(family)
    save_mpoe_only(model, tmp_path, base)
    assert not (tmp_path / "model.safetensors").exists()
    again = load_mpoe(tmp_path, base=base)
    assert same_state(model, again)
    inputs = batch(family)
    assert torch.equal(result(again(**inputs)), result(model(**inputs)))
    base.save_pretrained(tmp_path / "base")
    assert same_state(model, load_mpoe(tmp_path, base=tmp_path / "base"))
    with pytest.raises(ValueError, match="MPOE parameters only"):
        load_mpoe(tmp_path)
    with torch.no_grad():
        next(p for n, p in base.named_parameters() if "norm" in n.lower() or "ln_" in n)[0] += 1
    with pytest.raises(ValueError, match="SHA-256"):
        load_mpoe(tmp_path, base=base)
    with pytest.raises(ValueError, match="outside the MPOE modules differ"):
        save_mpoe_only(model, tmp_path / "other", base)


@pytest.mark.slow
@pytest.mark.parametrize(
    "order", ["import mpoe, transformers", "import transformers.models.auto.configuration_auto, mpoe"]
)
def test_import_mpoe_registers_in_either_order(order, converted, tmp_path):
    converted("gpt2").save_pretrained(tmp_path)
    program = (
        f"{order}; import sys; "
        "from transformers import AutoModelForCausalLM; "
        f"print(type(AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})).__name__)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "MPOEGPT2LMHeadModel"


def test_one_kind_of_save_replaces_or_refuses_the_other(converted, tmp_path) -> None:
    dense, model = dense_model("gpt2"), converted("gpt2")
    save_mpoe_only(model, tmp_path, dense)
    assert load_mpoe(tmp_path, dense, dtype=torch.bfloat16).dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    ids = torch.randint(2, 60, (1, 5))
    assert torch.equal(load_mpoe(tmp_path)(ids).logits, model(ids).logits)
    with pytest.raises(ValueError, match=r"must not hold a whole model; .* has model\.safetensors"):
        save_mpoe_only(model, tmp_path, dense)
    assert not list(tmp_path.glob(".incomplete-*"))


def test_mpoe_only_save_without_its_identity_is_refused(converted, tmp_path) -> None:
    dense, model = dense_model("gpt2"), converted("gpt2")
    save_mpoe_only(model, tmp_path, dense)
    (tmp_path / "mpoe_base.json").unlink()
    with pytest.raises(ValueError, match=r"must hold mpoe_base\.json"):
        load_mpoe(tmp_path, dense)


def test_saves_of_parameters_alone_refuse_what_is_no_folder(converted, tmp_path):
    dense, model = dense_model("gpt2"), converted("gpt2")
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("file", "dangling"):
        with pytest.raises(NotADirectoryError, match=r"path must be a folder; .* is none"):
            save_mpoe_only(model, tmp_path / name, dense)
    with pytest.raises(ValueError, match=r"path must be a folder's path; got"):
        save_mpoe_only(model, tmp_path / "no\0path", dense)
    with pytest.raises(ValueError, match="base must be a dense model or its folder; '' is not a folder"):
        save_mpoe_only(model, tmp_path / "out", "")
    with pytest.raises(ValueError, match="base must be a GPT2LMHeadModel or its folder; "):
        save_mpoe_only(model, tmp_path / "out", tmp_path)
