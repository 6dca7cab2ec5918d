"""Trainer callbacks of mpoe; they work in any Hugging Face Trainer. One ends a diverged run with an
error, before the optimizer spreads what is not finite."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ProgressCallback, TrainerCallback

from mpoe.training.checkpoints import list_checkpoints
from mpoe.training.freezing import GradientMask


class GradientMaskCallback(TrainerCallback):
    """Runs a `GradientMask` inside a Trainer.

    The draw happens on `on_step_begin`: once per optimizer step, before its first micro-batch, and
    keyed by `state.global_step`, so a resumed run continues the same stream.
    (`on_pre_optimizer_step` would be too late: it fires after clipping, when the gradients have
    already been computed.)

    Args:
        mask: the mask to run; it is bound to the Trainer's model when training begins.
    """

    def __init__(self, mask: GradientMask) -> None:
        self.mask = mask

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        if model is not None:
            self.mask.bind(model)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.mask.begin_step(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.mask.end_step()

    on_prediction_step = on_epoch_end = on_train_end = on_step_end


PROGRESS_SECONDS = 20.0  # between the lines of a long evaluation


class LogLineCallback(TrainerCallback):
    """A line for every log call: the step, the loss (without the balancing loss) and, if it was
    logged, the base's, the learning rate, the speed and the time that is left. The rest is in
    `metrics.jsonl`.

    The speed is that of the optimizer steps since the last line, without evaluation and saving.

    Args:
        write: takes a line; `tqdm.write` where there are progress bars.
    """

    def __init__(self, write: Callable[[str], object] = print) -> None:
        self.write = write
        self._begun = 0.0
        self._steps = 0
        self._seconds = 0.0
        self._batches = 0  # of the evaluation in progress
        self._evaluated_since: float | None = None  # its begin, or its last line

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begun = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._steps += 1
        self._seconds += time.perf_counter() - self._begun

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        now = time.perf_counter()
        self._batches += 1
        if self._evaluated_since is None:
            self._evaluated_since = now
        elif now - self._evaluated_since > PROGRESS_SECONDS and state.is_world_process_zero:
            self._evaluated_since = now
            batches = len(eval_dataloader)  # which the base may have read before
            self.write(f"validating: batch {(self._batches - 1) % batches + 1} of {batches}")

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._batches = 0
        self._evaluated_since = None

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs:
            return
        step = f"step {state.global_step:>{len(str(state.max_steps))}}/{state.max_steps}"
        if "loss" in logs:
            speed = self._steps / self._seconds if self._seconds else 0.0
            self._steps = 0
            self._seconds = 0.0
            left = f"  {(state.max_steps - state.global_step) / speed:.0f} s left" if speed else ""
            loss = logs.get("task_loss", logs["loss"])
            rate = logs.get("learning_rate", 0.0)
            base = f"  base {logs['base_loss']:.4f}" if "base_loss" in logs else ""
            self.write(f"{step}  loss {loss:.4f}{base}  rate {rate:.2e}  {speed:.3g} steps/s{left}")
        for name, value in logs.items():
            stem = name.removesuffix("loss")
            if not name.startswith("eval_") or stem == name or stem.endswith("base_"):
                continue
            base_loss = logs.get(f"{stem}base_loss")
            base = "" if base_loss is None else f"  base {base_loss:.4f}"
            task = stem.removeprefix("eval_").strip("_")
            self.write(f"{step}  validation loss {value:.4f}{base}  {task}".rstrip())


class ProgressBar(ProgressCallback):
    """The Trainer's bars, with the time that is left; lines are those of `LogLineCallback`."""

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        pass


class StopWhenFlat(TrainerCallback):
    """Ends a run whose held-out loss, summed over ``tasks``, has not fallen for so many looks.

    It reads the Trainer's log alone, so a resumed run ends where it would have.
    """

    def __init__(self, tasks: int, looks: int = 3) -> None:
        self.tasks = tasks
        self.looks = looks

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        by_step: dict[int, list[float]] = {}
        for record in state.log_history:
            for name, value in record.items():
                is_loss = name.startswith("eval_") and name.endswith("loss")
                if is_loss and not name.endswith("base_loss"):
                    by_step.setdefault(record["step"], []).append(value)
        totals = [sum(losses) for losses in by_step.values() if len(losses) == self.tasks]
        if len(totals) > self.looks and min(totals[-self.looks :]) >= min(totals[: -self.looks]):
            control.should_training_stop = True


