"""The CPU's constants: measured once before the first choice, stored, taken from a record, and turned off."""

from __future__ import annotations

import json
import logging
import math
import multiprocessing
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import mpoe_kernels.contract.autotune as choice
import mpoe_kernels.registry as registry
from mpoe_kernels import available_backends, info, measure_machine
from mpoe_kernels.contract.autotune import Problem, resolve_contraction
from mpoe_kernels.linear.native import cost
from mpoe_kernels.linear.native import measure as measuring
from mpoe_kernels.contract import BlockDims, contraction, hardware_of, machine
from mpoe_kernels.planner.device import forget, one_core
from mpoe_kernels.planner.machine import Constants, Pair
from mpoe_kernels.planner.measured import cache_file
from mpoe_kernels.testing.cases import workload_shape

DIMS = BlockDims.of_shape(workload_shape("paper_16", 96, 128))
NATIVE = pytest.mark.skipif("native" not in available_backends(), reason="no compiled kernels here")


def constants(tile_rate: float = 1.1, flops: float = 9e10) -> Constants:
    return Constants(Pair(flops, 2 * flops), Pair(5.0, 6.0), Pair(tile_rate, tile_rate), Pair(6e-8, 7e-8))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A private cache folder; the process has measured nothing yet, and is allowed to."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(machine.SETTING, "1")
    forget()
    machine._say.cache_clear()
    yield tmp_path / "mpoe" / "machine.json"
    monkeypatch.undo()
    forget()


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[Constants]:
    """The measurements made, by a stand-in that takes no time."""
    found: list[Constants] = []

    def measure() -> Constants:
        found.append(constants(flops=(len(found) + 1) * 1e10))
        return found[-1]

    monkeypatch.setattr(choice, "_measurer", lambda: measure)
    return found


def choose(dtype: torch.dtype = torch.float32, **how: str) -> registry.Candidate:
    return resolve_contraction(Problem("grouped_mpo_linear", DIMS, 4, 64, dtype, "cpu", **how))


def test_the_first_choice_measures_and_later_ones_do_not(cache: Path, timed: list[Constants]) -> None:
    choose(backend="eager", strategy="rebuild")
    assert not timed, "there was nothing to choose"
    assert hardware_of("cpu") == hardware_of("cpu")
    assert not timed, "printing a plan measures nothing"
    choose()
    choose(torch.bfloat16)
    assert len(timed) == 1
    assert machine.constants() == timed[0]
    here = hardware_of("cpu")
    assert here.flops_per_second(torch.float32) == pytest.approx(1e10 * torch.get_num_threads())
    with machine.using(machine.TABLE):
        table = hardware_of("cpu")
    assert table.flops_per_second(torch.float32) != here.flops_per_second(torch.float32)
    assert table.flops_per_second(torch.float64) == here.flops_per_second(torch.float64), "not measured"
    forget()  # like a later process
    choose()
    assert len(timed) == 1
    assert machine.constants() == timed[0]


def test_off_by_the_setting_and_where_plans_must_not_depend_on_it(
    cache: Path, timed: list[Constants], monkeypatch: pytest.MonkeyPatch
) -> None:
    table = hardware_of("cpu")
    monkeypatch.setenv(machine.SETTING, "0")
    forget()
    choose()
    assert not timed
    assert machine.record()["constants"] is None
    monkeypatch.setenv(machine.SETTING, "1")
    forget()
    torch.use_deterministic_algorithms(True)
    try:
        choose()
        assert not timed
        fixed = hardware_of("cpu")
    finally:
        torch.use_deterministic_algorithms(False)
    choose()
    assert len(timed) == 1
    assert hardware_of("cpu") != table
    torch.use_deterministic_algorithms(True)
    try:
        assert hardware_of("cpu") == fixed, "nor on what was measured before"
        assert machine.record()["constants"] is None
        with machine.using({"constants": machine._as_json(timed[0])}):
            assert hardware_of("cpu") != fixed, "but a record holds"
    finally:
        torch.use_deterministic_algorithms(False)
    monkeypatch.setenv(machine.SETTING, "0")
    forget()
    assert hardware_of("cpu") == table, "nor what is on file"


def test_nothing_is_measured_on_fake_tensors_or_where_no_kernel_is_compiled(
    cache: Path, timed: list[Constants], monkeypatch: pytest.MonkeyPatch
) -> None:
    with FakeTensorMode():
        choose()
    assert not timed
    monkeypatch.setattr(choice, "_measurer", lambda: None)
    choose()
    measure_machine()
    assert machine.constants() is None
    assert not cache.exists()


