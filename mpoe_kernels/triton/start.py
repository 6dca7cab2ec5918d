"""The one place where kernels start, so that a tool can record launches instead of making them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime import driver
from triton.runtime.errors import OutOfResources

from mpoe_kernels.registry import BackendError
from mpoe_kernels.triton import architecture
from mpoe_kernels.triton.architecture import in_interpreter

INTERPRETED = in_interpreter()  # decided for good when Triton was imported


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
    """Launches for a device, or for an architecture that need not be present."""

    target: architecture.Target
    device: torch.device | None = None
    tile: int | None = None
    launches: list[Launch] = field(default_factory=list)


# The current recording, if launches are recorded instead of made.
recording: ContextVar[Recording | None] = ContextVar("mpoe_triton_recording", default=None)


@contextmanager
def _into(found: Recording) -> Iterator[list[Launch]]:
    token = recording.set(found)
    try:
        yield found.launches
    finally:
        recording.reset(token)


def recorded(name: str, tile: int | None = None) -> AbstractContextManager[list[Launch]]:
    """Record launches as they would be on ``name`` (see `ARCHITECTURES`); tensors may be ``meta`` ones.

    ``tile``: take this entry of every kernel's table of tiles instead of the one for the problem.
    """
    if name not in architecture.ARCHITECTURES:
        raise ValueError(f"architecture must be one of {architecture.ARCHITECTURES}; got {name!r}")
    return _into(Recording(architecture.target_named(name), tile=tile))


def recorded_for(device: torch.device) -> AbstractContextManager[list[Launch]]:
    """Record launches as they would be on a device of this machine, while tensors are ``meta`` ones."""
    return _into(Recording(architecture.target_of(device), device))


def planning() -> bool:
    """Whether launches are recorded for replay on this machine."""
    current = recording.get()
    return current is not None and current.device is not None


def device_of(tensor: Tensor) -> torch.device:
    """The device of a tensor, or the one that it would have if launches were not recorded."""
    current = recording.get()
    return tensor.device if current is None or current.device is None else current.device


def architecture_of(device: torch.device) -> str:
    """Key of the configuration tables for tensors on ``device``, or the recorded architecture."""
    return target_of(device).architecture


def target_of(device: torch.device) -> architecture.Target:
    """The target of kernels for tensors on ``device``, or the recorded target."""
    current = recording.get()
    return architecture.target_of(device) if current is None else current.target


def recorded_tile() -> int | None:
    """Entry of the tables of tiles that a recording requests."""
    current = recording.get()
    return None if current is None else current.tile


def _on_device(index: int) -> AbstractContextManager[Any]:
    """Makes the GPU of the tensors the current one: Triton launches on the current one, wherever its arguments are."""
    return nullcontext() if index < 0 or index == torch.cuda.current_device() else torch.cuda.device(index)


class Handles:
    """Cache of compiled kernels, keyed by everything that Triton specialises on.

    Triton binds and hashes every argument at each launch, which takes longer than small kernels run.
    """

    MOST = 8192

    def __init__(self) -> None:
        self._compiled: dict[tuple[Any, ...], Any] = {}
        # By identity, as hashing a kernel takes Triton as long as a launch should; kept here, so that it stays its own.
        self._kernels: dict[int, tuple[Any, frozenset[str]]] = {}

    def _key(self, kernel: Any, device: int, arguments: Mapping[str, Any]) -> tuple[Any, ...]:
        """Cache key: constants, and the properties of run-time arguments that Triton specialises on.

        These are the dtype of a tensor and whether its address is a multiple of 16; whether an integer is 1, a multiple
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

    def launch(self, kernel: Any, grid: tuple[int, ...], device: int, arguments: Mapping[str, Any]) -> Any:
        """``kernel[grid](**arguments)``, by the handle of an earlier launch if there is one; returns the handle."""
        key = self._key(kernel, device, arguments)
        compiled = self._compiled.get(key)
        if compiled is not None:
            compiled[(*grid, 1, 1)[:3]](*[arguments[name] for name in kernel.arg_names])
            return compiled
        if len(self._compiled) >= self.MOST:
            self._compiled.clear()
        self._compiled[key] = compiled = kernel[grid](**arguments)
        return compiled


_handles = Handles()


