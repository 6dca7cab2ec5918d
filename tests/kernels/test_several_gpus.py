"""Two different GPUs, mocked: costs, tables and launches follow the tensors' GPU, not the current one."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mpoe_kernels import choice, measured, registry
from mpoe_kernels.backends.cuda import CUDA
from mpoe_kernels.backends.eager import EAGER
from mpoe_kernels.backends.triton import TRITON
from mpoe_kernels.linear.call import ForwardCall
from mpoe_kernels.linear.cuda.cost import ways
from mpoe_kernels.linear.cuda.kernels import LinearKernels
from mpoe_kernels.linear.cuda.panels import Panel
from mpoe_kernels.contract import HARDWARE, BlockDims, contraction, hardware_of
from mpoe_kernels.planner.device import forget
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
    questions = (architecture.gpu_available, architecture._gpu_architecture, architecture._gpu_shared_memory)

    def forget_all() -> None:
        forget()
        for question in questions:
            question.cache_clear()

    def properties(device: Any = None) -> SimpleNamespace:
        optin = 227 << 10 if _index(device) else 163 << 10
        return SimpleNamespace(
            name=NAMES[_index(device)], shared_memory_per_multiprocessor=1 << 18, shared_memory_per_block_optin=optin
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
@pytest.mark.parametrize("backend", [EAGER, TRITON, CUDA], ids=lambda backend: backend.name)
def test_predicted_times(gpus: None, backend: registry.Backend, phase: str) -> None:
    def seconds(device: str) -> float:
        plan = contraction("rebuild", DIMS, 8, 4096, torch.bfloat16, phase, device=device)
        return min(candidate.seconds for candidate in backend.candidates(plan))

    assert seconds("cuda") == seconds("cuda:0") > seconds("cuda:1") > 0


def test_shared_memory(gpus: None) -> None:
    assert architecture.target_of(torch.device("cuda:0")) == ("sm_80", 163 << 10)
    assert architecture.target_of(torch.device("cuda:1")) == ("sm_100", 227 << 10)


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
    params: tuple[object, ...] = ()

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


class Compiled:
    """Stands in for a compiled kernel."""

    def __init__(self, launches: list[object]) -> None:
        self.launches = launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments: self.launches.append((grid, arguments))


class Jit:
    """Stands in for a kernel that Triton compiles at its first launch."""

    __name__, arg_names = "a_kernel", ("x", "rows", "SIZE")
    params = tuple(SimpleNamespace(name=name, is_constexpr=name == "SIZE") for name in arg_names)

    def __init__(self) -> None:
        self.bound: list[dict[str, object]] = []
        self.by_handle: list[object] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Compiled]:
        def launch(**arguments: object) -> Compiled:
            self.bound.append(arguments)
            return Compiled(self.by_handle)

        return launch


def test_a_launch_like_an_earlier_one_goes_by_its_handle() -> None:
    handles = pytest.importorskip("mpoe_kernels.triton.start").Handles()
    jit, x = Jit(), torch.empty(64)
    options = {"num_warps": 4}
    handles.launch(jit, (7,), 0, {"SIZE": 8, "x": x, "rows": 100, **options})
    other = torch.empty(32)
    handles.launch(jit, (9, 2), 0, {"SIZE": 8, "x": other, "rows": 101, **options})  # neither 1 nor a multiple of 16
    assert len(jit.bound) == 1
    ((grid, arguments),) = jit.by_handle
    assert grid == (9, 2, 1)
    assert arguments[0] is other
    assert arguments[1:] == (101, 8)


@pytest.mark.parametrize(
    ("changed", "device"),
    [
        ({"SIZE": 16}, 0),
        ({"rows": 96}, 0),
        ({"rows": 1}, 0),
        ({"rows": 2**31 + 1}, 0),
        ({"x": torch.empty(65)[1:]}, 0),
        ({"x": torch.empty(64, dtype=torch.bfloat16)}, 0),
        ({"num_warps": 8}, 0),
        ({}, 1),
    ],
)
def test_what_is_compiled_apart_has_a_handle_of_its_own(changed: dict[str, object], device: int) -> None:
    handles = pytest.importorskip("mpoe_kernels.triton.start").Handles()
    jit = Jit()
    first = {"SIZE": 8, "x": torch.empty(64), "rows": 100, "num_warps": 4}
    handles.launch(jit, (7,), 0, first)
    handles.launch(jit, (7,), device, first | changed)
    assert len(jit.bound) == 2
    assert not jit.by_handle


def test_old_handles_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    handles = pytest.importorskip("mpoe_kernels.triton.start").Handles()
    monkeypatch.setattr(type(handles), "MOST", 2)
    jit, x = Jit(), torch.empty(64)
    for size in (1, 2, 3, 1):
        handles.launch(jit, (1,), 0, {"SIZE": size, "x": x, "rows": 100})
    assert len(jit.bound) == 4


def test_in_the_interpreter_no_gpu_is_asked_for(events: list[object]) -> None:
    start = pytest.importorskip("mpoe_kernels.triton.start").start
    start(Kernel(events), (1,), x=torch.empty(4))
    assert events == ["launch"]
