"""A run whose loss, gradients or weights are no longer finite ends with an error, and leaves what was good before."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from mpoe.models import load_mpoe
from mpoe.training import DivergenceError, read_metrics
from mpoe.training.callbacks import MOST_SKIPPED, check_weights

from .tiny import make_trainer, weights


def all_finite(model: torch.nn.Module) -> bool:
    return all(bool(parameter.isfinite().all()) for parameter in model.parameters())


class At(TrainerCallback):
    """Does something to the model after the optimizer step with this number."""

    def __init__(self, step: int, action: Callable[[torch.nn.Module], None]) -> None:
        self.step, self.action = step, action

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            self.action(model)


def spoil(model: torch.nn.Module) -> None:
    next(iter(model.parameters())).data[0, 0] = math.inf


def test_a_rate_far_too_high(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, learning_rate=1e30, save_strategy="steps", save_steps=1, max_steps=20)
    with pytest.raises(
        DivergenceError, match=r"training diverged at step \d+: the .* is (nan|inf); the last good"
    ) as e:
        trainer.train()
    step = e.value.step
    assert 1 < step < 6
    assert e.value.checkpoint == tmp_path / f"checkpoint-{step - 1}"
    assert str(e.value.checkpoint) in str(e.value)
    assert all_finite(load_mpoe(e.value.checkpoint))
    assert all_finite(trainer.model)  # the optimizer has not used what is not finite
    last = read_metrics(tmp_path)[-1]
    assert (last["event"], last["step"]) == ("diverged", step)
    assert all(record["loss"] for record in read_metrics(tmp_path) if "loss" in record)  # none that stands for nan


def test_gradients_that_are_not_finite_do_not_reach_the_weights(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_grad_norm=0.0)
    parameter = next(p for p in trainer.model.parameters() if p.ndim > 1)
    calls = []

    def poison(gradient: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return gradient * math.nan if len(calls) == 3 else gradient

    parameter.register_hook(poison)
    with pytest.raises(DivergenceError, match=r"step 3: the norm of the gradients is nan; no checkpoint was written"):
        trainer.train()
    assert all_finite(trainer.model)


@pytest.mark.parametrize(("step", "saving"), [(2, True), (6, False)])
def test_weights_are_looked_at_before_a_checkpoint_and_at_the_end(tmp_path: Path, step: int, saving: bool) -> None:
    options = {"save_strategy": "steps", "save_steps": 1} if saving else {}
    trainer = make_trainer(tmp_path, callbacks=[At(step, spoil)], **options)
    with pytest.raises(DivergenceError, match=rf"step {step}: the weights are not finite \(.+\)") as e:
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"] * saving
    assert e.value.checkpoint == (tmp_path / "checkpoint-1" if saving else None)


def test_parameters_that_cannot_diverge_are_passed_over(tmp_path: Path) -> None:
    model = torch.nn.Module()
    model.whole = torch.nn.Parameter(torch.tensor([3]), requires_grad=False)
    model.empty = torch.nn.Parameter(torch.zeros(0, 2))
    model.short = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    check_weights(model, 1, tmp_path)
    model.short.data[1] = math.nan
    with pytest.raises(DivergenceError, match=r"\(short\)"):
        check_weights(model, 1, tmp_path)


def test_allowed(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, learning_rate=1e30, allow_non_finite=True)
    trainer.train()
    assert trainer.state.global_step == 6
    losses = [record["loss"] for record in read_metrics(tmp_path) if "loss" in record]
    assert losses[0] > 0
    assert losses[-1] is None  # as JSON says nan; the Trainer would have logged 0
    with pytest.raises(TypeError, match="allow_non_finite must be True or False; got str 'yes'"):
        make_trainer(tmp_path, allow_non_finite="yes")


def scaled(tmp_path: Path, scale: float, **options: Any) -> Any:
    """A trainer with a loss scaler, as float16 has on a GPU."""
    trainer = make_trainer(tmp_path, **options)
    accelerator = trainer.accelerator
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    # As Accelerate does before it takes the norm, where it trains in float16.
    accelerator.unscale_gradients = lambda optimizer=None: accelerator.scaler.unscale_(
        accelerator._optimizers[0].optimizer
    )
    return trainer


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_torch_fused"])
def test_an_overflow_that_loss_scaling_skips_is_no_divergence(tmp_path: Path, optimizer: str) -> None:
    trainer = scaled(tmp_path, 2.0**20, max_steps=12, optim=optimizer)
    for parameter in trainer.model.parameters():
        parameter.register_hook(lambda gradient: gradient.half().float())  # infinite beyond 65504
    before = weights(trainer.model)
    trainer.train()
    assert trainer.accelerator.scaler.get_scale() < 2.0**20
    assert any(not torch.equal(before[name], value) for name, value in weights(trainer.model).items())
    assert all_finite(trainer.model)


def test_overflows_that_do_not_end_are_a_divergence(tmp_path: Path) -> None:
    trainer = scaled(tmp_path, 2.0**16, max_steps=50)
    next(p for p in trainer.model.parameters() if p.ndim > 1).register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(DivergenceError, match=rf"step {MOST_SKIPPED}: the gradients of {MOST_SKIPPED} steps in a row"):
        trainer.train()
    assert all_finite(trainer.model)


def test_a_loss_that_is_not_finite_under_scaling_is_one(tmp_path: Path) -> None:
    trainer = scaled(tmp_path, 2.0**4)
    original = trainer.compute_loss
    # The gradient of an added constant is nothing: the optimizer would step on.
    trainer.compute_loss = lambda *a, **k: original(*a, **k) + (math.inf if trainer.state.global_step == 2 else 0.0)
    with pytest.raises(DivergenceError, match="step 3: the loss is inf"):
        trainer.train()
