"""Tests of the emulator itself: every mistake in tests/emulator/probes.cuh is detected by what
should detect it."""

import os
import subprocess

import pytest

from tests.assertions import refuses

from .emulation import SCHEDULES, Schedule, cuda_emulate

# What detects the mistake: "values" on every schedule, or on the named half of them; "error": the
# emulator stops with a message; "address", "thread": a sanitizer; "banks": the bank conflict
# counter.
DETECTED_BY = {
    "reverse": {"values", "thread"},
    "pipeline": {"lazy values"},
    "meeting": {"error: __syncthreads divergence: probes.cuh:"},
    "vote": {"error: the mask names lanes that have exited"},
    "shifted": {"address"},
    "partial": {"values"},
    "padded": {"banks"},
}
# The programs with sanitizers take long to compile.
BY = [pytest.param(each, marks=[pytest.mark.slow] * bool(each)) for each in cuda_emulate.SANITIZERS]
PAIRS = [
    pytest.param(probe, how, marks=[pytest.mark.slow] * (how in cuda_emulate.SANITIZERS))
    for probe, found in DETECTED_BY.items()
    for how in sorted(found)
]


def run(probe, mistake, schedule, sanitizer=""):
    program = cuda_emulate.build("probe", cuda_emulate.PROBE, sanitizer)
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "report_bugs=1"}
    command = [str(program), probe, str(int(mistake)), *schedule]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)


@pytest.mark.parametrize("probe", DETECTED_BY)
@pytest.mark.parametrize("sanitizer", BY)
def test_nothing_is_reported_without_the_mistake(probe, sanitizer):
    for schedule in SCHEDULES if sanitizer == "" else SCHEDULES[::3]:
        done = run(probe, False, schedule, sanitizer)
        assert (done.returncode, done.stderr) == (0, ""), (schedule, done.stderr)


@pytest.mark.parametrize("probe, how", PAIRS)
def test_the_mistake_is_detected(probe, how):
    sanitizer = how if how in cuda_emulate.SANITIZERS else ""
    for schedule in SCHEDULES:
        done = run(probe, True, schedule, sanitizer)
        if how == "address":
            assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
            assert "probes.cuh" in done.stderr
        elif how == "thread":
            assert "ThreadSanitizer: data race" in done.stderr
        elif how.startswith("error: "):
            assert done.returncode == 2
            assert how.removeprefix("error: ") in done.stderr
        else:
            missed = how == "lazy values" and schedule.copies == "eager"
            assert (done.returncode, done.stderr) == (0 if missed else 1, "")


def test_random_order_is_another_schedule():
    assert run("reverse", False, Schedule("random", "lazy")).returncode == 0
    assert run("reverse", True, Schedule("random", "lazy")).returncode == 1


def test_compiler_errors_are_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(cuda_emulate, "CACHE", tmp_path)
    wrong = tmp_path / "wrong.cu"
    wrong.write_text("int f( {}")
    refuses(RuntimeError, r"wrong\.cu", cuda_emulate.build, "wrong.so", [wrong])
