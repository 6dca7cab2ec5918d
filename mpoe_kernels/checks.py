"""Argument checks of the public face: every message names the argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

import torch
from torch import Tensor

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def describe(value: object) -> str:
    """``float32 [3, 4] on cpu`` for a tensor; type and repr for anything else."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)} on {value.device}"
    return f"{type(value).__name__} {value!r}"


def check_tensor(name: str, value: object, dims: tuple[str, ...]) -> Tensor:
    """Require a tensor with ``len(dims)`` dimensions, e.g. ``("T", "I")``."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor [{', '.join(dims)}]; got {describe(value)}")
    if value.dim() != len(dims):
        raise ValueError(f"{name} must be [{', '.join(dims)}]; got {describe(value)}")
    return value


def check_floating(name: str, value: Tensor) -> None:
    """Require one of the floating dtypes that the ops compute in."""
    if value.dtype not in FLOATING:
        raise TypeError(
            f"{name} must have a floating dtype (float64, float32, bfloat16, float16); got {describe(value)}"
        )


def check_same(reference_name: str, reference: Tensor, **others: Tensor | None) -> None:
    """Require dtype and device of ``others`` to equal those of ``reference``."""
    for name, other in others.items():
        if other is None:
            continue
        if other.device != reference.device:
            raise ValueError(
                f"{name} must be on the device of {reference_name}, {reference.device}; got {describe(other)}"
            )
        if other.dtype != reference.dtype:
            raise TypeError(
                f"{name} must have the dtype of {reference_name}, {str(reference.dtype).removeprefix('torch.')} "
                f"(or run under autocast); got {describe(other)}"
            )


def check_index(name: str, value: object, dims: tuple[str, ...]) -> Tensor:
    """Require an int32 or int64 tensor with the given dimensions."""
    tensor = check_tensor(name, value, dims)
    if tensor.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64 [{', '.join(dims)}]; got {describe(tensor)}")
    return tensor


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Require ``value`` to be one of ``choices``; the message offers the closest ones."""
    known = sorted(choices)
    if value in known:
        return
    close = get_close_matches(str(value), known, n=3, cutoff=0.4)
    hint = f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""
    raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}; got {value!r}{hint}")
