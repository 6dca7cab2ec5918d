"""`MPOETrainer`: the Hugging Face Trainer with additions for mixtures of MPO experts."""

import contextlib
import math
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Seq2SeqTrainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from mpoe.config.checks import check_type
from mpoe.layers.context import global_batch
from mpoe.layers.neurons import without_experts
from mpoe.models.base import MPOEModelMixin
from mpoe.models.card import write_card
from mpoe.models.classes import IGNORED_AT_INFERENCE
from mpoe.training import checkpoints
from mpoe.training.arguments import MPOETrainingArguments
from mpoe.training.callbacks import (
    DivergenceError,
    DivergenceGuard,
    GradientMaskCallback,
    check_weights,
)
from mpoe.training.checkpoints import CheckpointMixin, go_on_with_choices
from mpoe.training.correction_bias import corrects_bias, update_correction_bias
from mpoe.training.freezing import GradientMask, freeze_all_but_experts, freeze_cores
from mpoe.training.loss import count_targets, shifts_labels, split_loss, step_share
from mpoe.training.output_dir import METRICS_FILE, checkpoint_to_resume, write_metrics
from mpoe.training.param_groups import build_param_groups, keep_state
from mpoe.training.run_lock import hold
from mpoe.training.run_log import RunLog, load_shares, load_summary, one_sided

# Everything that models return besides the logits; it does not belong in an evaluation's
# predictions.
_NOT_PREDICTIONS = (
    *IGNORED_AT_INFERENCE,
    "hidden_states",
    "attentions",
    "cross_attentions",
    "encoder_last_hidden_state",
    "encoder_hidden_states",
    "encoder_attentions",
    "decoder_hidden_states",
    "decoder_attentions",
)


