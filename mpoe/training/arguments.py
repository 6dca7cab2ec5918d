"""`MPOETrainingArguments`: the Hugging Face Trainer's arguments and those of MPO experts."""

import json
import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import Seq2SeqTrainingArguments

from mpoe.config.checks import check_choice, check_flag, check_number, check_seed, check_type
from mpoe.models.checkpoint import COMPONENTS, parse_components
from mpoe.training.freezing import GradientMask, parse_core_indices

# (central, auxiliary): factors that worked in each regime, on top of base x RMS(core) /
# RMS(weight).
LR_SCALES = {"finetune": (0.35, 0.5), "scratch": (1.0, 0.1)}


def _argument(default: Any, text: str, **metadata: Any) -> Any:
    """A field with its help text."""
    return field(default=default, metadata={"help": text, **metadata})


@dataclass
class MPOETrainingArguments(Seq2SeqTrainingArguments):
    """Arguments of `MPOETrainer`; each field's `help` describes it.

    Raises:
        TypeError, ValueError: on construction, naming the argument, what was expected and what was
            given.
    """

    mpo_lr: float | None = _argument(
        None,
        "Base learning rate of the MPO cores; default: learning_rate. Per-core scaling multiplies "
        "it.",
    )
    regime: str = _argument(
        "finetune",
        "'finetune' (a pretrained model) or 'scratch' (random weights): chooses the defaults of "
        "central_lr_scale and auxiliary_lr_scale (.35 / .5 and 1 / .1).",
        choices=sorted(LR_SCALES),
    )
    scale_core_lr: bool = _argument(
        True,
        "Give every core its own rate, base x RMS(core) / RMS(weight) x its scale. Without it all "
        "cores use one raw rate, at which some shapes collapse.",
    )
    central_lr_scale: float | None = _argument(
        None, "Factor on the central cores' rates; default: see regime (1 without scale_core_lr)."
    )
    auxiliary_lr_scale: float | None = _argument(
        None, "Factor on the auxiliary cores' rates; default: see regime (1 without scale_core_lr)."
    )
    router_lr_scale: float = _argument(1.0, "Factor on learning_rate for the routers.")
    dense_expert_lr_scale: float = _argument(
        1.0,
        "Factor on learning_rate for dense experts (the Switch baseline; about .3 when "
        "fine-tuning).",
    )
    gradient_mask_prob: float = _argument(
        0.0,
        "p_b: the share of optimizer steps, drawn at random, that leave all central cores "
        "untouched.",
    )
    gradient_mask_seed: int | None = _argument(
        None, "Seed of the gradient mask's own random stream; default: seed."
    )
    update_mpo_layer: str | None = _argument(
        None,
        "Comma-separated components whose MPO cores are trained, the others' are frozen:"
        f" any of {', '.join(COMPONENTS)}; default: all.",
    )
    tensor_learn: bool = _argument(
        False,
        "Lightweight fine-tuning: freeze all central cores; auxiliary cores and the rest of the "
        "model train.",
    )
    train_AT_index: str | None = _argument(
        None,
        "Comma-separated indices of cores that stay FROZEN, counted from 0 along the chain: of "
        "five cores, '2' trains the four auxiliary ones and '1,2,3' only the outer two.",
    )
    label_smoothing_factor: float = _argument(
        0.0,
        "Share of the target's probability that is spread over the vocabulary in the training "
        "loss.",
        aliases=["--label_smoothing", "--label-smoothing"],
    )
    global_router_losses: bool = _argument(
        True,
        "With several processes: balance the experts over the tokens of all of them, as one "
        "process with the whole batch would, instead of over each process's own.",
    )
    allow_non_finite: bool = _argument(
        False,
        "Train on when the loss, the gradients or the weights are not finite, instead of ending "
        "with an error. (Gradients that overflow under loss scaling are skipped, which is no "
        "error.)",
    )
    adapter: bool = _argument(
        False,
        "Train experts and routers alone, everything else is frozen (`freeze_all_but_experts`).",
    )
    log_base_loss: bool = _argument(
        False,
        "Of neurons beside a frozen network: log the loss without them too, on the same items; in "
        "training on one micro-batch of every log's.",
    )
    save_only_trained: bool = _argument(
        False,
        "Checkpoints hold the parameters that train alone; a run goes on beside the same frozen "
        "rest.",
    )

    def __post_init__(self) -> None:
        # Check our own arguments first, before the Trainer sets up devices or processes.
        check_choice("regime", self.regime, sorted(LR_SCALES))
        for name, kind in MPOETrainingArguments.__annotations__.items():
            value = getattr(self, name)
            if kind is bool:
                check_flag(name, value)
            elif name.endswith(("_lr", "_lr_scale")) and (value is not None or kind is float):
                check_number(name, value, 0, open_low=True)
        check_type("output_dir", self.output_dir, str | os.PathLike | None, "a path")
        check_seed("seed", self.seed)
        if self.data_seed is not None:
            check_seed("data_seed", self.data_seed)
        mask = GradientMask(None, self.gradient_mask_prob, self.mask_seed)
        self.gradient_mask_prob = mask.probability
        # Configuration files may hold lists or a bare number; the stored value is always text, but
        # that of the Trainer's argument.
        self.report_to = _as_list(self.report_to)
        self.update_mpo_layer = _as_text(self.update_mpo_layer)
        self.train_AT_index = _as_text(self.train_AT_index)
        parse_components(self.update_mpo_layer)
        parse_core_indices(self.train_AT_index)
        if self.gradient_mask_prob > 0:
            if self.ddp_find_unused_parameters is False:
                raise ValueError(
                    "ddp_find_unused_parameters must not be False when gradient_mask_prob > 0: in "
                    "a masked step the central cores take no part in the backward pass, and DDP "
                    "would wait for them"
                )
            self.ddp_find_unused_parameters = True
        if self.allow_non_finite:
            # it would log a non-finite loss as an earlier one, or as 0
            self.logging_nan_inf_filter = False
        if self.fsdp:
            advice = (
                "shard the model in a plain loop with mpoe.shard_model (see "
                "examples/sharded_loop.py)"
            )
            if self.use_cpu or not torch.accelerator.is_available():
                raise ValueError(
                    f"fsdp must be off on a CPU, where the Trainer would silently run DDP; {advice}"
                )
            warnings.warn(f"fsdp is not tested with MPOETrainer; what is: {advice}", stacklevel=3)
        super().__post_init__()

    @property
    def device(self) -> torch.device:
        """As in Transformers, but a CPU has no index, because torch 2.11 cannot load a checkpoint
        to one with an index."""
        device = super().device
        return torch.device("cpu") if device.type == "cpu" else device

    @property
    def core_lr(self) -> float:
        """Base rate of the cores: `mpo_lr`, or else `learning_rate`."""
        return self.learning_rate if self.mpo_lr is None else self.mpo_lr

    @property
    def lr_scales(self) -> tuple[float, float]:
        """(central, auxiliary) factors after the regime's defaults have been filled in."""
        central, auxiliary = LR_SCALES[self.regime] if self.scale_core_lr else (1.0, 1.0)
        return (
            central if self.central_lr_scale is None else self.central_lr_scale,
            auxiliary if self.auxiliary_lr_scale is None else self.auxiliary_lr_scale,
        )

    @property
    def mask_seed(self) -> int:
        """Seed of the gradient mask's stream: `gradient_mask_seed`, or else `seed`."""
        return self.seed if self.gradient_mask_seed is None else self.gradient_mask_seed


def _as_list(value: Any) -> Any:
    """The value; a list of a configuration file, which arrives as JSON, as a list."""
    is_json = isinstance(value, str) and value.startswith("[")
    return json.loads(value) if is_json else value


def _as_text(value: object) -> str | None:
    value = _as_list(value)
    if value is None or isinstance(value, str):
        return value
    return ",".join(map(str, value)) if isinstance(value, Iterable) else str(value)
