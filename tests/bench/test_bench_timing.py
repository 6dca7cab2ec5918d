"""Interleaving and memory, on functions whose times and allocations are known."""

from types import SimpleNamespace

import pytest
import torch
from mpoe_bench.contender import peak_memory, resident_peak
from mpoe_bench.run import Budget, facts_of, in_turn
from mpoe_bench.test_bench import add_to_row, seconds_of


class Machine:
    """A clock that functions move by hand, and that slows down for all alike; and what stands for
    pytest-benchmark."""

    def __init__(self, drift=0.0):
        self.now, self.drift, self.log = 0.0, drift, []
        self.stats = SimpleNamespace(iterations=1, stats=SimpleNamespace(data=[]))

    def function(self, name, seconds):
        def run():
            self.log.append(name)
            self.now += seconds * (1.0 + self.drift * self.now)

        return run

    def pedantic(self, function, setup, rounds):
        for _ in range(rounds):
            setup()
            start = self.now
            function()
            self.stats.stats.data.append((self.now - start) / self.stats.iterations)

    def timed(self, budget, **seconds):
        functions = {name: self.function(name, each) for name, each in seconds.items()}
        return in_turn(self, functions, budget, lambda: self.now)


def test_a_drifting_machine_hardly_moves_the_ratio():
    machine = Machine(drift=0.01)
    samples = machine.timed(Budget(60.0, sample=0.0), ours=2.0, dense=1.0)
    facts = facts_of(samples["ours"], samples["dense"], tokens=8)
    assert facts["x"] == pytest.approx(2.0, rel=0.03)
    assert 1.0 + machine.drift * machine.now > 1.5  # although it became much slower
    assert facts["low"] <= facts["x"] <= facts["high"]
    assert facts["tokens_per_second"] == 8 / facts["seconds"]


def test_rounds_alternate_and_quick_functions_repeat_within_a_sample():
    machine = Machine()
    samples = machine.timed(Budget(3.0, 3, 4, 0.5), quick=0.1, slow=1.0)
    assert machine.log[:2] == ["quick", "slow"]  # sizing
    assert machine.log[2:14] == ["slow", *["quick"] * 5] * 2
    assert samples["quick"] == pytest.approx([0.1] * 4)
    assert samples["slow"] == pytest.approx([1.0] * 4)


def test_peak_counts_temporaries_and_kept_counts_the_result():
    size = 1 << 20  # float32: 4 MiB

    def work():
        first = torch.ones(size)
        second = first + 1.0
        del first
        return second[: size // 2].clone()  # second and the clone

    memory, result = peak_memory(work)
    assert result.numel() == size // 2
    assert memory["peak"] == pytest.approx(8 * size, rel=0.01)  # first and second
    assert memory["kept"] == pytest.approx(2 * size, rel=0.01)


def test_resident_memory_sees_what_torch_does_not_allocate():
    count = 32 << 20

    def work():
        return sum(bytearray(b"\1" * count)[:: 1 << 20])  # two copies, from the system's allocator

    work()
    if resident_peak(work) is None:
        pytest.skip("this system does not tell a process's peak of resident memory")
    assert peak_memory(work)[0]["peak"] < count / 4
    assert peak_memory(work, resident=True)[0]["peak"] == pytest.approx(2 * count, rel=0.2)


def test_a_choice_is_judged_by_all_phases_of_its_case():
    section = {"rows": []}
    samples = {"chain": [1.0, 2.0, 3.0], "rebuild": [0.5, 1.0, 6.0]}
    seconds = seconds_of(samples, "chain")
    assert seconds == {"chain": 2.0, "rebuild": 1.0}  # ratios .5, .5 and 2
    add_to_row(section, "a", "forward", chosen="chain", seconds=seconds)
    add_to_row(section, "b", "forward", chosen="rebuild", seconds=seconds)
    add_to_row(section, "a", "backward", chosen="rebuild", seconds={"chain": 4.0, "rebuild": 5.0})
    first, second = section["rows"]
    assert first["chosen"] == {"forward": "chain", "backward": "rebuild"}
    assert first["ratio"] == (2.0 + 5.0) / (1.0 + 4.0)
    assert (second["name"], second["ratio"]) == ("b", 1.0)
