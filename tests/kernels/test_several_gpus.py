"""Two different GPUs, mocked: costs, tables and launches follow the tensors' GPU, not the current one."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mpoe_kernels.planner.device import forget

from mpoe_kernels import choice, measured, registry
from mpoe_kernels.backends.cuda import CUDA
from mpoe_kernels.backends.eager import EAGER
from mpoe_kernels.contract import HARDWARE, BlockDims, contraction, hardware_of
from mpoe_kernels.linear.call import ForwardCall
from mpoe_kernels.linear.cuda.cost import ways
from mpoe_kernels.linear.cuda.kernels import LinearKernels
from mpoe_kernels.linear.cuda.panels import Panel
from mpoe_kernels.testing.cases import SMALL_SHAPES, random_blocks
from mpoe_kernels.triton import architecture

from .backend_cases import candidate_backend

NAMES = ("NVIDIA A100-SXM4-80GB", "NVIDIA B200")
CAPABILITIES = ((8, 0), (10, 0))
DIMS = BlockDims(8, 8, 64, 12, 48, 64, 8, 8, 768, 3072)
Seconds = Callable[[Any], float]


def _index(device: Any = None) -> int:
    found = torch.device("cuda" if device is None else device)
    return found.index or 0


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch):
    """cuda:0 is current, cuda:1 is a different card."""
    questions = (architecture.gpu_available, architecture._gpu_architecture, architecture._gpu)

    def forget_all() -> None:
        forget()
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


def test_numbers_of_the_card(gpus: None) -> None:
    assert hardware_of("cuda") == hardware_of("cuda:0") == HARDWARE["a100"]
    assert hardware_of(torch.device("cuda:1")) == HARDWARE["b200"]


@pytest.mark.parametrize("phase", ["forward", "backward"])
@pytest.mark.parametrize("backend", [EAGER, CUDA], ids=lambda backend: backend.name)
def test_predicted_times(gpus: None, backend: registry.Backend, phase: str) -> None:
    def seconds(device: str) -> float:
        plan = contraction("rebuild", DIMS, 8, 4096, torch.bfloat16, phase, device=device)
        return min(candidate.seconds for candidate in backend.candidates(plan))

    assert seconds("cuda") == seconds("cuda:0") > seconds("cuda:1") > 0


def test_shared_memory(gpus: None) -> None:
    assert architecture.target_of(torch.device("cuda:0")) == ("sm_80", 163 << 10, 108)
    assert architecture.target_of(torch.device("cuda:1")) == ("sm_100", 227 << 10, 148)


def test_measured_times(gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "_tables", lambda: {NAMES[1]: {"key": [(1, 1.0)]}})
    assert measured.table_here("cuda:1") == {"key": [(1, 1.0)]}
    assert measured.table_here("cuda:0") == measured.table_here("cpu") == {}


def test_a_choice_is_remembered_for_its_card_alone(gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = {"grouped_mpo_linear": lambda: None}
    first = candidate_backend("first", kernels, lambda plan: 1.0 if plan.device == "cuda:0" else 3.0)
    second = candidate_backend("second", kernels, lambda _: 2.0)
    monkeypatch.setattr(registry, "BACKENDS", {"first": first, "second": second})
    arguments = ("grouped_mpo_linear", DIMS, 8, 64, torch.bfloat16)
    assert choice.resolve_contraction(choice.Problem(*arguments, "cuda:0")).backend == "first"
    assert choice.resolve_contraction(choice.Problem(*arguments, "cuda:1")).backend == "second"


class OnSecondGpu(torch.Tensor):
    """A tensor that says it is on cuda:1."""

    def get_device(self) -> int:
        return 1


def on_gpu(*size: int) -> torch.Tensor:
    return torch.empty(size, dtype=torch.bfloat16).as_subclass(OnSecondGpu)


def test_the_form_of_a_cuda_kernel(gpus: None) -> None:
    shape, launched = SMALL_SHAPES["light"], []

    def note(name: str) -> Callable[..., None]:
        return lambda *_: launched.append(name)

    def hardware(device: str):
        assert device == "cuda:1"
        return HARDWARE["b200"]

    made = random_blocks(shape, 2, torch.float32)
    x, offsets = torch.zeros(3, shape.in_features), torch.tensor([0, 1, 3], dtype=torch.int32)
    given = (x, made.left, made.central, made.right, offsets, None, None, shape.in_features, shape.out_features)
    call = ForwardCall(*given, "none", "rebuild", "cuda", True)  # the plan's device counts
    plan = contraction("rebuild", call.dims, 2, 3, torch.bfloat16, "forward", device="cuda:1")
    names = ("contract_steps", "panel_product")
    kernels = LinearKernels(SimpleNamespace(**{name: note(name) for name in names}), hardware)
    for candidate in kernels.candidates("cuda", plan):
        candidate.run(call)
    assert launched == list(names)
    assert [type(way.cut) for way in ways(plan, HARDWARE["b200"])] == [type(None), Panel]


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
