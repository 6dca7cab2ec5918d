"""A short search for the learning rate: a few small runs from the same weights, judged on items none of them sees."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch

from mpoe.training.loss import count_targets, shifts_labels, split_loss
from mpoe.training.param_groups import build_param_groups

STEPS, HELD_OUT = 30, 128
_FACTOR, _MOST = 3.0, 5  # between neighbouring rates; rates that are tried at most


def find_rate(trainer: Any, items: Sequence[Any], start: float, steps: int = STEPS) -> tuple[float, dict[float, float]]:
    """The base rate, of three to five around ``start``, with the least loss on held-out items.

    Every trial is a run in miniature: AdamW, the trainer's parameter groups, batches and clipping, a rate that falls to
    0 over its steps, dropout from the same seed. The model, its gradients and the random numbers are as before
    afterwards, bit for bit.

    Args:
        trainer: an `MPOETrainer` that has not begun.
        items: encoded training items; a tenth of them, at most `HELD_OUT`, judges.
        start: the rate in the middle.
        steps: of each trial.

    Returns:
        The rate, and the loss per target of each that was tried.

    Raises:
        ValueError: several processes, or fewer than two items.
    """
    args, model = trainer.args, trainer.model
    if args.world_size > 1:
        raise ValueError(f"find_rate needs one process; got {args.world_size} (search in one, then give learning_rate)")
    if len(items) < 2:
        raise ValueError(f"find_rate needs two training items at least; got {len(items)}")
    order = list(range(len(items)))
    random.Random(f"find-rate-{args.seed}").shuffle(order)
    held = max(1, min(HELD_OUT, len(items) // 10))
    judged, rest = [items[k] for k in order[:held]], [items[k] for k in order[held:]]
    size = args.per_device_train_batch_size
    batches = [[rest[(step * size + k) % len(rest)] for k in range(size)] for step in range(steps)]
    kept = [(tensor, tensor.detach().clone()) for tensor in (*model.parameters(), *model.buffers())]
    was_training, own_rate = model.training, args.learning_rate

    def tried(rate: float) -> float:
        torch.manual_seed(args.seed)
        args.learning_rate = rate
        _train(trainer, batches)
        loss = _loss(trainer, judged)
        for tensor, value in kept:
            tensor.detach().copy_(value)
            tensor.grad = None
        return loss

    devices = [args.device] if args.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            losses = _search(tried, start)
    finally:
        args.learning_rate = own_rate
        model.train(was_training)
    return min(losses, key=lambda rate: (losses[rate], rate)), losses


def _search(tried: Callable[[float], float], start: float) -> dict[float, float]:
    """Rate -> loss: three rates, and further ones while the best is at an end."""
    losses = {rate: tried(rate) for rate in (_rounded(start / _FACTOR), start, _rounded(start * _FACTOR))}
    while len(losses) < _MOST:
        best = min(losses, key=lambda rate: (losses[rate], rate))
        if best not in (min(losses), max(losses)):
            break
        further = _rounded(best / _FACTOR if best == min(losses) else best * _FACTOR)
        losses[further] = tried(further)
    return dict(sorted(losses.items()))


def _rounded(rate: float) -> float:
    return float(f"{rate:.1g}")


def _train(trainer: Any, batches: Sequence[Sequence[Any]]) -> None:
    args, model = trainer.args, trainer.model
    model.train()
    optimizer = torch.optim.AdamW(
        build_param_groups(model, args), betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_epsilon
    )
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(batches))
    for batch in batches:
        with trainer.compute_loss_context_manager():
            loss = split_loss(model(**trainer._prepare_inputs(trainer.data_collator(batch)))).total
        if not torch.isfinite(loss):
            return
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm or math.inf)
        optimizer.step()
        optimizer.zero_grad()
        falling.step()


@torch.no_grad()
def _loss(trainer: Any, items: Sequence[Any]) -> float:
    """Mean loss per target; infinite where it is no number."""
    model, size, total, count = trainer.model.eval(), trainer.args.per_device_eval_batch_size, 0.0, 0
    for start in range(0, len(items), size):
        batch = trainer._prepare_inputs(trainer.data_collator(items[start : start + size]))
        targets = int(count_targets(batch["labels"], shifts_labels(model)))
        with trainer.compute_loss_context_manager():
            total += float(split_loss(model(**batch)).task) * targets
        count += targets
    return total / max(count, 1) if math.isfinite(total) else math.inf
