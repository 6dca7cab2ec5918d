"""What PyTorch asks of an op besides its kernel: a fake's devices, `torch.vmap`, autocast, and what
the ops refuse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mpoe_kernels.checks import LOWERED, PLAIN, check_memory, describe, refuse_jit_trace

NAMESPACE = "mpoe"


def on_one_device(fake: Callable[..., Any], name: str) -> Callable[..., Any]:
    """With a meta tensor among others PyTorch calls the fake, whose results are uninitialised
    memory."""

    def checked(*arguments: Any) -> Any:
        tensors = [value for value in arguments if isinstance(value, Tensor)]
        for tensor in tensors:
            if tensor.device != tensors[0].device:
                raise ValueError(
                    f"{NAMESPACE}::{name} needs its tensors on one device; "
                    f"got {', '.join(describe(tensor) for tensor in tensors)}"
                )
        return fake(*arguments)

    return checked


def refuse_unseen(name: str, arguments: tuple[Any, ...]) -> None:
    """What a kernel never sees: PyTorch silently drops the tangents of a custom op's arguments, and
    resolves negative bits by reading memory, whether it is there or not."""
    refuse_jit_trace(f"{NAMESPACE}::{name}")
    for value in arguments:
        if not isinstance(value, Tensor):
            continue
        is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor(value)
        if type(value) in PLAIN and value.is_neg() and not is_wrapped:
            check_memory(f"every tensor of {NAMESPACE}::{name}", value)
        if forward_ad.unpack_dual(value).tangent is not None:
            refuse_jvp(name)()


def _refusing(message: str) -> Callable[..., Any]:
    """A rule that refuses."""

    def refuse(*arguments: Any) -> Any:
        raise NotImplementedError(message)

    return refuse


def refuse_jvp(name: str) -> Callable[..., Any]:
    if name.endswith("_backward"):
        return refuse_autograd(name)
    return _refusing(
        f"{NAMESPACE}::{name} does not support forward-mode derivatives (torch.func.jvp, "
        "jacfwd, forward_ad); use reverse mode (torch.autograd.grad, torch.func.vjp, jacrev)"
    )


def negative_kernel(op: Any, name: str) -> Callable[..., Any]:
    """Of raw calls: PyTorch resolves negative bits by reading memory, whether it is there or
    not."""

    def kernel(*arguments: Any) -> Any:
        resolved = []
        for value in arguments:
            if isinstance(value, Tensor) and value.is_neg():
                check_memory(f"every tensor of {NAMESPACE}::{name}", value)
                value = value.resolve_neg()
            resolved.append(value)
        return op(*resolved)

    return kernel


def refuse_autograd(name: str) -> Callable[..., Any]:
    return _refusing(
        f"{NAMESPACE}::{name} cannot be differentiated: second derivatives of MPO ops are not "
        "supported"
    )


def one_after_the_other(op: Any) -> Callable[..., Any]:
    """A rule for `torch.vmap` that calls the op once for each entry."""

    def run(info: Any, in_dims: Any, *arguments: Any) -> Any:
        results = []
        for k in range(info.batch_size):
            entry = []
            for value, dim in zip(arguments, in_dims, strict=True):
                if isinstance(dim, int):
                    value = value.select(dim, k)
                entry.append(value)
            results.append(op(*entry))
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        stacked = [torch.stack(tensors) for tensors in zip(*results, strict=True)]
        return tuple(stacked), (0,) * len(stacked)

    return run


def refuse_vmap(name: str) -> Callable[..., Any]:
    return _refusing(
        f"{NAMESPACE}::{name} does not support torch.vmap; give it the batch as tokens (rows) "
        "instead"
    )


def autocast_kernel(op: Any, device_type: str, positions: tuple[int, ...]) -> Callable[..., Any]:
    def kernel(*arguments: Any) -> Any:
        return _cast(arguments, positions, device_type, op)

    return kernel


def lowered(arguments: Sequence[Any], positions: Sequence[int], run: Callable[..., Any]) -> Any:
    """Run as under PyTorch's autocast, if that is on, so that what a function saves for its
    backward is cast too."""
    device_types = {value.device.type for value in arguments if isinstance(value, Tensor)}
    for device_type in device_types:
        if positions and torch.is_autocast_enabled(device_type):
            return _cast(arguments, positions, device_type, run)
    return run(*arguments)


def _cast(
    arguments: Sequence[Any], positions: Sequence[int], device_type: str, run: Callable[..., Any]
) -> Any:
    dtype = torch.get_autocast_dtype(device_type)
    cast = list(arguments)
    for k in positions:
        value = cast[k]
        # float64 is left alone: torch's autocast never lowers it elsewhere either.
        if isinstance(value, Tensor) and value.dtype in LOWERED:
            cast[k] = value.to(dtype)
    with torch.autocast(device_type, enabled=False):
        return run(*cast)