def _memory(size: int, alignment: int, stream: int | None) -> Tensor:
    """Memory for a kernel's descriptors while it runs, on the current device; PyTorch's memory is aligned to 512
    bytes."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def _with_memory(run: Callable[..., Any], *values: Any, stream: int | None) -> Any:
    """Start a kernel that has descriptors; in every thread, as Triton keeps the allocator in a context."""
    triton.set_allocator(_memory)
    return run(*values, stream=stream)


def _launch(kernel: Any, grid: tuple[int, ...], device: int, arguments: Mapping[str, Any]) -> Any:
    """Start a kernel on a device that is the current one; returns its handle, in the interpreter None.

    Raises:
        BackendError: see `start`.
    """
    try:
        if INTERPRETED:
            return kernel[grid](**arguments)
        if arguments.get("BY_DESCRIPTOR"):
            triton.set_allocator(_memory)
        return _handles.launch(kernel, grid, device, arguments)
    except OutOfResources as error:
        blocks = {name: value for name, value in arguments.items() if isinstance(value, int) and name.startswith("B")}
        raise BackendError(
            f"backend 'triton' cannot run {kernel.__name__} with {blocks}: it needs {error.required} of "
            f"{error.name}; this device has {error.limit}"
        ) from error


def start(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
    """Launch ``kernel[grid](**arguments)`` on the device of its tensors, unless launches are being recorded.

    An empty grid is no launch.

    Raises:
        BackendError: the device has too little of a resource (shared memory or registers) for the kernel.
    """
    if 0 in grid:
        return
    current = recording.get()
    if current is not None:
        current.launches.append(Launch(kernel, grid, arguments))
        return
    device = next((value.get_device() for value in arguments.values() if isinstance(value, Tensor)), -1)
    with _on_device(device):
        _launch(kernel, grid, device, arguments)


class Step:
    """A launch that is replayed, each time with other tensors.

    Its first start finds the compiled kernel; later ones pass it addresses and bypass Triton's checks. So tensors must
    keep the properties that Triton specialised on: dtype, and address modulo 16.
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        arguments: dict[str, Any],
        places: Mapping[str, tuple[int, int, torch.dtype]],
    ) -> None:
        """``places``: of the arguments that are tensors; number of the tensor, and the byte of it where they begin."""
        self._arguments = [arguments[name] for name in kernel.arg_names]
        self._addresses = [(kernel.arg_names.index(name), *place[:2]) for name, place in places.items()]
        self._run: Any = None
        self._first: tuple[Any, ...] | None = kernel, grid, arguments, places  # what the handle makes needless

    def start(self, tensors: Sequence[Tensor], addresses: Sequence[int], device: int, stream: int | None) -> None:
        """``addresses``: the tensors' addresses. Their device must be the current one."""
        first = self._first
        if first is not None:
            kernel, grid, arguments, places = first
            views = {name: _view(tensors[number], begin, dtype) for name, (number, begin, dtype) in places.items()}
            handle = _launch(kernel, grid, device, {**arguments, **views})
            if handle is not None:
                run = handle[(*grid, 1, 1)[:3]]
                self._run = partial(_with_memory, run) if arguments.get("BY_DESCRIPTOR") else run
                self._first = None
            return
        values = self._arguments.copy()
        for position, number, begin in self._addresses:
            values[position] = addresses[number] + begin
        self._run(*values, stream=stream)


def _view(tensor: Tensor, first: int, dtype: torch.dtype) -> Tensor:
    """What begins at a byte of a tensor, for a kernel that knows the shape."""
    storage, place = tensor.untyped_storage(), tensor.storage_offset() * tensor.itemsize + first
    size = int(place + dtype.itemsize <= storage.nbytes())  # an empty tensor has no address, a longer one gets memory
    return torch.empty(0, dtype=dtype, device=tensor.device).set_(storage, place // dtype.itemsize, (size,), ())


def start_steps(steps: Sequence[Step], tensors: Sequence[Tensor], addresses: Sequence[int]) -> None:
    """Start launches one after the other, with the given tensors, on their device and its current stream."""
    device = tensors[0].get_device()
    with _on_device(device):
        stream = None if INTERPRETED else driver.active.get_current_stream(device)
        for step in steps:
            step.start(tensors, addresses, device, stream)
