"""Trainer callbacks of mpoe; they work in any Hugging Face Trainer."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
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

    on_prediction_step = on_epoch_end = on_train_end = on_step_end


class LogLineCallback(TrainerCallback):
    """A line for every log call: the step, the loss, the learning rate and the speed. The rest is in `metrics.jsonl`.

    The speed is that of the optimizer steps since the last line, without evaluation and saving.

    Args:
        write: takes a line; `tqdm.write` where there are progress bars.
    """

    def __init__(self, write: Callable[[str], object] = print) -> None:
        self.write = write
        self._begun = 0.0
        self._steps, self._seconds = 0, 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._begun = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._steps += 1
        self._seconds += time.perf_counter() - self._begun

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        step = f"step {state.global_step:>{len(str(state.max_steps))}}/{state.max_steps}"
        if "loss" in logs:
            speed = self._steps / self._seconds if self._seconds else 0.0
            self._steps, self._seconds = 0, 0.0
            self.write(
                f"{step}  loss {logs['loss']:.4f}  rate {logs.get('learning_rate', 0.0):.2e}  {speed:.3g} steps/s"
            )
        for name, value in logs.items():
            if name.startswith("eval_") and name.endswith("loss"):
                task = name.removeprefix("eval_").removesuffix("loss").strip("_")
                self.write(f"{step}  validation loss {value:.4f}{f'  {task}' if task else ''}")
