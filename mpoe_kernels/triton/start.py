"""The one place where kernels start: on the GPU of their tensors, and with an error that says what did not fit."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from mpoe_kernels.backends import BackendError
from mpoe_kernels.contract import may_round_to_tf32


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int) -> int:
    """Smallest power of two that is at least ``n``."""
    return 1 << max(n - 1, 0).bit_length()


def precision(dtype: torch.dtype) -> str:
    """The precision of float32 products, following PyTorch's setting."""
    return "tf32" if may_round_to_tf32(dtype) else "ieee"


def _on_device(index: int) -> AbstractContextManager[Any]:
    """Makes the GPU of the tensors the current one: Triton launches on the current one, wherever its arguments are."""
    return nullcontext() if index < 0 or index == torch.cuda.current_device() else torch.cuda.device(index)


def _launch(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
    """Tests replace this, see `mpoe_kernels.testing.launches`."""
    device = next((value.get_device() for value in arguments.values() if isinstance(value, Tensor)), -1)
    with _on_device(device):
        kernel[grid](**arguments)


def start(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
    """Launch ``kernel[grid](**arguments)`` on the device of its tensors. An empty grid is no launch.

    Products and sums are fused (one rounding each), whatever the default of the installed Triton is.

    Raises:
        BackendError: the device has too little of a resource (shared memory or registers) for the kernel.
    """
    if 0 in grid:
        return
    try:
        _launch(kernel, grid, {**arguments, "enable_fp_fusion": True})
    except OutOfResources as error:
        blocks = {name: value for name, value in arguments.items() if isinstance(value, int) and name.startswith("B")}
        raise BackendError(
            f"backend 'triton' cannot run {kernel.__name__} with {blocks}: it needs {error.required} of "
            f"{error.name}; this device has {error.limit}"
        ) from error
