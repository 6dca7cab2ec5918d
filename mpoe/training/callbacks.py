"""Trainer callbacks of mpoe; they work in any Hugging Face Trainer."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mpoe.training.gradient_mask import GradientMask


class GradientMaskCallback(TrainerCallback):
    """Runs a `GradientMask` inside a Trainer.

    The draw happens on `on_step_begin`: once per optimizer step, before its first micro-batch, and keyed by
    `state.global_step`, so a resumed run continues the same stream. (`on_pre_optimizer_step` would be too late: it
    fires after clipping, when the gradients have already been computed.)

    Args:
        mask: the mask to run; it is bound to the Trainer's model when training begins.
    """

    def __init__(self, mask: GradientMask) -> None:
        self.mask = mask

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if model is not None:
            self.mask.bind(model)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.mask.begin_step(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.mask.end_step()

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.mask.end_step()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.mask.end_step()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.mask.end_step()
