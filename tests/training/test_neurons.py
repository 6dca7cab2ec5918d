"""Training models with neurons: the loss falls, loads balance without a loss, runs continue; two ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from mpoe import MPOEConfig, RouterConfig
from mpoe.models import convert_to_mpoe
from mpoe.models.report import neuron_modules, routed_layers
from mpoe.training import update_correction_bias

from .ranks import torchrun
from .tiny import Rows, arguments, dense_model, make_trainer, mpoe_model

NEURONS = {"shape": "neurons", "neurons": 8, "num_experts": 4, "router": RouterConfig(top_k=2)}
BALANCED = RouterConfig(top_k=2, scoring_func="sigmoid", bias_update_rate=0.01, balance_loss_weight=0.0)


@pytest.mark.parametrize("family", ["t5", "gpt2", "bert"])
@pytest.mark.parametrize("latent", [None, 8])
def test_the_loss_falls(family: str, latent: int | None, tmp_path: Path) -> None:
    """With the dense network and P, Q frozen in every step, so that only the experts and the router learn in it."""
    model = mpoe_model(family, **NEURONS, latent=latent)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer = make_trainer(
        tmp_path, family, model, max_steps=12, learning_rate=0.02, gradient_mask_prob=1.0, logging_steps=1
    )
    trainer.train()
    losses = [record["task_loss"] for record in trainer.state.log_history if "task_loss" in record]
    assert sum(losses[-3:]) < sum(losses[:3])
    shared = {id(w) for layer in neuron_modules(model).values() for w in layer.central_parameters().values()}
    for name, parameter in model.named_parameters():
        if id(parameter) in shared:
            assert torch.equal(parameter, before[name]), name
    for layer in neuron_modules(model).values():
        assert layer.experts.down.any()


def test_the_trainer_moves_the_correction_bias_against_the_load(tmp_path: Path) -> None:
    model = mpoe_model("gpt2", **{**NEURONS, "router": BALANCED})
    trainer = make_trainer(tmp_path, "gpt2", model, max_steps=3, gradient_accumulation_steps=2)
    loads: list[torch.Tensor] = []
    compute = trainer.compute_loss

    def watched(*arguments, **options):
        loss, outputs = compute(*arguments, **{**options, "return_outputs": True})
        loads.append(outputs.expert_load)
        return loss

    trainer.compute_loss = watched
    trainer.train()
    assert len(loads) == 6
    want = torch.zeros(2, 4)
    for first, second in zip(loads[::2], loads[1::2], strict=True):
        load = (first + second).float()
        want += 0.01 * torch.sign(load.mean(1, keepdim=True) - load)
    found = torch.stack([layer.router.e_score_correction_bias for _, layer in routed_layers(model)])
    assert torch.allclose(found, want)
    assert bool(found.any())


def test_the_bias_balances_a_router_that_prefers_some_experts() -> None:
    model = mpoe_model("gpt2", **{**NEURONS, "router": BALANCED}).eval()
    with torch.no_grad():
        for _, layer in routed_layers(model):
            layer.router.weight.normal_(std=0.3)
    rows = Rows("gpt2", rows=16)
    inputs = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    with torch.no_grad():
        spread = []
        for _ in range(200):
            load = model(**inputs).expert_load
            update_correction_bias(model, load)
            spread.append(float((load.float().std(1) / load.float().mean(1)).mean()))
    assert spread[-1] < 0.5 * spread[0]


def test_loads_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model = mpoe_model("gpt2", **{**NEURONS, "router": BALANCED})
    with pytest.raises(ValueError, match=r"expert_load must be \[2, E\], a row per layer; got \[3, 4\]"):
        update_correction_bias(model, torch.zeros(3, 4))
    model.config.output_router_logits = False
    with pytest.raises(ValueError, match="bias_update_rate needs the model's expert_load"):
        make_trainer(tmp_path, "gpt2", model, max_steps=1).train()


@pytest.mark.parametrize("latent", [None, 8])
def test_the_dense_networks_moments_survive_conversion(latent: int | None, tmp_path: Path) -> None:
    """A run of the dense model, converted, goes on with AdamW's moments and steps; only what is new starts anew."""
    dense = dense_model("gpt2")
    first = Trainer(dense, arguments(tmp_path / "dense", max_steps=3), train_dataset=Rows("gpt2"))
    first.train()
    before = {id(p): {n: v.clone() for n, v in state.items()} for p, state in first.optimizer.state.items()}
    converted = convert_to_mpoe(dense, MPOEConfig(**NEURONS, latent=latent), inplace=True)
    options: dict[str, Any] = {"max_steps": 2, "previous_optimizer": first.optimizer}
    trainer = make_trainer(tmp_path / "mixture", "gpt2", converted, **options)
    state = trainer.create_optimizer().state
    new = [name for name, p in converted.named_parameters() if id(p) not in before]
    assert new
    assert all("experts" in name or "router" in name for name in new)
    assert len(state) == len(before)
    for parameter, values in state.items():
        assert all(torch.equal(value, before[id(parameter)][name]) for name, value in values.items())
    trainer.train()
    steps = {name: int(trainer.optimizer.state[p]["step"]) for name, p in converted.named_parameters()}
    assert all(count == (2 if name in new else 5) for name, count in steps.items())


def test_a_previous_optimizer_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    model = mpoe_model("gpt2", **NEURONS)
    with pytest.raises(TypeError, match="previous_optimizer must be an optimizer; got str"):
        make_trainer(tmp_path, "gpt2", model, previous_optimizer="adamw")
    for other, words in (
        (torch.optim.SGD(model.parameters()), "must be of the kind that trains now, AdamW; got SGD"),
        (torch.optim.AdamW(dense_model("gpt2").parameters()), "converted with inplace=True; got one that has none"),
    ):
        with pytest.raises(ValueError, match=words):
            make_trainer(tmp_path, "gpt2", model, previous_optimizer=other).train()


@pytest.mark.slow
def test_two_ranks_compute_what_one_does() -> None:
    """DDP, FSDP2, and tensor parallelism of the dense projections with PyTorch's own styles."""
    answer = torchrun("ranks_models", "neurons")
    assert answer.returncode == 0, answer.stdout
    assert answer.stdout.count("alike") == 2
