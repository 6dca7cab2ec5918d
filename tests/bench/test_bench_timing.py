"""Interleaving and memory, on functions whose times and allocations are known."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from mpoe_bench import memory as measuring
from mpoe_bench.memory import Memory, peak_memory, resident_peak
from mpoe_bench.timing import Budget, interleave


class FakeMachine:
    """A clock that functions move by hand; it slows down as time goes by, for everyone alike."""

    def __init__(self, drift: float) -> None:
        self.now, self.drift, self.log = 0.0, drift, []

    def function(self, name: str, seconds: float):
        def run() -> None:
            self.log.append(name)
            self.now += seconds * (1.0 + self.drift * self.now)

        return run

    def measure(self, function, repeats: int) -> float:
        start = self.now
        for _ in range(repeats):
            function()
        return self.now - start


def test_a_drifting_machine_hardly_moves_the_ratio() -> None:
    machine = FakeMachine(drift=0.01)
    functions = {"dense": machine.function("dense", 1.0), "ours": machine.function("ours", 2.0)}
    timings = interleave(functions, "dense", Budget(seconds_each=60.0, sample_seconds=0.0), machine.measure)
    assert timings["dense"].x == 1.0
    assert timings["ours"].x == pytest.approx(2.0, rel=0.03)
    assert machine.now > 60.0
    assert 1.0 + machine.drift * machine.now > 1.5  # although it became much slower
    assert timings["ours"].low <= timings["ours"].x <= timings["ours"].high


def test_rounds_alternate_and_quick_functions_repeat_within_a_sample() -> None:
    machine = FakeMachine(drift=0.0)
    functions = {"slow": machine.function("slow", 1.0), "quick": machine.function("quick", 0.1)}
    timings = interleave(functions, "slow", Budget(3.0, 0.5, min_rounds=3, max_rounds=4), machine.measure)
    assert machine.log[:2] == ["slow", "quick"]  # sizing
    rounds = machine.log[2:]
    assert rounds[:6] == ["slow", *["quick"] * 5]
    assert rounds[6:12] == [*["quick"] * 5, "slow"]  # the next round starts with the other one
    assert timings["quick"].x == pytest.approx(0.1)
    assert timings["quick"].seconds == pytest.approx(0.1)


def test_what_is_too_slow_for_the_budget_runs_once_beside_the_baseline() -> None:
    machine = FakeMachine(drift=0.0)
    functions = {"dense": machine.function("dense", 1.0), "endless": machine.function("endless", 100.0)}
    timings = interleave(functions, "dense", Budget(5.0, 0.0, min_rounds=3), machine.measure)
    assert timings["endless"].rounds == 1
    assert timings["endless"].x == pytest.approx(100.0)
    assert timings["dense"].rounds == 5


def test_without_a_baseline_there_is_no_ratio() -> None:
    machine = FakeMachine(drift=0.0)
    timing = interleave({"f": machine.function("f", 0.5)}, None, Budget(2.0, 0.0), machine.measure)["f"]
    assert math.isnan(timing.x)
    assert (timing.seconds, timing.low, timing.high) == (0.5, 0.5, 0.5)


def test_an_unknown_baseline_is_refused() -> None:
    with pytest.raises(ValueError, match="baseline must be one of"):
        interleave({"f": int}, "g")


def test_peak_counts_temporaries_and_kept_counts_the_result() -> None:
    size = 1 << 20  # float32: 4 MiB

    def work() -> torch.Tensor:
        first = torch.ones(size)
        second = first + 1.0
        del first
        return second[: size // 2].clone()  # second and the clone

    memory, result = peak_memory(work)
    assert result.numel() == size // 2
    assert memory.peak == pytest.approx(8 * size, rel=0.01)  # first and second
    assert memory.kept == pytest.approx(2 * size, rel=0.01)
    assert memory.temporary == pytest.approx(6 * size, rel=0.01)


def test_resident_memory_sees_what_torch_does_not_allocate() -> None:
    count = 32 << 20

    def work() -> int:
        return sum(bytearray(b"\1" * count)[:: 1 << 20])  # two copies, from the system's allocator

    work()
    memory, _ = peak_memory(work, resident=True)
    if memory.resident is None:
        pytest.skip("this system does not tell a process's peak of resident memory")
    assert memory.peak < count / 4
    assert memory.resident == pytest.approx(2 * count, rel=0.2)
    assert memory.temporary == memory.resident - memory.kept
    assert Memory(peak=5, kept=2, resident=None).temporary == 3


def test_where_the_system_reports_no_memory_the_function_runs_all_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(measuring, "_CLEAR_REFS", tmp_path / "missing" / "clear_refs")
    calls: list[int] = []
    assert resident_peak(lambda: calls.append(1)) is None
    assert calls == [1]


@pytest.mark.parametrize("error", [OSError, AttributeError])
def test_errors_of_the_measured_function_come_through(error: type[Exception]) -> None:
    def fails() -> None:
        raise error("its own")

    with pytest.raises(error, match="its own"):
        resident_peak(fails)
