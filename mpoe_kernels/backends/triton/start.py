"""The one place where kernels start, so that a tool can record launches instead of making them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

from mpoe_kernels.backends.triton import architecture


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
    launches: list[Launch] = field(default_factory=list)


_recording: ContextVar[Recording | None] = ContextVar("mpoe_triton_recording", default=None)


@contextmanager
def recorded(name: str) -> Iterator[list[Launch]]:
    """Record launches as they would be on ``name`` (see `ARCHITECTURES`); tensors may be ``meta`` ones."""
    if name not in architecture.ARCHITECTURES:
        raise ValueError(f"architecture must be one of {architecture.ARCHITECTURES}; got {name!r}")
    recording = Recording(name)
    token = _recording.set(recording)
    try:
        yield recording.launches
    finally:
        _recording.reset(token)


def architecture_of(device: torch.device) -> str:
    """Key of the configuration tables for tensors on ``device``, or the recorded architecture."""
    recording = _recording.get()
    return architecture.architecture_of(device) if recording is None else recording.architecture


def start(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
    """Launch ``kernel[grid](**arguments)``, unless launches are being recorded. An empty grid is no launch."""
    if 0 in grid:
        return
    recording = _recording.get()
    if recording is None:
        kernel[grid](**arguments)
    else:
        recording.launches.append(Launch(kernel, grid, arguments))