class MPOETrainer(CheckpointMixin, Seq2SeqTrainer):
    """Trains converted models (and, with the same numbers in the logs, dense ones) for all three
    families.

    What it adds to the Trainer:

    * the gradient mask, per-core rates and frozen cores, as `MPOETrainingArguments` asks;
    * a loss that does not depend on how a batch is split into micro-batches (see
      `mpoe.training.loss`), and `eval_loss` per target rather than per batch, without the
      routers' losses; for language models also `eval_perplexity`, per token of their tokenizer;
    * a warning about an expert that takes most tokens; logs of task and auxiliary loss and expert
      load, also as `metrics.jsonl` in the output folder;
    * under torchrun (DDP), router losses over the tokens of all processes, so a step equals that of
      one process with the same global batch; a lock, so that no other process trains in the same
      folder (see `mpoe.training.run_lock`);
    * a diverging run ends with a `DivergenceError` (see `mpoe.training.callbacks`); checkpoints
      that are complete or absent (see `mpoe.training.checkpoints`);
      `train(resume_from_checkpoint=True)` continues from the last complete one, on the CPU to
      bit-identical weights: all processes, and a resumed run, compute their products in the ways
      that were chosen first (see `mpoe.training.checkpoints.go_on_with_choices`).

    T5 is evaluated on generated text with `predict_with_generate=True`; other models by their
    logits.

    Args:
        model, args, **kwargs: as for `transformers.Seq2SeqTrainer`; `args` is an
            `MPOETrainingArguments`.
        previous_optimizer: the one that trained the dense model before it was converted in place:
            parameters that stayed (with neurons, the whole dense network) keep its state, such as
            AdamW's moments and count of steps.

    Raises:
        TypeError: `args` or `previous_optimizer` of another type.
        ValueError: the arguments do not match the model (mask or freezing without MPO cores,
            generation with a model that is not an encoder-decoder).
    """

    args: MPOETrainingArguments
    model: Any

    def __init__(
        self,
        model: Any = None,
        args: MPOETrainingArguments | None = None,
        *,
        previous_optimizer: torch.optim.Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        check_type("args", args, MPOETrainingArguments, "MPOETrainingArguments")
        assert args is not None
        check_type(
            "previous_optimizer", previous_optimizer, torch.optim.Optimizer | None, "an optimizer"
        )
        self._previous_optimizer = previous_optimizer
        config = getattr(model, "config", None)
        is_other = config is not None and not getattr(config, "is_encoder_decoder", False)
        if args.predict_with_generate and is_other:
            raise ValueError(
                "predict_with_generate needs an encoder-decoder model such as T5; got "
                f"{type(model).__name__} (language models are evaluated by eval_loss and "
                "eval_perplexity)"
            )
        super().__init__(model=model, args=args, **kwargs)
        # This class scales the loss of every model, T5 included: the Trainer only divides by the
        # accumulation steps.
        self.model_accepts_loss_kwargs = False
        self._shifts_labels = shifts_labels(self.model)
        self._log = RunLog()
        self._is_warned = False
        self._corrects_bias = corrects_bias(self.model)
        self._step_load: Any = 0  # of the optimizer step in progress
        # loss without experts less that with them, since the last log
        self._base_excess: Tensor | None = None
        # of evaluations without experts, by prefix of their metrics
        self._base_losses: dict[str, float] = {}
        self._evaluation: Tensor | None = None  # [sum of losses over targets, targets]
        if args.adapter:
            freeze_all_but_experts(self.model)
        freeze_cores(
            self.model,
            update_mpo_layer=args.update_mpo_layer,
            tensor_learn=args.tensor_learn,
            train_AT_index=args.train_AT_index,
        )
        self.gradient_mask = GradientMask(self.model, args.gradient_mask_prob, args.mask_seed)
        if args.gradient_mask_prob > 0:
            self.add_callback(GradientMaskCallback(self.gradient_mask))
        self._guard = DivergenceGuard(self.accelerator)
        if not args.allow_non_finite:
            self.add_callback(self._guard)

    # ------------------------------------------------------------- training

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As `Trainer.train`; `resume_from_checkpoint=True` picks the last *complete* checkpoint.

        Raises:
            ValueError: there is none, or the given one is incomplete, damaged, of another model,
                without an optimizer's state, or holds more than tensors.
            FolderInUseError: another process trains in ``output_dir``; a `ValueError` that says
                which.
            DivergenceError: loss, gradients or weights are not finite; no checkpoint contains them,
                and the model in memory has the weights of the previous step (unless these were
                already not finite).
        """
        # With several processes, the first one writes the folder.
        is_first = self.is_world_process_zero()
        with hold(str(self.args.output_dir)) if is_first else contextlib.nullcontext():
            return self._train_alone(resume_from_checkpoint, *args, **kwargs)

    def _train_alone(
        self, resume_from_checkpoint: str | bool | None, *args: Any, **kwargs: Any
    ) -> Any:
        run_dir = Path(str(self.args.output_dir))
        resume_from_checkpoint = checkpoint_to_resume(resume_from_checkpoint, run_dir, self.model)
        step = 0
        if self.args.should_save:
            if resume_from_checkpoint:
                state = Path(resume_from_checkpoint) / TRAINER_STATE_NAME
                step = TrainerState.load_from_json(str(state)).global_step
            if (run_dir / METRICS_FILE).exists() or step:
                # Readers drop records that an earlier attempt logged after this step.
                write_metrics(run_dir, {"event": "resume", "step": step})
            checkpoints.clean_leftovers(run_dir)
        try:
            go_on_with_choices(resume_from_checkpoint, self.args)
            result = super().train(resume_from_checkpoint, *args, **kwargs)
            self._check_weights()
            return result
        except DivergenceError as error:
            if self.is_world_process_zero():
                write_metrics(run_dir, {"event": "diverged", "step": error.step, "why": str(error)})
            raise
        finally:
            # An error during a masked step must not leave the model masked.
            self.gradient_mask.end_step()

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer of `args.optim` over `build_param_groups`, unless the caller passed its own
        groups.

        Raises:
            ValueError: `previous_optimizer` is of another kind, or has the state of no parameter of
                the model.
        """
        if self.optimizer is not None:
            return super().create_optimizer(model)
        module: Any = self.model if model is None else model
        given = self.optimizer_cls_and_kwargs
        kind, options = given or self.get_optimizer_cls_and_kwargs(self.args, module)
        if not options.keys() & {"params", "model", "optimizer_dict"}:
            options = {**options, "params": build_param_groups(module, self.args)}
        self.optimizer_cls_and_kwargs = (kind, options)
        try:
            made = super().create_optimizer(model)
        finally:
            self.optimizer_cls_and_kwargs = given
        if self._previous_optimizer is not None:
            keep_state(self._previous_optimizer, made)
        return made

    def training_step(self, model: nn.Module, inputs: dict, *args: Any, **kwargs: Any) -> Tensor:
        with global_batch() if self.args.global_router_losses else contextlib.nullcontext():
            loss = super().training_step(model, inputs, *args, **kwargs)
        if self.accelerator.sync_gradients and self._corrects_bias:
            update_correction_bias(self.model, self.accelerator.reduce(self._step_load, "sum"))
            self._step_load = 0
        self._guard.note_loss(loss)
        return loss

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        self._guard.norm = super()._get_grad_norm(*args, **kwargs)
        return self._guard.norm

    def _check_weights(self) -> None:
        if not self.args.allow_non_finite:
            check_weights(self.model, self.state.global_step, str(self.args.output_dir))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """In training, this micro-batch's share of the step's loss (see `step_share`); in
        evaluation the task loss."""
        if self.compute_loss_func is not None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs.get("labels")
        outputs = model(**inputs)
        task, auxiliary = split_loss(outputs)
        if not self.model.training:
            self._note_evaluation(task, labels)
            return (task, outputs) if return_outputs else task
        if self.label_smoother is not None and labels is not None:
            task = self.label_smoother(outputs, labels, shift_labels=self._shifts_labels)
        micro_batches = self.current_gradient_accumulation_steps
        if labels is not None and num_items_in_batch is not None:
            targets = count_targets(labels, self._shifts_labels)
            step_targets = torch.as_tensor(num_items_in_batch, device=targets.device)
            ranks = self.args.world_size if self.args.average_tokens_across_devices else 1
            task = step_share(task, targets, step_targets, micro_batches * ranks)
        self._note_training(task, auxiliary, outputs, micro_batches)
        # whether a log line follows the optimizer step in progress
        is_logged = (self.state.global_step + 1) % max(1, self.state.logging_steps) == 0
        if self.args.log_base_loss and self._base_excess is None and is_logged:
            self._base_excess = self._base_loss(model, inputs) - split_loss(outputs)[0].detach()
        total = task if auxiliary is None else task + auxiliary
        return (total, outputs) if return_outputs else total

    @torch.no_grad()
    def _base_loss(self, model: nn.Module, inputs: dict) -> Tensor:
        """The task loss without experts; torch's random numbers are as before afterwards."""
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices), without_experts(model):
            return split_loss(model(**inputs))[0]

    def _get_num_items_in_batch(
        self, batch_samples: list, device: torch.device
    ) -> Tensor | int | None:
        if self.compute_loss_func is not None:
            return super()._get_num_items_in_batch(batch_samples, device)
        if not batch_samples or not isinstance(batch_samples[0].get("labels"), Tensor):
            return None
        counts = [count_targets(batch["labels"], self._shifts_labels) for batch in batch_samples]
        total = torch.stack(counts).sum().to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            total = self.accelerator.gather(total).sum()
        return total

    # ------------------------------------------------------------ evaluation

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **gen_kwargs: Any,
    ) -> tuple[Any, Tensor | None, Tensor | None]:
        ignore_keys = sorted({*_NOT_PREDICTIONS, *(ignore_keys or ())})
        if self.args.predict_with_generate and not prediction_loss_only:
            # Seq2SeqTrainer calls the model only for the loss, outside compute_loss.
            model = partial(self._forward_with_task_loss, model)  # type: ignore[assignment]
        return super().prediction_step(
            model, inputs, prediction_loss_only, ignore_keys=ignore_keys, **gen_kwargs
        )

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        if self.args.log_base_loss and metric_key_prefix not in self._base_losses:
            self._base_losses[metric_key_prefix] = math.nan  # while it is computed
            with without_experts(self.model):
                base: Any = self.evaluation_loop(
                    dataloader, description, True, metric_key_prefix=metric_key_prefix
                )
            self._base_losses[metric_key_prefix] = base.metrics[f"{metric_key_prefix}_loss"]
        self._evaluation = torch.zeros(2, dtype=torch.float64)
        output: Any = super().evaluation_loop(
            dataloader,
            description,
            prediction_loss_only,
            ignore_keys,
            metric_key_prefix=metric_key_prefix,
        )
        if metric_key_prefix in self._base_losses:
            output.metrics[f"{metric_key_prefix}_base_loss"] = self._base_losses[metric_key_prefix]
        if self.args.world_size > 1:
            self._evaluation = self.accelerator.reduce(self._evaluation.to(self.args.device)).cpu()
        total, targets = self._evaluation.tolist()
        self._evaluation = None
        if targets:
            loss = total / targets
            output.metrics[f"{metric_key_prefix}_loss"] = loss
            if self._shifts_labels:
                output.metrics[f"{metric_key_prefix}_perplexity"] = math.exp(min(loss, 700.0))
        return output

    def _forward_with_task_loss(self, model: nn.Module, **inputs: Any) -> Any:
        outputs = model(**inputs)
        if isinstance(outputs, dict) and outputs.get("loss") is not None:
            outputs["loss"], _ = split_loss(outputs)
            self._note_evaluation(outputs["loss"], inputs.get("labels"))
        return outputs

    def _note_evaluation(self, task_loss: Tensor, labels: Tensor | None) -> None:
        if self._evaluation is None or labels is None:
            return
        targets = int(count_targets(labels, self._shifts_labels))
        if targets:
            self._evaluation += torch.tensor(
                [float(task_loss) * targets, targets], dtype=torch.float64
            )

    # --------------------------------------------------------------- logging

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As `Trainer.log`, plus the mixture's own numbers, also written to `metrics.jsonl`."""
        details = self._training_details(logs) if "loss" in logs else {}
        super().log(logs, *args, **kwargs)
        if self.is_world_process_zero():
            record = {"step": self.state.global_step, **logs, **details}
            write_metrics(str(self.args.output_dir), record)

    def _training_details(self, logs: dict[str, float]) -> dict:
        """Adds scalars to `logs`; returns what is too long for a log line. Called on all ranks."""
        means, counts = self._log.pop(self.accelerator.reduce)
        logs.update(means)
        if self._base_excess is not None:
            excess = self.accelerator.reduce(self._base_excess, "mean")
            logs["base_loss"] = means["task_loss"] + float(excess)
            self._base_excess = None
        if counts is None:
            return {}
        logs.update(load_summary(counts))
        # GShard's second choices may be dropped: a token has one for certain
        router = self.model.mpoe_config.router
        warning = one_sided(counts, 1 if router.second_policy else router.top_k)
        if warning is not None and self.is_world_process_zero() and not self._is_warned:
            self._is_warned = True
            warnings.warn(warning, stacklevel=2)
        return {"expert_load": {"share": load_shares(counts)}}

    def _note_training(
        self, task: Tensor, auxiliary: Tensor | None, outputs: Any, micro_batches: int
    ) -> None:
        load = outputs.get("expert_load") if isinstance(outputs, Mapping) else None
        if self._corrects_bias:
            if load is None:
                raise ValueError(
                    "bias_update_rate needs the model's expert_load; output_router_logits is False"
                )
            self._step_load = self._step_load + load
        self._log.note(task, auxiliary, load, micro_batches)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As `Trainer.create_model_card`, for MPOE models: `mpoe.models.card` with the last
        evaluation's metrics."""
        if not isinstance(self.model, MPOEModelMixin):
            super().create_model_card(*args, **kwargs)
        elif self.is_world_process_zero():
            evaluations = [record for record in self.state.log_history if "eval_loss" in record]
            last = evaluations[-1].items() if evaluations else ()
            speeds = ("_runtime", "_per_second")
            metrics = {name: value for name, value in last if not name.endswith(speeds)}
            write_card(self.model, str(self.args.output_dir), metrics)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._check_weights()
        super()._save_checkpoint(model, trial)
