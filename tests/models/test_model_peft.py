"""LoRA through PEFT: on linears, on MPO cores and on dense experts; saved, loaded and merged."""

import copy
import importlib
import sys

import pytest
import torch
from torch.testing import assert_close

from mpoe import load_mpoe, merge_experts
from mpoe.layers import MPOEFeedForward
from mpoe.models import mpo_modules
from tests.assertions import differing, refuses
from tests.cases import pairwise

from .tiny_models import batch, fit

try:
    import peft

    from mpoe import lora_on_cores
except ImportError:
    peft = None


@pytest.fixture(autouse=True)
def _needs_peft(lacks):
    if peft is None:
        lacks("PEFT is not installed")


ATTENTION = {"t5_gated": ["q", "v"], "gpt2": ["c_attn"], "llama": ["q_proj", "v_proj"]}
GATED = ("t5_gated", "llama")


def core_config(family, **values):
    experts = ["up", "down", *(["gate_proj"] if family in GATED else [])]
    return lora_on_cores(
        peft.LoraConfig(r=3, target_modules=[*ATTENTION[family], *experts], **values)
    )


@torch.no_grad()
def logits(model, inputs):
    return model(**inputs).logits


@pytest.mark.parametrize("family, shape", pairwise(list(ATTENTION), ["separable", "paper"]))
def test_trains_saves_loads_and_merges(family, shape, converted, tmp_path):
    base, inputs = converted(family, shape=shape), batch(family)
    before = logits(base, inputs)
    state = copy.deepcopy(base.state_dict())
    adapted = peft.get_peft_model(
        copy.deepcopy(base), core_config(family, modules_to_save=["router"])
    )
    assert_close(logits(adapted, inputs), before)
    losses = fit(adapted, [inputs] * 3)
    assert losses[-1] < losses[0]
    after = logits(adapted, inputs)
    assert (after - before).abs().max() > 1e-3
    # every core of every expert projection takes part
    moved = [
        name for name, p in adapted.named_parameters() if "lora_B" in name and p.abs().max() > 0
    ]
    for name, cores in mpo_modules(adapted):
        stem = name.removesuffix(".base_layer")
        assert sum(m.startswith(f"{stem}.") for m in moved) == cores.shape.num_cores
    with adapted.disable_adapter():
        assert_close(logits(adapted, inputs), before)

    adapted.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter/model.safetensors").exists()
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded, inputs), after)

    merged = loaded.merge_and_unload(safe_merge=True)
    assert type(merged) is type(base)
    assert list(merged.state_dict()) == list(state)
    assert_close(logits(merged, inputs), after, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(load_mpoe(tmp_path / "merged"), inputs), logits(merged, inputs))


@pytest.mark.parametrize("rooted, scale", [(False, 6 / 3), (True, 6 / 3**0.5)])
def test_an_adapted_expert_is_its_cores_plus_the_product(rooted, scale, converted):
    base = converted("gpt2", shape="paper")
    report = base.parameter_report()
    adapted = peft.get_peft_model(base, core_config("gpt2", lora_alpha=6, use_rslora=rooted))
    same = ("central", "auxiliary", "router")
    assert {k: base.parameter_report()[k] for k in same} == {k: report[k] for k in same}
    added = base.parameter_report()["rest"] - report["rest"]
    assert base.parameter_report()["dense_total"] == report["dense_total"] + added
    layer = next(
        module for module in adapted.modules() if isinstance(module, MPOEFeedForward)
    ).experts.up
    for values in (*layer.lora_A["default"].values(), *layer.lora_B["default"].values()):
        torch.nn.init.normal_(values)
    for name, core, plain in zip(
        layer.core_names(), layer.cores(), layer.base_layer.cores(), strict=True
    ):
        key = name.replace(".", "_")
        a, b = layer.lora_A["default"][key], layer.lora_B["default"][key]
        d, i, j, d_next = plain.shape[-4:]
        assert b.shape[-2:] == (d * i, min(3, d * i, j * d_next))
        assert_close(core, plain + (scale * b @ a).reshape(plain.shape))
    layer.merge()
    merged = layer.dense_weights()
    layer.unmerge()
    assert_close(merged, layer.dense_weights(), rtol=1e-4, atol=1e-4)
    refuses(
        ValueError,
        "r must be at least 1; got 0",
        layer.update_layer,
        "other",
        0,
        lora_alpha=1,
        config=core_config("gpt2"),
    )


