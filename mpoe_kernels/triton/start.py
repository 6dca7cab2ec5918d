"""The one place where kernels start, so that a tool can record launches instead of making them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from mpoe_kernels.registry import BackendError
from mpoe_kernels.triton import architecture


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int) -> int:
    """Smallest power of two that is at least ``n``."""
    return 1 << max(n - 1, 0).bit_length()


@dataclass(frozen=True)
class Launch:
    """A recorded launch: the kernel, its grid, and every argument by name (options such as num_warps included)."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]


@dataclass
class Recording:
    """Launches for an architecture that need not be here."""

    architecture: str
    tile: int | None = None
    launches: list[Launch] = field(default_factory=list)


_recording: ContextVar[Recording | None] = ContextVar("mpoe_triton_recording", default=None)


@contextmanager
def recorded(name: str, tile: int | None = None) -> Iterator[list[Launch]]:
    """Record launches as they would be on ``name`` (see `ARCHITECTURES`); tensors may be ``meta`` ones.

    ``tile``: take this entry of every kernel's table of tiles instead of the one that suits the problem.
    """
    if name not in architecture.ARCHITECTURES:
        raise ValueError(f"architecture must be one of {architecture.ARCHITECTURES}; got {name!r}")
    recording = Recording(name, tile)
    token = _recording.set(recording)
    try:
        yield recording.launches
    finally:
        _recording.reset(token)


def architecture_of(device: torch.device) -> str:
    """Key of the configuration tables for tensors on ``device``, or the recorded architecture."""
    recording = _recording.get()
    return architecture.architecture_of(device) if recording is None else recording.architecture


def target_of(device: torch.device) -> architecture.Target:
    """What kernels for tensors on ``device`` are made for, or the recorded architecture."""
    recording = _recording.get()
    return architecture.target_of(device) if recording is None else architecture.target_named(recording.architecture)


def recorded_tile() -> int | None:
    """Entry of the tables of tiles that a recording asks for."""
    recording = _recording.get()
    return None if recording is None else recording.tile


def _device_of(arguments: Mapping[str, Any]) -> AbstractContextManager[Any]:
    """Makes the GPU of the tensors the current one: Triton launches there, wherever its arguments are."""
    tensor = next((value for value in arguments.values() if isinstance(value, Tensor)), None)
    return nullcontext() if tensor is None else torch.cuda.device_of(tensor)


def start(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
    """Launch ``kernel[grid](**arguments)`` on the device of its tensors, unless launches are being recorded.

    An empty grid is no launch.

    Raises:
        BackendError: the device has too little of something, shared memory or registers, for the kernel.
    """
    if 0 in grid:
        return
    recording = _recording.get()
    if recording is None:
        try:
            with _device_of(arguments):
                kernel[grid](**arguments)
        except OutOfResources as error:
            blocks = {
                name: value for name, value in arguments.items() if isinstance(value, int) and name.startswith("B")
            }
            raise BackendError(
                f"backend 'triton' cannot run {kernel.__name__} with {blocks}: it needs {error.required} of "
                f"{error.name}; this device has {error.limit}"
            ) from error
    else:
        recording.launches.append(Launch(kernel, grid, arguments))
