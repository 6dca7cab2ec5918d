"""The gradient mask, frozen cores and rates under the Hugging Face Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback

from mpoe.models.report import mpo_modules
from mpoe.training import GradientMask, GradientMaskCallback
from mpoe.training.gradient_mask import mask_draw

from .tiny import CHECKPOINTING, Rows, arguments, make_trainer, mpoe_model, weights


class Watch(TrainerCallback):
    """Compares centrals, their Adam state and all other weights before and after every optimizer step."""

    def __init__(self) -> None:
        self.masked: list[bool] = []
        self.centrals_kept: list[bool] = []
        self.others_kept: list[bool] = []
        self.during_micro_batches: list[bool] = []
        self.gradients: list[bool] = []

    @staticmethod
    def state(model: Any, optimizer: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        inner = getattr(optimizer, "optimizer", optimizer)
        centrals, others = [], []
        for name, parameter in model.named_parameters():
            if not name.endswith(".central"):
                others.append(parameter.detach().clone())
                continue
            centrals.append(parameter.detach().clone())
            centrals += [value.clone() for _, value in sorted(inner.state.get(parameter, {}).items())]
        return centrals, others

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any, optimizer: Any, **kwargs: Any) -> None:
        self.before = self.state(model, optimizer)

    def on_substep_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.during_micro_batches.append(all_masked(model))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.masked.append(all_masked(model))
        self.gradients.append(any(cores.central.grad is not None for _, cores in mpo_modules(model)))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, optimizer: Any, **kwargs: Any) -> None:
        centrals, others = self.state(model, optimizer)
        same_length = len(centrals) == len(self.before[0])
        self.centrals_kept.append(same_length and all(map(torch.equal, centrals, self.before[0])))
        self.others_kept.append(any(map(torch.equal, others, self.before[1])))


def all_masked(model: Any) -> bool:
    states = {cores.central_masked for _, cores in mpo_modules(model)}
    assert len(states) == 1, "central cores are masked alike"
    return states.pop()


def test_masked_steps_change_everything_but_the_centrals(tmp_path: Path) -> None:
    watch = Watch()
    trainer = make_trainer(
        tmp_path,
        "t5",
        gradient_mask_prob=0.5,
        gradient_mask_seed=4,
        max_steps=16,
        gradient_accumulation_steps=3,
        per_device_train_batch_size=4,
        max_grad_norm=1.0,
        lr_scheduler_type="constant",
        callbacks=[watch],
    )
    trainer.train()
    expected = [mask_draw(4, step) < 0.5 for step in range(16)]
    assert 3 < sum(expected) < 13
    assert expected.index(True) != 0, "some momentum must exist before the first masked step"
    assert watch.masked == expected
    assert watch.centrals_kept == expected
    assert not any(watch.others_kept)
    assert watch.gradients == [not masked for masked in expected]
    # One draw holds for all three micro-batches of a step.
    assert watch.during_micro_batches == [masked for masked in expected for _ in range(2)]
    assert not all_masked(trainer.model)
    logged = [record["masked_steps"] for record in trainer.state.log_history if "masked_steps" in record]
    assert logged == [float(masked) for masked in expected]


def test_clipping_norm_of_a_masked_step_excludes_the_centrals(tmp_path: Path) -> None:
    free = make_trainer(tmp_path / "a", max_steps=1)
    masked = make_trainer(tmp_path / "b", max_steps=1, gradient_mask_prob=1.0)
    free.train()
    masked.train()
    all_norm, central = (free.state.log_history[0][name] for name in ("grad_norm", "grad_norm_central"))
    record = masked.state.log_history[0]
    assert record["grad_norm"] == pytest.approx((all_norm**2 - central**2) ** 0.5, rel=1e-4)
    assert "grad_norm_central" not in record
    assert record["grad_norm_auxiliary"] == pytest.approx(free.state.log_history[0]["grad_norm_auxiliary"], rel=1e-4)


def test_mask_is_off_during_evaluation(tmp_path: Path) -> None:
    seen: list[bool] = []

    class Look(TrainerCallback):
        def on_prediction_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            seen.append(all_masked(model))

    trainer = make_trainer(
        tmp_path, gradient_mask_prob=1.0, eval_strategy="steps", eval_steps=1, max_steps=2, callbacks=[Look()]
    )
    trainer.train()
    assert seen
    assert not any(seen)


def test_error_in_training_releases_the_model(tmp_path: Path) -> None:
    class Fail(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            assert all_masked(model)
            raise RuntimeError("stop here")

    trainer = make_trainer(tmp_path, gradient_mask_prob=1.0, callbacks=[Fail()])
    with pytest.raises(RuntimeError, match="stop here"):
        trainer.train()
    assert not all_masked(trainer.model)


def test_callback_alone_in_the_ordinary_trainer(tmp_path: Path) -> None:
    model = mpoe_model("bert")
    before = weights(model)
    callback = GradientMaskCallback(GradientMask(None, 1.0, seed=0))
    trainer = Trainer(
        model=model, args=arguments(tmp_path, max_steps=2), train_dataset=Rows("bert"), callbacks=[callback]
    )
    trainer.train()
    for name, parameter in model.named_parameters():
        if ".experts." in name and ("central" in name or "auxiliary" in name):
            assert torch.equal(parameter, before[name]) == name.endswith(".central"), name


def test_activation_checkpointing_recomputes_under_the_mask(tmp_path: Path) -> None:
    results = []
    for checkpointing in (False, True):
        trainer = make_trainer(tmp_path, "gpt2", gradient_mask_prob=0.5, max_steps=4, **{CHECKPOINTING: checkpointing})
        trainer.train()
        results.append(weights(trainer.model))
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], rtol=1e-4, atol=1e-5)


def test_optimizer_uses_per_core_rates_under_the_scheduler(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, "t5", max_steps=4, mpo_lr=2e-3, warmup_steps=0)
    seen: list[dict[str, list[float]]] = []

    class Look(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
            kinds: dict[str, list[float]] = {}
            for group in optimizer.param_groups:
                kinds.setdefault(group["kind"], []).append(group["lr"])
            seen.append(kinds)

    trainer.add_callback(Look())
    trainer.train()
    up = trainer.model.encoder.block[0].layer[1].DenseReluDense.experts.up
    assert seen[0]["rest"][0] == pytest.approx(1e-2)
    assert 2e-3 * 0.35 * up.rate_ratios[up.shape.central] == pytest.approx(
        min(seen[0]["central"], key=lambda rate: abs(rate - 2e-3 * 0.35 * up.rate_ratios[up.shape.central]))
    )
    for step, kinds in enumerate(seen):
        for kind, rates in kinds.items():
            assert rates == pytest.approx([rate * (1 - step / 4) for rate in seen[0][kind]])


def test_own_optimizer_is_left_alone(tmp_path: Path) -> None:
    model = mpoe_model("t5")
    trainer = make_trainer(tmp_path, "t5", model=model, max_steps=1)
    trainer.optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    trainer.train()
    assert len(trainer.optimizer.param_groups) == 1
