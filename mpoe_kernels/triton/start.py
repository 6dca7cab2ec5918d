"""The one place where kernels start: on the GPU of their tensors, and with an error that says what did not fit."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from mpoe_kernels.backends import BackendError
from mpoe_kernels.contract import may_round_to_tf32
from mpoe_kernels.contract.autotune import SETTING, is_traced, several_ranks
from mpoe_kernels.triton.architecture import in_interpreter


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


def _device_of(arguments: Mapping[str, Any]) -> int:
    """Number of the GPU; -1: the CPU."""
    return next((value.get_device() for value in arguments.values() if isinstance(value, Tensor)), -1)


def _launch(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
    """Tests replace this, see `mpoe_kernels.testing.launches`."""
    with _on_device(_device_of(arguments)):
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


Options = dict[str, int]  # constants, ``num_warps`` and ``num_stages`` of a launch


class Tile(NamedTuple):
    """Blocks and warps of a launch: rows, columns and inner size of a program's products."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int = 2

    def within(self, columns: int, inner: int) -> Tile:
        """For products that may be smaller; 16 is the least that tensor cores take."""
        least = [max(16, power_of_two(size)) for size in (columns, inner)]
        return self._replace(columns=min(self.columns, least[0]), inner=min(self.inner, least[1]))

    def shared_bytes(self, dtype: torch.dtype) -> int:
        """Shared memory of the operands' blocks in all stages."""
        return self.stages * self.inner * (self.rows + self.columns) * dtype.itemsize

    @property
    def options(self) -> Options:
        """Arguments of a launch."""
        blocks = {"BM": self.rows, "BN": self.columns, "BK": self.inner}
        return {**blocks, "num_warps": self.warps, "num_stages": self.stages}


def _may_time() -> bool:
    """Not where results or what is recorded must not depend on a clock, nor in the interpreter."""
    return not (
        in_interpreter()
        or os.environ.get(SETTING, "1") == "0"
        or several_ranks()
        or torch.are_deterministic_algorithms_enabled()
        or is_traced()
    )


def _first(ways: Sequence[Options]) -> Options:
    """The way without timing. Tests replace this, see `mpoe_kernels.testing.launches`."""
    return ways[0]


@lru_cache(maxsize=4096)
def _tuner(kernel: Any, ways: tuple[tuple[tuple[str, int], ...], ...], names: tuple[str, ...]) -> Any:
    configs = []
    for way in map(dict, ways):
        launched = {name: way.pop(name) for name in ("num_warps", "num_stages")}
        configs.append(triton.Config(way, **launched))
    counters = [name for name in ("tickets", "done") if name in kernel.arg_names]  # see `SortedSlots.turns`
    return triton.autotune(configs, key=list(names), reset_to_zero=counters)(kernel)


def start_best(
    kernel: Any, grid: Callable[[Mapping[str, int]], tuple[int, ...]], ways: Sequence[Options], **arguments: Any
) -> None:
    """`start` in the way that `triton.autotune` finds fastest; in the first one where nothing may be timed.

    Args:
        kernel: with the constants of the ways.
        grid: from a way's constants.
        ways: all of which fit the device.
        arguments: the kernel's others. One choice holds for all calls with the same constants.
    """
    first = _first(ways)
    if len(ways) == 1 or not _may_time() or 0 in grid(first):
        start(kernel, grid(first), **arguments, **first)
        return
    names = tuple(name for name, value in arguments.items() if name.isupper() and not isinstance(value, Tensor))
    tuner = _tuner(kernel, tuple(tuple(way.items()) for way in ways), names)
    with _on_device(_device_of(arguments)):
        tuner[grid](**arguments, enable_fp_fusion=True)
