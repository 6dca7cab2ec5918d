"""Launches of Triton kernels that are recorded instead of made, for tests and tools; needs no
GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from torch import Tensor

from mpoe_kernels.linear.triton import fused_tiles, grouped
from mpoe_kernels.triton import architecture, start


@dataclass(frozen=True)
class Launch:
    """A recorded launch: the kernel, its grid, and every argument by name (options such as
    num_warps included)."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]

    @property
    def name(self) -> str:
        """Name of the kernel's function."""
        return self.kernel.fn.__name__


def _only(entry: int, table: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """The table with this entry alone."""

    def one(*arguments: Any) -> tuple[Any, ...]:
        entries = table(*arguments)
        first = min(entry, len(entries) - 1)
        return entries[first:][:1]

    return one


@contextmanager
def recorded(name: str, tile: int | None = None) -> Iterator[list[Launch]]:
    """Record launches as they would be on an architecture (see `ARCHITECTURES`); tensors may be
    ``meta`` ones.

    Args:
        name: of the architecture.
        tile: take this entry of every kernel's table of tiles (the last one of shorter tables)
            instead of the one for the problem.

    Raises:
        ValueError: an unknown architecture.
    """
    target = architecture.target_named(name)
    launches = list[Launch]()

    def record(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
        # Other objects of the same memory: autograd copies a gradient that somebody else holds.
        kept = {
            key: value.detach() if isinstance(value, Tensor) else value
            for key, value in arguments.items()
        }
        launches.append(Launch(kernel, grid, kept))

    with ExitStack() as patches:
        patches.enter_context(patch.object(architecture, "target_of", lambda _: target))
        patches.enter_context(patch.object(start, "_launch", record))
        patches.enter_context(patch.object(start, "_may_time", lambda: False))
        if tile is not None:
            patches.enter_context(
                patch.object(start, "_first", lambda tiles: tiles[min(tile, len(tiles) - 1)])
            )
            for module, table in ((grouped, "shipped_tiles"), (fused_tiles, "shipped_fused")):
                patches.enter_context(
                    patch.object(module, table, _only(tile, getattr(module, table)))
                )
        yield launches
