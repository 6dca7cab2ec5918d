"""What PyTorch asks of an op besides its kernel: a fake's devices, `torch.vmap`, autocast, and what
the ops refuse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mpoe_kernels.checks import LOWERED, check_memory, describe, refuse_jit_trace

NAMESPACE = "mpoe"
PLAIN = (Tensor, torch.nn.Parameter)  # without a subclass of its own
_NO_SECOND_DERIVATIVES = (
    NAMESPACE + "::{} cannot be differentiated: second derivatives of MPO ops are not supported"
)


def check_plain_memory(name: str, value: Tensor) -> None:
    """`check_memory` of a tensor that is no wrapper of a compiler's or a transform's."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return
    if type(value) in PLAIN:
        check_memory(name, value)


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
        if (
            type(value) in PLAIN
            and value.is_neg()
            and not torch._C._functorch.is_functorch_wrapped_tensor(value)
        ):
            check_memory(f"every tensor of {NAMESPACE}::{name}", value)
        if isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None:
            refuse_jvp(name)(None)


def refuse_jvp(name: str) -> Callable[..., Any]:
    def refuse(ctx: Any, *tangents: Any) -> Any:
        if name.endswith("_backward"):
            raise NotImplementedError(_NO_SECOND_DERIVATIVES.format(name))
        raise NotImplementedError(
            f"{NAMESPACE}::{name} does not support forward-mode derivatives (torch.func.jvp, "
            "jacfwd, forward_ad); use reverse mode (torch.autograd.grad, torch.func.vjp, jacrev)"
        )

    return refuse


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
    def refuse(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(_NO_SECOND_DERIVATIVES.format(name))

    return refuse


def one_after_the_other(op: Any) -> Callable[..., Any]:
    """A rule for `torch.vmap` that calls the op once for each entry."""

    def run(info: Any, in_dims: Any, *arguments: Any) -> Any:
        results = []
        for k in range(info.batch_size):
            entry = [
                value.select(dim, k) if isinstance(dim, int) else value
                for value, dim in zip(arguments, in_dims, strict=True)
            ]
            results.append(op(*entry))
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])

    return run


def refuse_vmap(name: str) -> Callable[..., Any]:
    def refuse(info: Any, in_dims: Any, *arguments: Any) -> Any:
        raise NotImplementedError(
            f"{NAMESPACE}::{name} does not support torch.vmap; give it the batch as tokens (rows) "
            "instead"
        )

    return refuse


def autocast_kernel(op: Any, device_type: str, positions: tuple[int, ...]) -> Callable[..., Any]:
    def kernel(*arguments: Any) -> Any:
        return _cast(arguments, positions, device_type, op)

    return kernel


def lowered(arguments: Sequence[Any], positions: Sequence[int], run: Callable[..., Any]) -> Any:
    """Run as under PyTorch's autocast, if that is on, so that what a function saves for its
    backward is cast too."""
    for device_type in {a.device.type for a in arguments if isinstance(a, Tensor)}:
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
