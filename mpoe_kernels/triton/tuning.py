"""Measured choices of tiles, on request: `autotuned` turns them on; otherwise the fixed choice is used.

The first launch of a kernel on sizes of a new class times every candidate of its table; the fastest is kept in
``$XDG_CACHE_HOME/mpoe/triton_tiles.json`` (default ``~/.cache``) under the GPU's name and Triton's version.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import astuple, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch

from mpoe_kernels.contract.kept import cache_file, read_json, write_json
from mpoe_kernels.registry import BackendError
from mpoe_kernels.triton.architecture import in_interpreter
from mpoe_kernels.triton.start import planning

FILE_VERSION = 1
Bench = Callable[[Callable[[], object]], float]  # milliseconds of a launch
T = TypeVar("T")


class UnmeasuredError(Exception):
    """A launch plan needs a choice that was not measured yet; computing with real tensors measures it."""


@dataclass(frozen=True)
class _Tuning:
    bench: Bench | None
    path: Path


# The current tuner; global to the process, because a backward runs in other threads.
active: _Tuning | None = None


@contextmanager
def autotuned(bench: Bench | None = None, path: Path | None = None) -> Iterator[None]:
    """Choose tiles by measurement, in all threads, until the context ends.

    Args:
        bench: times a launch; by default Triton's own bench on a GPU. Without a GPU the choice stays the fixed one.
        path: file of the kept choices.
    """
    global active
    previous, active = active, _Tuning(bench, path or cache_file("triton_tiles.json"))
    try:
        yield
    finally:
        active = previous


def size_class(kernel: str, dtype: torch.dtype, sizes: tuple[float, ...]) -> str:
    """Launches that share a choice: the first size is rounded to a power of two, the others are exact."""
    rows = 1 << max(int(-(-sizes[0] // 1)) - 1, 0).bit_length()
    return " ".join([kernel, str(dtype).removeprefix("torch."), "x".join(f"{size:g}" for size in (rows, *sizes[1:]))])


def choose(
    kernel: str,
    device: torch.device,
    dtype: torch.dtype,
    sizes: tuple[float, ...],
    candidates: Sequence[T],
    launch: Callable[[T], object] | None,
) -> T:
    """The fixed choice ``candidates[0]``, or the fastest of them while `autotuned` holds.

    Args:
        launch: starts the kernel with a candidate, any number of times; ``None``: it must not be repeated.

    Raises:
        UnmeasuredError: launches are recorded, and nothing was kept for these sizes.
    """
    if active is None or launch is None or len(candidates) < 2:
        return candidates[0]
    bench = active.bench or _bench_of(device)
    if bench is None:
        return candidates[0]
    name = f"{_device_name(device)} / triton {version('triton')}"
    key = size_class(kernel, dtype, sizes)
    kept = _read(active.path).get(name, {}).get(key)
    for candidate in candidates:
        if kept == list(astuple(candidate)):  # type: ignore[call-overload]
            return candidate
    if planning():
        raise UnmeasuredError(key)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return candidates[0]
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():  # of the bench's events
        times = [_milliseconds(bench, partial(launch, candidate)) for candidate in candidates]
    winner = candidates[times.index(min(times))]
    _keep(active.path, name, key, list(astuple(winner)))  # type: ignore[call-overload]
    return winner


def _bench_of(device: torch.device) -> Bench | None:
    if device.type != "cuda" or in_interpreter():
        return None
    from triton.testing import do_bench

    return partial(do_bench, warmup=5, rep=20)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _milliseconds(bench: Bench, run: Callable[[], object]) -> float:
    """Infinite if the candidate does not fit on the device."""
    try:
        return bench(run)
    except BackendError:
        return float("inf")


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """Saved choices; an unusable file is ignored."""
    try:
        content = read_json(path)
        if content is None or content.get("version") != FILE_VERSION:
            return {}
        devices = content["devices"]
        if not all(isinstance(choices, dict) for choices in devices.values()):
            raise ValueError("devices must be objects")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        warnings.warn(f"kept tiles in {path} are not used: {error}", stacklevel=2)
        return {}
    return dict(devices)


def _keep(path: Path, name: str, key: str, choice: list[Any]) -> None:
    """Add one choice; choices that another process wrote meanwhile are kept, unless it writes at the same moment."""
    devices = _read(path)
    devices.setdefault(name, {})[key] = choice
    write_json(path, {"version": FILE_VERSION, "devices": devices})