def test_threads_that_choose_at_once_measure_once(cache: Path, timed: list[Constants]) -> None:
    threads = [threading.Thread(target=choose) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(timed) == 1


@pytest.mark.parametrize(
    "content",
    [
        "{ not json",
        "[]",
        '{"version": 99, "entries": {}}',
        '{"version": 1, "entries": []}',
        '{"version": 1, "entries": {"a processor": {"flops": 3}}}',
        '{"version": 1, "entries": {"a processor": {"flops": {"float32": -1, "bfloat16": 1}}}}',
        '{"version": 1, "entries": {"a processor": null}}',
    ],
)
def test_a_damaged_file_is_measured_anew(
    cache: Path, timed: list[Constants], content: str, caplog: pytest.LogCaptureFixture
) -> None:
    cache.parent.mkdir()
    cache.write_text(content)
    choose()
    assert len(timed) == 1
    assert [record.levelname for record in caplog.records if str(cache) in record.message] == ["WARNING"]
    assert list(json.loads(cache.read_text())["entries"]) == [machine._key()]


def test_entries_of_other_processors_stay_and_are_not_taken(cache: Path, timed: list[Constants]) -> None:
    cache.parent.mkdir()
    theirs = machine._as_json(constants(flops=7e10))
    cache.write_text(json.dumps({"version": machine.VERSION, "entries": {"another processor": theirs}}))
    choose()
    assert machine.constants() == timed[0]
    kept = json.loads(cache.read_text())["entries"]
    assert kept.keys() == {"another processor", machine._key()}
    assert kept["another processor"] == theirs


def test_a_folder_that_cannot_be_written_is_said_once(
    cache: Path, timed: list[Constants], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "mpoe").write_text("a file where the folder would be")
    with pytest.warns(UserWarning, match="calibration .* is ignored"):
        hardware_of("cpu")  # reads the other file in that folder
    with caplog.at_level(logging.WARNING):
        choose()
        choose(torch.bfloat16)
    assert machine.constants() == timed[0], "kept in memory"
    assert len(timed) == 1
    assert sum("cannot be written" in record.message for record in caplog.records) == 1
    assert (tmp_path / "mpoe").is_file()


def _measures(number: int, start: multiprocessing.synchronize.Barrier, answers: multiprocessing.Queue) -> None:
    start.wait()
    for _ in range(20):
        machine.forget()
        machine.measure_once(lambda: constants(flops=1e10 * number))
    answers.put(machine.record())


def test_two_processes_that_measure_at_once_leave_a_whole_file(cache: Path) -> None:
    forking = multiprocessing.get_context("fork")
    start, answers = forking.Barrier(2), forking.Queue()
    processes = [forking.Process(target=_measures, args=(number, start, answers)) for number in (1, 2)]
    for process in processes:
        process.start()
    found = [answers.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert found[0] == found[1] == machine.record(), "both, and who comes later, plan alike"
    assert [path.name for path in cache.parent.iterdir()] == [cache.name], "nothing partial is left"


def test_a_record_is_given_back_and_wins(cache: Path, timed: list[Constants]) -> None:
    given = {"processor": "elsewhere", "constants": machine._as_json(constants(flops=5e10))}
    given = json.loads(json.dumps(given))
    with machine.using(given):
        choose()
        assert not timed
        assert machine.record()["constants"] == given["constants"]
        with machine.using(machine.TABLE):
            assert machine.record()["constants"] is None
        assert machine.constants() == constants(flops=5e10)
    assert machine.constants() is None
    for bad in (
        {},
        [],
        {"constants": 3},
        {"constants": {"flops": {}}},
        {"constants": {**given["constants"], "flops": 1}},
        {"constants": {**given["constants"], "flops": dict.fromkeys(given["constants"]["flops"], -1.0)}},
    ):
        with pytest.raises(ValueError, match="given must be the record of a machine"), machine.using(bad):
            raise AssertionError


@NATIVE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_auto_takes_the_backend_that_is_faster_on_the_machine(dtype: torch.dtype) -> None:
    dims = BlockDims.of_shape(workload_shape("paper_64", 768, 3072))
    for tile_rate, expected in ((1.1, "native"), (0.3, "eager")):
        with machine.using({"constants": machine._as_json(constants(tile_rate))}):
            for op in registry.CONTRACTIONS:
                assert resolve_contraction(Problem(op, dims, 8, 2048, dtype, "cpu")).backend == expected


@NATIVE
@pytest.mark.parametrize("dtype", machine.DTYPES)
def test_the_model_gives_the_measured_times_back(dtype: torch.dtype) -> None:
    hardware = machine.with_constants(one_core(), constants(tile_rate=0.6))
    plans = (
        contraction("separable", measuring.LONG_SUMS, 4, measuring.LONG_SLOTS, dtype, "forward"),
        contraction("rebuild", measuring.SHORT_SUMS, 4, measuring.SHORT_SLOTS, dtype, "forward"),
    )
    seconds = [cost._seconds(plan, hardware) for plan in plans]
    flops, store = measuring.tile_constants(plans, seconds, one_core())
    assert flops == pytest.approx(0.6 * hardware.flops_per_second(dtype))
    assert store == pytest.approx(hardware.store_seconds.of(dtype))
    wild = measuring.tile_constants(plans, [seconds[0], 1e-9], one_core())
    assert all(math.isfinite(value) and value > 0 for value in wild)


@NATIVE
def test_measuring_here(cache: Path) -> None:
    threads = torch.get_num_threads()
    state = torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        choose()
    found = machine.constants()
    assert found is not None
    assert cache_file(machine.FILE) == cache
    assert found.flops.float32 > 1e8
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


def test_info_says_what_is_known() -> None:
    facts = info.collect()
    native = {
        "compiler": "gcc",
        "torch": "any",
        "isa_compiled": "avx512",
        "isa_detected": "avx512",
        "isa_used": "avx512",
    }
    facts |= {"native": native, "measures": False, "machine": {"processor": "Z80", "constants": None}}
    assert info.processor_summary(facts) == "Z80; plans use built-in constants, not measured (MPOE_MEASURE=0)"
    assert info.processor_summary(facts | {"measures": True}).endswith("built-in constants, measured at first use")
    assert info.processor_summary(facts | {"native": None}) == "Z80; plans use built-in constants"
    known = constants()._replace(tile_rate=Pair(1.125, 0.45))
    facts["machine"]["constants"] = machine._as_json(known)
    assert info.processor_summary(facts) == (
        "Z80, measured: large native products run at 1.05 in float32, 0.42 in bfloat16 of PyTorch's rate; "
        "native is mostly the slower path in bfloat16"
    )
    assert info.processor_summary(facts) in info.show(facts)
