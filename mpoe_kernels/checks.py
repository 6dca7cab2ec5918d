"""Argument checks of the public functions: every message names the argument, what was expected and
what was given."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from difflib import get_close_matches

import torch
from torch import Tensor

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (int, torch.SymInt)
# Dtypes that autocast casts, and devices on which the ops follow it.
LOWERED = {torch.float32, torch.bfloat16, torch.float16}
AUTOCAST_DEVICES = ("cpu", "cuda")
PLAIN = (Tensor, torch.nn.Parameter)  # without a subclass of its own


def describe(value: object) -> str:
    """``float32 [3, 4] on cpu`` for a tensor; type and repr for anything else."""
    if isinstance(value, Tensor):
        sizes = "nested" if value.is_nested else list(value.shape)
        return f"{str(value.dtype).removeprefix('torch.')} {sizes} on {value.device}"
    return f"{type(value).__name__} {value!r}"


def check_dense(name: str, value: Tensor) -> None:
    """Refuse sparse, nested and mkldnn tensors."""
    if value.layout != torch.strided or value.is_nested:
        raise ValueError(
            f"{name} must be a dense tensor; got one of the layout "
            f"{'nested' if value.is_nested else value.layout}"
        )


def check_tensor(name: str, value: object, dims: tuple[str, ...]) -> Tensor:
    """Require a tensor with ``len(dims)`` dimensions, e.g. ``("T", "I")``."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor [{', '.join(dims)}]; got {describe(value)}")
    check_dense(name, value)
    if value.dim() != len(dims):
        raise ValueError(f"{name} must be [{', '.join(dims)}]; got {describe(value)}")
    return value


def _extent(value: Tensor) -> int:
    """Bytes from a tensor's first element to the end of its last."""
    steps = zip(value.shape, value.stride(), strict=True)
    return (1 + sum((size - 1) * step for size, step in steps)) * value.itemsize


def holds_values(value: Tensor) -> bool:
    """Whether the memory of a strided tensor is there, in full: not if its storage was resized, as
    FSDP does."""
    size = value.nbytes
    if not size:
        return True
    if not value.is_contiguous():
        size = _extent(value)
    return (
        value.untyped_storage().nbytes() >= size + value.storage_offset() * value.itemsize
        and value.data_ptr() != 0
    )


def check_memory(name: str, value: Tensor) -> None:
    """Require a dense tensor whose memory holds its values: not one whose storage was resized, as
    FSDP does."""
    check_dense(name, value)
    if not value.is_meta and not holds_values(value):
        held = 0
        if value.data_ptr():
            held = value.untyped_storage().nbytes()
        raise ValueError(
            f"{name} must hold its values, in "
            f"{_extent(value) + value.storage_offset() * value.itemsize} bytes; got "
            f"{describe(value)} with a storage of {held} bytes"
        )


def check_plain_memory(name: str, value: Tensor) -> None:
    """`check_memory` of a tensor that is no wrapper of a compiler's or a transform's."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return
    if type(value) in PLAIN:
        check_memory(name, value)


def check_floating(name: str, value: Tensor) -> None:
    """Require one of the floating dtypes that the ops compute in."""
    if value.dtype not in FLOATING:
        raise TypeError(
            f"{name} must have a floating dtype (float64, float32, bfloat16, float16); got "
            f"{describe(value)}"
        )


def check_device(reference_name: str, reference: Tensor, **others: Tensor | None) -> None:
    """Require ``others`` to be on the device of ``reference``."""
    device = reference.device
    for name, other in others.items():
        if other is not None and other.device != device:
            raise ValueError(
                f"{name} must be on the device of {reference_name}, {device}; got {describe(other)}"
            )


def check_integer(
    name: str, value: object, low: int, high: int | None = None, what: str = ""
) -> int:
    """Require an integer (not a bool) in ``low..high``; ``what`` describes ``high`` in the
    message."""
    if isinstance(value, bool) or not isinstance(value, INTEGERS):
        raise TypeError(f"{name} must be an integer; got {describe(value)}")
    if value < low or (high is not None and value > high):
        least = f"be at least {low}"
        between = f"lie between {low} and {what + ' = ' if what else ''}{high}"
        raise ValueError(
            f"{name} must {least if value < low and not what else between}; got {value}"
        )
    return value  # type: ignore[return-value]


def refuse_jit_trace(what: str) -> None:
    """Refuse torch.jit.trace, which would record the sizes and routing of one call as constants."""
    if torch._C._get_tracing_state() is not None:
        raise NotImplementedError(
            f"{what} does not support torch.jit.trace; use torch.compile or torch.export"
        )


def no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Disable autocast, on devices that support it and on others; entering a disabled one costs as
    much as a small product."""
    active = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    if active:
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def check_index(name: str, value: object, dims: tuple[str, ...]) -> Tensor:
    """Require an int32 or int64 tensor with the given dimensions."""
    tensor = check_tensor(name, value, dims)
    if tensor.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f"{name} must be int32 or int64 [{', '.join(dims)}]; got {describe(tensor)}"
        )
    return tensor


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    """Require ``value`` to be one of ``choices``; the message offers the closest ones."""
    if isinstance(value, str) and value in choices:
        return
    known = sorted(choices)
    close = get_close_matches(str(value), known, n=3, cutoff=0.4)
    hint = ""
    if close:
        hint = f" (did you mean {' or '.join(map(repr, close))}?)"
    raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}; got {value!r}{hint}")


def check_range(
    name: str, index: Tensor, low: int, high: int, error: type[Exception] = ValueError
) -> None:
    """Refuse an entry outside ``low..high``, only on the CPU: elsewhere the check would wait for
    the device."""
    if index.numel() == 0 or index.device.type != "cpu":
        return
    smallest, largest = index.aminmax()
    for entry in (int(smallest), int(largest)):
        if not low <= entry <= high:
            raise error(f"{name} must lie in {low}..{high}; got {entry}")
