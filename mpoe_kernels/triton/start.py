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
from mpoe_kernels.triton.architecture import in_interpreter


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


def _on_device(index: int) -> AbstractContextManager[Any]:
    """Makes the GPU of the tensors the current one: Triton launches there, wherever its arguments are."""
    return nullcontext() if index < 0 or index == torch.cuda.current_device() else torch.cuda.device(index)


class Handles:
    """Compiled kernels by everything that Triton compiles them for.

    Triton binds and hashes every argument of a launch anew, which takes it longer than small kernels run.
    """

    MOST = 8192

    def __init__(self) -> None:
        self._compiled: dict[tuple[Any, ...], Any] = {}
        # By identity, as hashing a kernel takes Triton as long as a launch should; kept here, so that it stays its own.
        self._kernels: dict[int, tuple[Any, frozenset[str]]] = {}

    def _key(self, kernel: Any, device: int, arguments: Mapping[str, Any]) -> tuple[Any, ...]:
        """Constants, and of run-time arguments what Triton may assume of them.

        That is the dtype of a tensor and whether its address is a multiple of 16; whether an integer is 1, a multiple
        of 16, or needs 64 bits.
        """
        if id(kernel) not in self._kernels:
            names = frozenset(parameter.name for parameter in kernel.params if not parameter.is_constexpr)
            self._kernels[id(kernel)] = kernel, names
        run_time = self._kernels[id(kernel)][1]
        parts: list[Any] = [id(kernel), device]
        for name, value in arguments.items():
            if isinstance(value, Tensor):
                parts.append((value.dtype, value.data_ptr() % 16 == 0))
            elif name in run_time:
                parts.append((value == 1, value % 16 == 0, value.bit_length() > 31))
            else:
                parts.append(value)
        return tuple(parts)

    def launch(self, kernel: Any, grid: tuple[int, ...], device: int, arguments: Mapping[str, Any]) -> None:
        """``kernel[grid](**arguments)``, by the handle of an earlier launch where there is one."""
        key = self._key(kernel, device, arguments)
        compiled = self._compiled.get(key)
        if compiled is not None:
            compiled[(*grid, 1, 1)[:3]](*[arguments[name] for name in kernel.arg_names])
            return
        if len(self._compiled) >= self.MOST:
            self._compiled.clear()
        self._compiled[key] = kernel[grid](**arguments)


_handles = Handles()


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
        device = next((value.get_device() for value in arguments.values() if isinstance(value, Tensor)), -1)
        try:
            with _on_device(device):
                if in_interpreter():
                    kernel[grid](**arguments)
                else:
                    _handles.launch(kernel, grid, device, arguments)
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
