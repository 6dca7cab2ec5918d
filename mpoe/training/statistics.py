"""What a training step adds up: its loss, and the distribution of tokens over experts.

The loss of an optimizer step is the mean over *all* its target tokens, whatever the number of
micro-batches, plus the mean of the micro-batches' auxiliary losses. Averaging the micro-batches'
means instead would make a token's weight depend on the length of its micro-batch; and T5 accepts
`num_items_in_batch` but ignores it, so with the Trainer's scaling its loss and gradients would grow
with the number of micro-batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from mpoe.data.encode import IGNORED_LABEL
from mpoe.models.report import routed_layers


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
    task, auxiliary = outputs.get("task_loss"), outputs.get("aux_loss")
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
    everyone, ranks = targets.clone(), 1
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(everyone)
        ranks = dist.get_world_size()
    task, auxiliary = split_loss(outputs)
    share = step_share(task, targets, everyone, ranks)
    return share if auxiliary is None else share + auxiliary


# Sums or averages a tensor over all processes, as `Accelerator.reduce` does.
Reduce = Callable[[Tensor, str], Tensor]


class RunLog:
    """Task loss, auxiliary loss and expert load since the last `pop`.

    Everything stays on the device until then, without synchronisation.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._load: Tensor | None = None

    def note(
        self, task: Tensor, auxiliary: Tensor | None, load: Tensor | None, micro_batches: int
    ) -> None:
        """Add one of a step's ``micro_batches``; ``load`` `[layers, E]` counts tokens per
        expert."""
        values = {"steps": torch.ones((), device=task.device), "task_loss": task.detach()}
        if auxiliary is not None:
            values["aux_loss"] = auxiliary.detach()
        for name, value in values.items():
            self._sums[name] = (
                self._sums.get(name, torch.zeros_like(value).float())
                + value.float() / micro_batches
            )
        if load is not None:
            load = load.detach().long()
            self._load = load if self._load is None else self._load + load

    def pop(self, reduce: Reduce | None) -> tuple[dict[str, float], Tensor | None]:
        """Means per step by name, and tokens per expert ``[layers, E]`` (None: no mixture); then
        resets.

        With ``reduce``, over all processes, which must all call it.
        """
        steps = max(float(self._sums.pop("steps", 1.0)), 1e-9)
        sums, self._sums = self._sums, {}
        means = {}
        for name in sorted(sums):
            means[name] = (
                float(sums[name] if reduce is None else reduce(sums[name], "mean")) / steps
            )
        counts, self._load = self._load, None
        if counts is not None and reduce is not None:
            counts = reduce(counts, "sum")
        return means, counts


def load_shares(counts: Tensor) -> list[list[float] | None]:
    """``[layers][E]``: every expert's share of its layer's tokens; None for a layer that saw no
    token.

    Args:
        counts: tokens per expert, integers ``[layers, E]``.
    """
    rows = counts.double().cpu()
    return [
        [round(v, 6) for v in (row / row.sum()).tolist()] if row.any() else None for row in rows
    ]


def load_summary(counts: Tensor) -> dict[str, float]:
    """Scalars for a log line of tokens per expert ``[layers, E]``: the worst layer's extremes, and
    the layers' mean
    entropy (relative to log E: 1 = even, 0 = one expert takes all). Layers that saw no token are
    left out."""
    rows = counts.double().cpu()
    share = rows[rows.sum(1) > 0]
    if not len(share):
        return {}
    share = share / share.sum(1, keepdim=True)
    experts = share.shape[1]
    entropy = (
        -torch.xlogy(share, share).sum(1) / math.log(experts)
        if experts > 1
        else torch.ones(len(share))
    )
    return {
        "expert_min_share": float(share.min()),
        "expert_max_share": float(share.max()),
        "expert_entropy": float(entropy.mean()),
    }


def one_sided(counts: Tensor, top_k: int) -> str | None:
    """A sentence if, of slots per expert ``[layers, E]`` where a token has ``top_k``, one got more
    of a layer's tokens than half plus half of the even share: of 2 experts 75%, of 8 56%, of 8 with
    ``top_k`` 2 63%."""
    slots, experts = counts.sum(1), counts.shape[1]
    share = (top_k * counts.max(1).values / slots.clamp(min=1)).clamp(max=1)
    layer = int(share.argmax())
    if (
        slots[layer] < 100 * experts or share[layer] <= 0.5 + 0.5 * top_k / experts
    ):  # few may be chance
        return None
    return (
        f"expert {int(counts[layer].argmax())} of mixture layer {layer} took {share[layer]:.0%} of "
        "its tokens since the"
        " last log; balance_loss_weight, jitter or a lower router_lr_scale spread them"
    )


# ------------------------------------------------------------- balance without a loss


@torch.no_grad()
def update_correction_bias(model: nn.Module, expert_load: Tensor) -> None:
    """Raise ``e_score_correction_bias`` by the routers' ``bias_update_rate`` for experts with less
    than the mean load of their layer, and lower it for those with more. Routers without the bias
    are skipped.

    Balance without a loss: the bias only takes part in choosing experts (Wang et al.,
    *Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts*, arXiv 2408.15664,
    algorithm 1; DeepSeek-V3, arXiv 2412.19437, section 2.1.2).

    Call it once per optimizer step; `MPOETrainer` does.

    Args:
        model: an MPOE model.
        expert_load: tokens of every expert in the step, ``[layers, E]``, as in the model's outputs;
            summed over micro-batches and ranks.

    Raises:
        ValueError: a load of another size.
    """
    layers = [layer for _, layer in routed_layers(model)]
    if tuple(expert_load.shape) not in {(len(layers), layer.num_experts) for layer in layers}:
        raise ValueError(
            f"expert_load must be [{len(layers)}, E], a row per layer; got "
            f"{list(expert_load.shape)}"
        )
    for layer, load in zip(layers, expert_load.float(), strict=True):
        router = layer.router
        if router is not None and router.e_score_correction_bias is not None:
            bias, rate = router.e_score_correction_bias, router.config.bias_update_rate
            bias.add_(torch.sign(load.mean() - load).to(bias), alpha=rate)


def corrects_bias(model: nn.Module) -> bool:
    """Whether a router of ``model`` needs `update_correction_bias`."""
    routers = (layer.router for _, layer in routed_layers(model))
    return any(
        router is not None and router.e_score_correction_bias is not None for router in routers
    )
