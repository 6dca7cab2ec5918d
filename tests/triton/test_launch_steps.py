"""Repeated launches: what a compiled kernel receives, with stand-ins for Triton and its driver."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

start = pytest.importorskip("mpoe_kernels.triton.start")

BFLOAT16 = torch.bfloat16


class Jit:
    """Stands in for a kernel: `bound` holds its launches by Triton's binder, `launched` those by its handle."""

    __name__, arg_names = "a_kernel", ("x", "rows", "SIZE", "out")
    params = tuple(SimpleNamespace(name=name, is_constexpr=name == "SIZE") for name in arg_names)

    def __init__(self) -> None:
        self.bound: list[dict[str, object]] = []
        self.launched: list[tuple[object, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., SimpleNamespace]:
        def launch(**arguments: object) -> Jit:
            self.bound.append(arguments)
            return Handle(self)

        return launch


class Handle:
    def __init__(self, jit: Jit) -> None:
        self.jit = jit

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, stream=None: self.jit.launched.append((grid, arguments, stream))


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "driver", SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda _: 77)))
    monkeypatch.setattr(start, "INTERPRETED", False)
    monkeypatch.setattr(start, "_handles", start.Handles())


def start_all(steps: list[object], tensors: list[torch.Tensor]) -> None:
    start.start_steps(steps, tensors, [tensor.data_ptr() for tensor in tensors])


def step(jit: Jit, grid: tuple[int, ...] = (7, 2)) -> start.Step:
    arguments = {"SIZE": 8, "rows": 100, "x": None, "out": None, "num_warps": 4}
    return start.Step(jit, grid, arguments, {"x": (0, 6, BFLOAT16), "out": (1, 512, torch.float32)})


def test_the_first_start_is_tritons_and_the_others_hand_over_addresses() -> None:
    jit = Jit()
    one = step(jit)
    x, scratch = torch.empty(4, 8, dtype=BFLOAT16), torch.empty(1024, dtype=torch.uint8)
    start_all([one], [x, scratch])
    (bound,) = jit.bound
    assert (bound["SIZE"], bound["rows"], bound["num_warps"]) == (8, 100, 4)
    assert (bound["x"].data_ptr(), bound["x"].dtype) == (x.data_ptr() + 6, BFLOAT16)
    assert (bound["out"].data_ptr(), bound["out"].dtype) == (scratch.data_ptr() + 512, torch.float32)
    assert not jit.launched
    other, memory = torch.empty(4, 8, dtype=BFLOAT16), torch.empty(1024, dtype=torch.uint8)
    start_all([one], [other, memory])
    assert len(jit.bound) == 1
    assert jit.launched == [((7, 2, 1), (other.data_ptr() + 6, 100, 8, memory.data_ptr() + 512), 77)]


@pytest.mark.parametrize("grid", [(7,), (7, 2), (7, 2, 3)])
def test_a_grid_has_three_sizes_when_it_is_started_again(grid: tuple[int, ...]) -> None:
    jit, tensors = Jit(), [torch.empty(4, 8, dtype=BFLOAT16), torch.empty(1024, dtype=torch.uint8)]
    one = step(jit, grid)
    for _ in range(2):
        start_all([one], tensors)
    assert jit.launched[0][0] == {1: (7, 1, 1), 2: (7, 2, 1), 3: (7, 2, 3)}[len(grid)]


def test_a_view_begins_where_its_tensor_does() -> None:
    jit, whole = Jit(), torch.empty(9, 8, dtype=BFLOAT16)
    start_all([step(jit)], [whole[2:], torch.empty(1024, dtype=torch.uint8)])
    assert jit.bound[0]["x"].data_ptr() == whole[2:].data_ptr() + 6


def test_looking_at_an_empty_tensor_gives_it_no_memory() -> None:
    jit, empty = Jit(), torch.empty(0, dtype=BFLOAT16)
    arguments = dict.fromkeys(("x", "out")) | {"SIZE": 8, "rows": 1}
    one = start.Step(jit, (1,), arguments, {"x": (0, 0, BFLOAT16), "out": (0, 0, BFLOAT16)})
    start_all([one], [empty])
    assert empty.untyped_storage().nbytes() == 0


def test_the_last_element_has_an_address() -> None:
    jit, x = Jit(), torch.empty(4, dtype=BFLOAT16)
    start_all([step(jit)], [x, torch.empty(516, dtype=torch.uint8)])
    assert jit.bound[0]["x"].data_ptr() == x.data_ptr() + 6
    assert jit.bound[0]["out"].data_ptr() != 0


def test_threads_do_not_mix_their_tensors() -> None:
    jit = Jit()
    steps = [step(jit) for _ in range(5)]
    start_all(steps, [torch.empty(4, 8, dtype=BFLOAT16), torch.empty(1024, dtype=torch.uint8)])
    pairs = [(torch.empty(4, 8, dtype=BFLOAT16), torch.empty(1024, dtype=torch.uint8)) for _ in range(4)]

    def work(tensors: tuple[torch.Tensor, torch.Tensor]) -> None:
        for _ in range(50):
            start_all(steps, tensors)

    threads = [threading.Thread(target=work, args=(pair,)) for pair in pairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = [(arguments[0], arguments[3]) for _, arguments, stream in jit.launched if stream is not None]
    assert len(found) == 4 * 50 * 5
    assert set(found) == {(x.data_ptr() + 6, scratch.data_ptr() + 512) for x, scratch in pairs}


def test_steps_are_started_on_the_gpu_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(start, "_on_device", lambda index: seen.append(index) or start.nullcontext())
    start_all([], [torch.empty(1)])
    assert seen == [-1]


@pytest.mark.parametrize("descriptor", ["kn", ""])
def test_descriptors_get_memory_at_every_start(descriptor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On every launch, from any thread; a kernel without descriptors asks for none."""
    allocators: list[object] = []
    monkeypatch.setattr(start.triton, "set_allocator", allocators.append)
    jit, tensors = Jit(), [torch.empty(4, 8, dtype=BFLOAT16), torch.empty(1024, dtype=torch.uint8)]
    arguments = {"SIZE": 8, "rows": 100, "x": None, "out": None, "BY_DESCRIPTOR": descriptor}
    one = start.Step(jit, (7, 2), arguments, {"x": (0, 0, BFLOAT16), "out": (1, 0, torch.float32)})
    for count in range(1, 4):
        start_all([one], tensors)
        assert len(allocators) == (count if descriptor else 0)
    assert [stream for _, _, stream in jit.launched] == [77, 77]
