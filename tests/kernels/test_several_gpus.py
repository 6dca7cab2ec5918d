"""Two different GPUs, mocked: choices, tiles and launches follow the tensors' GPU, not the current one."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mpoe_kernels.contract import BlockDims
from mpoe_kernels.contract.autotune import _key
from mpoe_kernels.contract.ranking import Problem
from mpoe_kernels.triton import architecture

NAMES = ("NVIDIA A100-SXM4-80GB", "NVIDIA B200")
CAPABILITIES = ((8, 0), (10, 0))
DIMS = BlockDims(8, 8, 64, 12, 48, 64, 8, 8, 768, 3072)


def _index(device: Any = None) -> int:
    found = torch.device("cuda" if device is None else device)
    return found.index or 0


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch):
    """cuda:0 is current, cuda:1 is a different card."""
    questions = (architecture.gpu_available, architecture._gpu_architecture, architecture._gpu)

    def forget_all() -> None:
        for question in questions:
            question.cache_clear()

    def properties(device: Any = None) -> SimpleNamespace:
        optin = 227 << 10 if _index(device) else 163 << 10
        return SimpleNamespace(
            name=NAMES[_index(device)],
            shared_memory_per_multiprocessor=1 << 18,
            shared_memory_per_block_optin=optin,
            multi_processor_count=148 if _index(device) else 108,
        )

    forget_all()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: NAMES[_index(device)])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: CAPABILITIES[_index(device)])
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    yield
    monkeypatch.undo()
    forget_all()


def test_shared_memory(gpus: None) -> None:
    assert architecture.target_of(torch.device("cuda:0")) == ("sm_80", 163 << 10, 108)
    assert architecture.target_of(torch.device("cuda:1")) == ("sm_100", 227 << 10, 148)


def test_a_choice_is_kept_for_its_card_alone(gpus: None) -> None:
    arguments = ("grouped_mpo_linear", DIMS, 8, 64, torch.bfloat16)
    first, second = (_key(Problem(*arguments, f"cuda:{index}")) for index in (0, 1))
    assert NAMES[0] in first
    assert NAMES[1] in second


class OnSecondGpu(torch.Tensor):
    """A tensor that says it is on cuda:1."""

    def get_device(self) -> int:
        return 1


def on_gpu(*size: int) -> torch.Tensor:
    return torch.empty(size, dtype=torch.bfloat16).as_subclass(OnSecondGpu)


class Kernel:
    """Stands in for a Triton kernel and records its launches."""

    __name__ = "a_kernel"

    def __init__(self, events: list[object], error: Exception | None = None) -> None:
        self.events, self.error = events, error

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(**arguments: object) -> None:
            self.events.append("launch")
            if self.error is not None:
                raise self.error

        return launch


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Records changes of the current GPU, initially cuda:0."""
    found: list[object] = []

    def change(index: int) -> int:
        if index >= 0:
            found.append(index)
        return 0 if index >= 0 else -1

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "_exchange_device", change)
    monkeypatch.setattr(torch.cuda, "_maybe_exchange_device", change)
    return found


def test_triton_launches_on_the_gpu_of_its_tensors(events: list[object]) -> None:
    start = pytest.importorskip("mpoe_kernels.triton.start").start
    start(Kernel(events), (1,), SIZE=4, x=on_gpu(4), y=on_gpu(4))
    assert events == [1, "launch", 0]


def test_after_a_failed_launch_the_gpu_is_the_current_one_again(events: list[object]) -> None:
    start = pytest.importorskip("mpoe_kernels.triton.start").start
    with pytest.raises(ZeroDivisionError):
        start(Kernel(events, ZeroDivisionError()), (1,), x=on_gpu(4))
    assert events == [1, "launch", 0]


def test_in_the_interpreter_no_gpu_is_asked_for(events: list[object]) -> None:
    start = pytest.importorskip("mpoe_kernels.triton.start").start
    start(Kernel(events), (1,), x=torch.empty(4))
    assert events == ["launch"]
