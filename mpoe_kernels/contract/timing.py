"""Where nothing may be timed: the setting, several ranks, a graph that is being made."""

from __future__ import annotations

from collections.abc import Callable

import torch

SETTING = "MPOE_AUTOTUNE"
has_ranks: Callable[[], bool] = (
    torch.distributed.is_initialized if torch.distributed.is_available() else bool
)


def several_ranks() -> bool:
    """Whether other processes of ``torch.distributed`` may hold the same tokens."""
    return has_ranks() and torch.distributed.get_world_size() > 1


def is_traced() -> bool:
    """Whether a graph is being made, whose results must not depend on when it is made, and which
    must not wait."""
    return torch.compiler.is_compiling() or (
        torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
    )