# Every skipped step halves the scale of the loss: after so many in a row the scale (2^16 at first)
# is not the reason.
MOST_SKIPPED = 32


class DivergenceError(RuntimeError):
    """Training has diverged: the loss, the gradients or the weights are not finite.

    Attributes:
        step: optimizer step at which it was noticed, counted from 1.
        checkpoint: the last complete checkpoint of the run, whose weights are finite; None if there
            is none.
    """

    def __init__(self, what: str, step: int, run_dir: str | Path) -> None:
        saved = list_checkpoints(run_dir)
        self.step = step
        self.checkpoint = saved[-1] if saved else None
        last = "no checkpoint was written before"
        if saved:
            last = f"the last good checkpoint is {self.checkpoint}"
        super().__init__(
            f"training diverged at step {step}: {what}; {last}, and nothing was published. Lower "
            "learning_rate, warm up longer (warmup_steps) or clip harder (max_grad_norm); "
            "allow_non_finite trains on regardless"
        )


class DivergenceGuard(TrainerCallback):
    """Raises `DivergenceError` in all processes at the same step.

    It looks at the loss and at the norm of the gradients before the optimizer uses them, so that
    the weights in memory stay those of the step before. Under loss scaling (float16) gradients that
    overflow are no divergence: the optimizer skips that step, and the guard looks after it.
    `MOST_SKIPPED` skipped steps in a row are one.

    Args:
        accelerator: of the Trainer; it knows the other processes and the loss scaler.
    """

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator
        self._loss: Any = 0.0
        self.norm: Any = None  # of the step's gradients (a number or 0-d tensor), if known
        self._scale = 0.0

    def note_loss(self, loss: Tensor) -> None:
        """Add the loss of one micro-batch (0-d)."""
        self._loss = self._loss + loss.detach()

    def _forget_step(self) -> None:
        self._loss = 0.0
        self.norm = None

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._forget_step()
        self._skipped = 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        scaler = getattr(self._accelerator, "scaler", None)
        if scaler is None:
            self._check(str(args.output_dir), state.global_step + 1)
        else:
            self._scale = scaler.get_scale()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        scaler = getattr(self._accelerator, "scaler", None)
        if scaler is None:
            return
        # Not `optimizer_step_was_skipped`: fused optimizers skip inside, where Accelerate does not
        # see it.
        if scaler.get_scale() >= self._scale:
            self._skipped = 0
            self._check(str(args.output_dir), state.global_step)
            return
        self._forget_step()
        self._skipped += 1
        if self._skipped >= MOST_SKIPPED:
            raise DivergenceError(
                f"the gradients of {self._skipped} steps in a row overflowed, however small the "
                "loss was scaled",
                state.global_step,
                str(args.output_dir),
            )

    def _check(self, run_dir: str, step: int) -> None:
        values = [float(self._loss), 0.0 if self.norm is None else float(self.norm)]
        self._forget_step()
        if self._accelerator.num_processes > 1:
            # The sum over the processes is finite only if every one's is: all of them see it, and
            # end together.
            together = torch.tensor(values, dtype=torch.float64, device=self._accelerator.device)
            values = self._accelerator.reduce(together, reduction="sum").tolist()
        for name, value in zip(("the loss", "the norm of the gradients"), values, strict=True):
            if not math.isfinite(value):
                raise DivergenceError(f"{name} is {value}", step, run_dir)


def check_weights(model: nn.Module, step: int, run_dir: str | Path) -> None:
    """Raise `DivergenceError` if a parameter is not finite; reads all parameters."""
    for name, parameter in model.named_parameters():
        if parameter.numel() and parameter.is_floating_point():
            # NaN if there is one; no temporary
            largest = torch.linalg.vector_norm(parameter.detach(), ord=math.inf)
            if not float(largest) < math.inf:
                raise DivergenceError(f"the weights are not finite ({name})", step, run_dir)