def test_two_adapters_are_switched(converted):
    inputs = batch("gpt2")
    adapted = peft.get_peft_model(converted("gpt2"), core_config("gpt2"))
    fit(adapted, [inputs] * 3)
    first = logits(adapted, inputs)
    adapted.add_adapter("other", core_config("gpt2"))
    adapted.set_adapter("other")
    assert (logits(adapted, inputs) - first).abs().max() > 1e-3
    adapted.set_adapter("default")
    assert torch.equal(logits(adapted, inputs), first)


def test_dense_experts_are_parameters_that_peft_knows(converted, tmp_path):
    base, inputs = merge_experts(converted("t5_gated")), batch("t5_gated")
    before = logits(base, inputs)
    config = peft.LoraConfig(
        r=2,
        target_modules=["q", "v"],
        target_parameters=[f"experts.{k}.weight" for k in ("up", "gate_proj", "down")],
    )
    adapted = peft.get_peft_model(copy.deepcopy(base), config)
    assert_close(logits(adapted, inputs), before, rtol=1e-4, atol=1e-4)
    losses = fit(adapted, [inputs] * 3)
    assert losses[-1] < losses[0]
    moved = [
        n
        for n, p in adapted.named_parameters()
        if "experts.up" in n and "lora_B" in n and p.abs().max() > 0
    ]
    assert len(moved) == 3  # in every layer
    after = logits(adapted, inputs)
    adapted.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    assert_close(logits(loaded, inputs), after, rtol=1e-4, atol=1e-4)
    assert_close(logits(loaded.merge_and_unload(), inputs), after, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"use_dora": True}, "no use_dora"),
        ({"lora_dropout": 0.1}, "no lora_dropout"),
        ({"lora_bias": True}, "no lora_bias"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights must be True or False"),
    ],
)
def test_what_has_no_meaning_on_cores_is_refused(values, message):
    refuses(ValueError, message, lora_on_cores, peft.LoraConfig(target_modules=["up"], **values))
    refuses(
        TypeError, r"must be a peft\.LoraConfig; got IA3Config", lora_on_cores, peft.IA3Config()
    )


def test_a_configuration_that_names_cores_needs_no_preparation(converted, tmp_path):
    base, inputs = converted("gpt2"), batch("gpt2")
    adapted = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["up", "down"])
    )
    fit(adapted, [inputs] * 3)
    adapted.save_pretrained(tmp_path)
    config = lora_on_cores(
        peft.LoraConfig.from_pretrained(tmp_path)
    )  # the earlier way, which must still work
    loaded = peft.PeftModel.from_pretrained(base, tmp_path, config=config).eval()
    assert torch.equal(logits(loaded, inputs), logits(adapted.eval(), inputs))
    refuses(
        ValueError,
        "LoRA on MPO cores has no use_dora",
        peft.get_peft_model,
        converted("gpt2"),
        peft.LoraConfig(target_modules=["up"], use_dora=True),
    )


def test_an_infinite_addition_is_not_merged(converted):
    adapted = peft.get_peft_model(converted("gpt2"), core_config("gpt2"))
    before = copy.deepcopy(adapted.state_dict())
    layer = next(
        module for module in adapted.modules() if isinstance(module, MPOEFeedForward)
    ).experts.up
    layer.lora_B["default"]["central"].data.fill_(float("inf"))
    refuses(
        ValueError,
        "must be finite to be merged; its addition to central is not",
        layer.merge,
        safe_merge=True,
    )
    assert not [name for name in differing(before, adapted) if "base_layer" in name]


def test_without_peft_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.delitem(sys.modules, "mpoe.models.lora")
    refuses(ImportError, r'pip install "mpoe\[peft\]"', importlib.import_module, "mpoe.models.lora")
