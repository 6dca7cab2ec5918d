"""LoRA adapters of feed-forward networks become experts: what is kept, and what is refused in words."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mpoe import compose_experts, start_expert
from mpoe.models.expert_adapters import check_adapter, fit_adapter, is_adapter

from .domain_experts import domain, language_model, loss, tokenizer

peft = pytest.importorskip("peft")
NETWORK = ["gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """An adapter of rank 4, trained on texts of domain 2: its folder and the model that it was merged into."""
    folder, base = tmp_path_factory.mktemp("adapter") / "law", language_model()
    torch.manual_seed(0)
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=4, target_modules=NETWORK))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for step in range(40):
        for each in domain(2, seed=step % 8):
            model(**each).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model.save_pretrained(folder)
    return SimpleNamespace(folder=folder, base=base, merged=model.merge_and_unload().eval())


def texts(count: int = 5) -> list[dict[str, torch.Tensor]]:
    return [each for seed in range(count) for each in domain(2, seed=40 + seed)]


def test_neurons_keep_the_adapters_gain(adapter: SimpleNamespace) -> None:
    assert is_adapter(adapter.folder)
    # 4 (32 + 48) numbers for each of three matrices, beside 3 x 32 of a neuron.
    assert check_adapter(adapter.base, adapter.folder) == 10
    expert = fit_adapter(adapter.base, adapter.merged, texts(), "law", neurons=10, tokenizer=tokenizer())
    facts = expert.facts["training"]
    assert expert.name == "law"
    assert facts["base"] - facts["adapter"] > 1.0
    assert facts["kept"] == pytest.approx((facts["base"] - facts["expert"]) / (facts["base"] - facts["adapter"]))
    own = loss(start_expert(adapter.base, expert=expert), 2)
    assert own < loss(adapter.base, 2) - 0.8 * (loss(adapter.base, 2) - loss(adapter.merged, 2)) + 0.05
    mixture = compose_experts(adapter.base, [expert], background=domain(1), tokenizer=tokenizer())
    assert loss(mixture, 2) < own + 0.2


def test_fits_that_are_refused(adapter: SimpleNamespace) -> None:
    base, merged = adapter.base, adapter.merged
    with pytest.raises(ValueError, match=r"'law' must keep 80% of its gain as 1 neurons; it keeps -?\d+%: base"):
        fit_adapter(base, merged, texts(), "law", neurons=1, steps=2)
    with pytest.raises(ValueError, match="'law' must be better than the base on its texts"):
        fit_adapter(base, copy.deepcopy(base), texts(), "law", neurons=1)
    with pytest.raises(ValueError, match="batches must be at least two, of which one is held out; got 1"):
        fit_adapter(base, merged, texts()[:1], "law", neurons=1)


def saved(base: Any, folder: Path, **config: Any) -> Path:
    peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, **config)).save_pretrained(folder)
    return folder


def test_adapters_that_are_refused(adapter: SimpleNamespace, tmp_path: Path) -> None:
    attention = saved(adapter.base, tmp_path / "attention", target_modules=["q_proj", "up_proj"])
    with pytest.raises(ValueError, match=r"feed-forward networks to become neurons; .*q_proj \(attention cannot"):
        check_adapter(adapter.base, attention)
    with pytest.raises(ValueError, match="must be a folder of PEFT's with safetensors"):
        check_adapter(adapter.base, tmp_path)
    trained = saved(adapter.base, tmp_path / "more", target_modules=NETWORK, modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match=r"must be a plain LoRA; .* is LORA and holds base_model\.model\.lm_head"):
        check_adapter(adapter.base, trained)
    other = saved(adapter.base, tmp_path / "other", target_modules=NETWORK)
    facts = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps({**facts, "peft_type": "IA3"}))
    with pytest.raises(ValueError, match=r"must be a plain LoRA; .* is IA3"):
        check_adapter(adapter.base, other)
    file = other / "adapter_model.safetensors"
    save_file(load_file(file), file)
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match="whole safetensors file"):
        check_adapter(adapter.base, other)
