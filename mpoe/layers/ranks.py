"""Router losses over the global batch: over the tokens of all processes instead of each process's own.

The balancing loss is a product of two means over tokens, so the mean of the processes' losses differs from the loss of
the whole batch and is stricter: it requires the few tokens of every process to be balanced by themselves (Qiu et al.,
*Demons in the Detail*, arXiv 2501.11873). Only the fractions f need the other processes, and no gradient flows through
them: one small all-reduce of counts, ``[layers, E]``, makes a step of many processes equal to that of one process.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch import Tensor


class _Current(threading.local):
    """One value per thread, like the routing context."""

    active: bool = False
    group: dist.ProcessGroup | None = None


_current = _Current()


@contextmanager
def global_batch(group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Inside this context, models compute their router losses over the tokens of all ranks.

    ``aux_loss`` of a rank is then its share: the *average* over ranks, as DDP and FSDP average gradients, is the loss
    that one process computes on the whole batch. Every rank must run the same number of forward passes inside; with one
    process, or without `torch.distributed`, nothing changes. `MPOETrainer` opens it for training steps.

    Args:
        group: the ranks; default: all.

    Example::

        with global_batch():
            model(**batch).loss.backward()
    """
    previous = (_current.active, _current.group)
    _current.active, _current.group = True, group
    try:
        yield
    finally:
        _current.active, _current.group = previous


def sum_over_ranks(counts: Tensor) -> tuple[Tensor, int]:
    """Counts summed over the ranks of the current `global_batch`, and the number of ranks; outside it, ``counts`` and
    1."""
    if not (_current.active and dist.is_available() and dist.is_initialized()):
        return counts, 1
    counts = counts.clone()
    dist.all_reduce(counts, group=_current.group)
    return counts, dist.get_world_size(_current.group)
