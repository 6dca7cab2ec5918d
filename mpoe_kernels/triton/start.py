"""The one place where kernels start: on the GPU of their tensors, and with an error that says what
did not fit."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from mpoe_kernels.backends import BackendError
from mpoe_kernels.contract import may_round_to_tf32
from mpoe_kernels.contract.timing import SETTING, is_traced, several_ranks
from mpoe_kernels.triton.architecture import in_interpreter
from mpoe_kernels.triton.device_functions import COUNTS


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def row_tiles(rows: int, tile_rows: int, experts: int) -> int:
    """At most so many tiles of rows of one expert, or of none, are there; 0 without rows."""
    if rows == 0:
        return 0
    return cdiv(rows, tile_rows) + experts + 1


def power_of_two(n: int) -> int:
    """Smallest power of two that is at least ``n``."""
    return 1 << max(n - 1, 0).bit_length()


def dense(tensor: Tensor | None) -> Tensor | None:
    """The tensor, or a contiguous copy; None for None, which kernels take for what is missing."""
    if tensor is None:
        return None
    return tensor.contiguous()


def precision(dtype: torch.dtype) -> str:
    """The precision of float32 products, following PyTorch's setting."""
    if may_round_to_tf32(dtype):
        return "tf32"
    return "ieee"


def _on_device(index: int) -> AbstractContextManager[Any]:
    """Makes the GPU of the tensors the current one: Triton launches on the current one, wherever
    its arguments are."""
    if index < 0 or index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(index)


def _device_of(arguments: Mapping[str, Any]) -> int:
    """Number of the GPU; -1: the CPU."""
    for value in arguments.values():
        if isinstance(value, Tensor):
            return value.get_device()
    return -1


def _launch(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
    """Tests replace this, see `mpoe_kernels.testing.launches`."""
    with _on_device(_device_of(arguments)):
        kernel[grid](**arguments)


def start(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
    """Launch ``kernel[grid](**arguments)`` on the device of its tensors. An empty grid is no
    launch.

    Products and sums are fused (one rounding each), whatever the default of the installed Triton
    is.

    Raises:
        BackendError: the device has too little of a resource (shared memory or registers) for the
            kernel.
    """
    if 0 in grid:
        return
    arguments["enable_fp_fusion"] = True
    try:
        _launch(kernel, grid, arguments)
    except OutOfResources as error:
        blocks = {}
        for name, value in arguments.items():
            if isinstance(value, int) and name.startswith("B"):
                blocks[name] = value
        raise BackendError(
            f"backend 'triton' cannot run {kernel.__name__} with {blocks}: it needs "
            f"{error.required} of {error.name}; this device has {error.limit}"
        ) from error


Options = Mapping[str, int]  # constants, ``num_warps`` and ``num_stages`` of a launch


class Tile(NamedTuple):
    """Blocks and warps of a launch: rows, columns and inner size of a program's products."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int = 2

    def within(self, columns: int, inner: int) -> Tile:
        """For products that may be smaller; 16 is the least that tensor cores take."""
        most_columns = max(16, power_of_two(columns))
        most_inner = max(16, power_of_two(inner))
        return self._replace(
            columns=min(self.columns, most_columns), inner=min(self.inner, most_inner)
        )

    def shared_bytes(self, dtype: torch.dtype) -> int:
        """Shared memory of the operands' blocks in all stages."""
        return self.stages * self.inner * (self.rows + self.columns) * dtype.itemsize

    @property
    def options(self) -> Options:
        """Arguments of a launch."""
        blocks = {"BM": self.rows, "BN": self.columns, "BK": self.inner}
        return {**blocks, "num_warps": self.warps, "num_stages": self.stages}


@lru_cache(maxsize=4096)
def fitted(tiles: tuple[Tile, ...], columns: int, inner: int) -> tuple[Options, ...]:
    """Options of tiles for products that may be smaller."""
    return tuple([tile.within(columns, inner).options for tile in tiles])


def _may_time() -> bool:
    """Not where results must not depend on a clock, nor in the interpreter."""
    return not (
        in_interpreter()
        or os.environ.get(SETTING, "1") == "0"
        or several_ranks()
        or torch.are_deterministic_algorithms_enabled()
    )


def _first(ways: Sequence[Options]) -> Options:
    """The way without timing. Tests replace this, see `mpoe_kernels.testing.launches`."""
    return ways[0]


_FASTEST: dict[tuple[Any, ...], Options] = {}
HOLD = 500_000  # cycles: the GPU waits while the CPU starts what is timed
RUNS = 5


def _problem(kernel: Any, ways: Sequence[Options], arguments: Mapping[str, Any]) -> tuple[Any, ...]:
    """Everything that decides which way is the fastest: the card, dtypes, widths and constants as
    they are, and by their power of two the tensors' rows and other numbers that grow with the
    tokens."""
    key: list[Any] = [kernel, _device_of(arguments)]
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            key += value.dtype, value.shape[0].bit_length()
        else:
            key.append(value.bit_length() if name in COUNTS else value)
    key += [tuple(way.values()) for way in ways]
    return tuple(key)


def _milliseconds(run: Callable[[], None]) -> float:
    """Of a launch on the current stream: the shortest of some, after one that compiles and
    loads."""
    run()
    shortest = math.inf
    for _ in range(RUNS):
        begin = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(HOLD)
        begin.record()
        run()
        end.record()
        end.synchronize()
        shortest = min(shortest, begin.elapsed_time(end))
    return shortest


def _fastest(
    kernel: Any,
    grid: Callable[[Mapping[str, int]], tuple[int, ...]],
    ways: Sequence[Options],
    arguments: Any,
) -> Options:
    """Times every way, launched as it will be later: so every module is loaded before a graph is
    captured.

    Raises:
        BackendError: no way fits the device.
    """
    refused: BackendError | None = None
    times: list[float] = []
    with _on_device(_device_of(arguments)):
        for way in ways:
            try:
                launch = partial(start, kernel, grid(way), **arguments, **way)
                times.append(_milliseconds(launch))
            except BackendError as error:
                refused = error
                times.append(math.inf)
    least = min(times)
    if refused is not None and least == math.inf:
        raise refused
    return ways[times.index(least)]


def start_best(
    kernel: Any,
    grid: Callable[[Mapping[str, int]], tuple[int, ...]],
    ways: Sequence[Options],
    **arguments: Any,
) -> None:
    """`start` in the way that was the fastest for such a problem; in the first one where nothing
    may be timed.

    Args:
        kernel: with the constants of the ways; a launch may be repeated without another result.
        grid: from a way's constants.
        ways: all of which fit the device.
        arguments: the kernel's others; those named in `COUNTS` grow with the tokens.

    Raises:
        BackendError: as `start`.
    """
    chosen = _first(ways)
    if len(ways) > 1 and _may_time() and 0 not in grid(chosen):
        problem = _problem(kernel, ways, arguments)
        fastest = _FASTEST.get(problem)
        if fastest is None and not is_traced():
            fastest = _FASTEST[problem] = _fastest(kernel, grid, ways, arguments)
        chosen = fastest or chosen
    start(kernel, grid(chosen), **arguments, **chosen)
