"""CUDA graphs: what synchronises is never captured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

Function = Callable[[], object]


class CaptureError(RuntimeError):
    """A capture failed after it had begun.

    PyTorch then leaves the device's random generator and allocator capturing: anything that the process does with them
    from then on fails.
    """


@contextmanager
def synchronising_refused() -> Iterator[None]:
    """Inside the block PyTorch raises RuntimeError where it would wait for the device."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def graphed(function: Function) -> Callable[[], None]:
    """``function`` captured in a CUDA graph: launch overhead vanishes. Its inputs must keep their storage.

    It is called four times before: kernels are compiled, and synchronisation is detected while nothing is captured.

    Raises:
        RuntimeError: the function synchronises; nothing was captured.
        CaptureError: it cannot be captured for another reason.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
        with synchronising_refused():
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            function()
    except RuntimeError as error:
        raise CaptureError(f"the capture of a CUDA graph failed: {error}") from error
    return graph.replay
