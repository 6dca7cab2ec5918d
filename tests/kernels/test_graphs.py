"""Capturing CUDA graphs, with torch.cuda mocked: functions that synchronise are never captured."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext

import pytest
import torch
from mpoe_bench.graphs import CaptureError, graphed


class Device:
    """Records events, and whether functions that synchronise are refused."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []
        self.mode: int | str = 0
        stream = type("Stream", (), {"wait_stream": lambda self, other: None})
        monkeypatch.setattr(torch.cuda, "Stream", stream)
        monkeypatch.setattr(torch.cuda, "current_stream", stream)
        monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
        monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: self.mode)
        monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: setattr(self, "mode", mode))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: self)
        monkeypatch.setattr(torch.cuda, "graph", self.capture)

    @contextmanager
    def capture(self, graph: object):
        self.events.append("capture")
        yield
        self.events.append("captured")

    def replay(self) -> None:
        self.events.append("replay")

    def call(self) -> None:
        self.events.append("call")

    def synchronise(self) -> None:
        self.call()
        if self.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    return Device(monkeypatch)


def test_a_graph_is_captured_once_and_replayed(device: Device) -> None:
    replay = graphed(device.call)
    assert device.events == [*["call"] * 4, "capture", "call", "captured"]
    replay()
    assert device.events[-1] == "replay"
    assert device.mode == 0


def test_what_synchronises_is_refused_before_anything_is_captured(device: Device) -> None:
    with pytest.raises(RuntimeError, match="synchronizing") as caught:
        graphed(device.synchronise)
    assert not isinstance(caught.value, CaptureError), "the process is as good as before"
    assert "capture" not in device.events
    assert device.mode == 0


def test_a_capture_that_breaks_off_has_an_error_of_its_own(device: Device) -> None:
    def function() -> None:
        if "capture" in device.events:
            raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(CaptureError, match="a CUDA graph failed: operation not permitted"):
        graphed(function)
