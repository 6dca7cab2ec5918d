"""The loss of an optimizer step: the mean over *all* its target tokens, whatever the number of
micro-batches, plus the mean of the micro-batches' auxiliary losses.

Averaging the micro-batches' means instead would make a token's weight depend on the length of its
micro-batch; and T5 accepts `num_items_in_batch` but ignores it, so with the Trainer's scaling its
loss and gradients would grow with the number of micro-batches.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from mpoe.data.encode import IGNORED_LABEL


def split_loss(outputs: Any) -> tuple[Tensor, Tensor | None]:
    """Of one forward: the mean loss over the targets, and the routers' (None: no router), scalars.

    MPOE models return both (`task_loss`, `aux_loss`); for any other model the whole loss is the
    task loss.

    Raises:
        ValueError: the outputs have no loss (no labels were given).
    """
    if not isinstance(outputs, dict):
        return outputs[0].mean(), None
    if outputs.get("loss") is None:
        raise ValueError(
            f"the model returned no loss: give it labels (it returned {', '.join(outputs.keys())})"
        )
    task = outputs.get("task_loss")
    auxiliary = outputs.get("aux_loss")
    if task is None:
        return outputs["loss"].mean(), None
    return task.mean(), None if auxiliary is None else auxiliary.mean()


def shifts_labels(model: Any) -> bool:
    """Whether the model's loss predicts label i + 1 at position i, so the first label of a row is
    not a target."""
    if not isinstance(model, PreTrainedModel) or model.config.is_encoder_decoder:
        return False
    name = type(model).__name__
    return name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() or name.endswith(
        ("ForCausalLM", "LMHeadModel")
    )


def count_targets(labels: Tensor, shifted: bool) -> Tensor:
    """Number of targets that a mean loss averages over: labels `[B, S]` or `[B]` that are not -100
    (0-d tensor)."""
    if shifted and labels.ndim > 1:
        labels = labels[..., 1:]
    return labels.ne(IGNORED_LABEL).sum()


def step_share(task: Tensor, targets: Tensor, step_targets: Tensor, parts: int) -> Tensor:
    """What a micro-batch's mean loss ``task`` adds to its optimizer step, times ``parts``.

    The Trainer divides this by the number of micro-batches, and DDP averages over ranks; after
    both, the shares sum to (sum over all targets of their losses) / (number of targets).

    Args:
        targets: targets in this micro-batch (0-d).
        step_targets: targets in the whole optimizer step, over all micro-batches and ranks (0-d).
        parts: micro-batches times processes whose gradients will be averaged.
    """
    # A step without targets has no task loss; its mean is NaN and must not propagate.
    return torch.where(
        targets > 0, task * (targets * parts / step_targets.clamp(min=1)), torch.zeros_like(task)
    )


def rank_share(outputs: Any, labels: Tensor, model: Any) -> Tensor:
    """This rank's share of the loss of the global batch, for a plain loop: call ``backward`` on it.

    The average over ranks, as DDP and FSDP average gradients, is the mean over all targets of the
    global batch, however they are distributed, plus the mean auxiliary loss (use a `global_batch`
    to compute that over the global batch too).

    Args:
        outputs: of the model, given ``labels``.
        labels: ``[B, S]`` or ``[B]``; -100 is not a target.
        model: determines whether labels are shifted; may be wrapped by DDP.
    """
    targets = count_targets(labels, shifts_labels(getattr(model, "module", model)))
    everyone = targets.clone()
    ranks = 1
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(everyone)
        ranks = dist.get_world_size()
    task, auxiliary = split_loss(outputs)
    share = step_share(task, targets, everyone, ranks)
    return share if auxiliary is None else share + auxiliary
