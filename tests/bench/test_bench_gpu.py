"""The script for a GPU, tried on the CPU: its parts, its limits, its report."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from mpoe_bench import run, section
from mpoe_bench.contender import Contender
from mpoe_bench.graphs import CaptureError
from mpoe_bench.run import check_options, run_suite
from mpoe_bench.section import Setup
from mpoe_bench.suites import SCALES, sections_of
from mpoe_bench.suites.gpu import NamedSection
from mpoe_bench.targets import GPU_TARGETS, check_targets
from mpoe_bench.visit import __main__ as gpu
from mpoe_bench.visit import parts
from mpoe_bench.visit.lines import Lines
from mpoe_bench.visit.parts import Part

ROOT = Path(__file__).resolve().parents[2]
SKIPPED = ("build", "card", "twins", "memory")  # without a GPU


@pytest.mark.slow
def test_the_script_tries_every_part_without_a_gpu(tmp_path: Path) -> None:
    """With a few of the tests of the device: all of them run on the CPU as tests of their own."""
    command = [str(ROOT / "bench" / "gpu.sh"), "--device", "cpu", "--minutes", "60", "--out", str(tmp_path / "trial")]
    environment = {**os.environ, "PYTHON": sys.executable, "PYTEST_ADDOPTS": "-k 'no_tokens or two_runs'"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    outcomes = {each["name"]: each for each in json.loads((tmp_path / "trial" / "parts.json").read_text())}
    needs_gpu = ["build", "twins", "memory"]
    assert [name for name, each in outcomes.items() if each["detail"] == "it needs a GPU"] == needs_gpu
    ran = [name for name in outcomes if name not in (*needs_gpu, "card")]
    assert ran == ["machine", "results", "graphs", "host", "times"]
    for name in ran:
        assert outcomes[name]["result"] == "passed", outcomes[name]
        assert (tmp_path / "trial" / f"{name}.log").stat().st_size > 0
    assert " passed" in outcomes["results"]["detail"]
    assert re.fullmatch(r"host: [1-9]\d* measured, 0 from before, 0 left, 0 wrong", outcomes["host"]["detail"])
    assert "| results | every backend on the device | passed |" in (tmp_path / "trial" / "report.md").read_text()
    results = json.loads((tmp_path / "trial" / "times" / "results.json").read_text())
    assert (results["suite"], results["failures"], results["skipped"]) == ("gpu", [], [])
    with tarfile.open(tmp_path / "trial.tar.gz") as archive:
        assert {"trial/host.jsonl", "trial/times/report.md"} <= set(archive.getnames())

    again = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert again.returncode == 0
    assert [line.split()[0] for line in again.stdout.splitlines()] == [
        "build",
        "card",
        "twins",
        "memory",
        "trial.tar.gz",
    ]


def part(code: str, name: str = "one", **options: Any) -> Part:
    return Part(name, "in words", [sys.executable, "-c", code], 1.0, **options)


def test_parts_pass_fail_and_run_out_of_time(tmp_path: Path) -> None:
    passed = gpu.run_part(part("print('fine'); print('=== 3 passed ===')"), 60, tmp_path)
    assert (passed.result, passed.detail) == ("passed", "3 passed")
    failed = gpu.run_part(part("print('/a/folder/of/ours/file.py: bad'); raise SystemExit(3)"), 60, tmp_path)
    assert (failed.result, failed.detail) == ("failed", "file.py: bad")
    assert (tmp_path / "one.log").read_text() == "file.py: bad\n"
    late = gpu.run_part(part("print('begun', flush=True); import time; time.sleep(60)"), 2, tmp_path)
    assert (late.result, late.detail) == ("out of time", "begun")
    unable = gpu.run_part(part("print('no compiler'); raise SystemExit(2)", unable=2), 60, tmp_path)
    assert (unable.result, unable.detail) == ("skipped", "no compiler")
    assert gpu.run_part(part("", missing="no such thing"), 60, tmp_path).detail == "no such thing"
    assert gpu.run_part(part(""), 0.0, tmp_path).result == "not begun"
    ends = gpu.run_part(part("import sys; print(sys.argv[-2:])", knows_minutes=True), 90, tmp_path)
    assert ends.detail == "['--minutes', '1.500']"
    assert "| one | in words | out of time |" in gpu.report([passed, failed, late], "cpu")


def test_what_is_wrong_ends_the_visit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    todo = [part("raise SystemExit(1)", "wrong", judges=True), part("print('never')", "times")]
    monkeypatch.setattr(gpu, "parts", lambda *_: todo)
    assert gpu.main(["--device", "cpu", "--out", str(tmp_path / "out")]) == 1
    first, second, _ = capsys.readouterr().out.splitlines()
    assert first.split()[:2] == ["wrong", "failed"]
    assert second.split() == ["times", "not", "begun", "0", "s", "wrong", "failed"]


def test_a_later_call_does_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    measures = part("print('two: 3 measured, 0 from before, 4 left, 0 wrong')", "two", knows_minutes=True)
    todo = [part("print('good')"), measures, part("raise SystemExit(1)", "three")]
    monkeypatch.setattr(gpu, "parts", lambda *_: todo)
    words = ["--device", "cpu", "--out", str(tmp_path / "out")]
    assert gpu.main(words) == 1
    todo[2] = part("print('mended')", "three")
    capsys.readouterr()
    assert gpu.main(words) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["two", "three", "out.tar.gz"]
    found = {each["name"]: each["result"] for each in json.loads((tmp_path / "out" / "parts.json").read_text())}
    assert found == {"one": "passed", "two": "passed", "three": "passed"}


def test_time_is_shared_out() -> None:
    judge, other = part("", "judge", judges=True), part("", "other", knows_minutes=True)
    more = dataclasses.replace(other, name="more", minutes=3.0)
    absent = part("", "absent", missing="no such thing")
    assert gpu.shares([judge, other, more, absent], 600.0) == {"judge": 120.0, "other": 60.0, "more": 180.0}
    assert gpu.shares([judge, other, more], 180.0) == {"judge": 120.0, "other": 30.0, "more": 90.0}
    assert gpu.shares([judge, other], 30.0) == {"judge": 30.0, "other": 0.0}
    text = gpu.plan([judge, other, absent], 10.0)
    assert re.search(r"^judge +60 +120  in words$", text, re.MULTILINE)
    assert "absent" in text
    assert "(not here: no such thing)" in text


def test_lines_survive_a_machine_that_goes_away(tmp_path: Path) -> None:
    lines = Lines(tmp_path / "some.jsonl")
    lines.add("one", {"x": 1})
    with lines.path.open("a") as file:
        file.write('{"key": "two", "x"')
    again = Lines(lines.path)
    assert again.rows == {"one": {"key": "one", "x": 1}}
    again.add("two", {"x": 2})
    assert Lines(lines.path).rows["two"] == {"key": "two", "x": 2}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_it_says_so(capsys) -> None:
    assert gpu.main([]) == 2
    assert "no CUDA device: --device cpu" in capsys.readouterr().err


def test_on_a_gpu_the_tests_and_times_are_those_of_the_device(tmp_path: Path) -> None:
    steps = {each.name: each for each in parts.parts("cuda", tmp_path)}
    for name in ("results", "graphs"):
        assert steps[name].environment["MPOE_TEST_DEVICE"] == "cuda"
    words = " ".join(steps["times"].command)
    assert "--suite gpu --device cuda" in words
    assert "tiny" not in words
    given = gpu.shares(list(steps.values()), 1500.0)
    assert given["times"] > 120, "in 25 minutes time is left for the times"


def test_the_cuda_kernels_are_built_first_and_then_required(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "nvcc"
    compiler.write_text("")
    compiler.chmod(0o755)
    monkeypatch.setenv("CUDACXX", str(compiler))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    build, *others = parts.parts("cuda", tmp_path)
    assert (build.name, build.missing) == ("build", "")
    assert list(build.command[1:]) == ["setup.py", "-q", "build_ext", "--inplace"], "pip would build in isolation"
    assert build.environment == {"MPOE_BUILD": "cuda", "TORCH_CUDA_ARCH_LIST": "9.0a"}
    tests = [each for each in others if each.name in ("results", "graphs")]
    assert [each.environment["MPOE_TEST_REQUIRED"] for each in tests] == ["eager triton cuda"] * 2
    monkeypatch.setenv("CUDACXX", str(tmp_path / "absent"))
    steps = {each.name: each for each in parts.parts("cuda", tmp_path)}
    assert steps["build"].missing == "no nvcc"
    assert steps["results"].environment["MPOE_TEST_REQUIRED"] == "eager triton"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_a_required_backend_that_is_absent_fails(tmp_path: Path) -> None:
    tests = [str(ROOT / "tests/device/test_device_ops.py"), "-k", "test_no_tokens and (cuda or eager)"]
    options = ["-p", "no:cacheprovider", "-q", "--confcutdir", str(ROOT / "tests/device")]
    command = [sys.executable, "-m", "pytest", *options, *tests]
    one = Part("one", "in words", command, 1.0, {"MPOE_TEST_REQUIRED": "cuda", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"})
    outcome = gpu.run_part(one, 120, tmp_path)
    assert outcome.result == "failed"
    assert "1 passed" in outcome.detail
    assert "1 error" in outcome.detail
    assert "cuda: " in (tmp_path / "one.log").read_text()


def test_what_has_no_time_is_named() -> None:
    results = run_suite("gpu", threads=1, clock="cpu", scale="tiny", backend="eager", seconds=1e-9)
    assert results["sections"] == []
    assert results["skipped"][0] == "FFN 48x96 E=8 T=8 bfloat16"
    assert len(results["skipped"]) == len(list(sections_of("gpu", SCALES["tiny"], Setup(backends=("eager",)))))


def test_after_a_capture_that_broke_off_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in that section, not in a later one; the run has failed and says why."""

    def graphed(function):
        raise CaptureError("the capture of a CUDA graph failed: no")

    timed: list[str] = []
    monkeypatch.setattr(section, "graphed", graphed)
    monkeypatch.setattr(section, "interleave", lambda functions, *_: timed.extend(functions) or {})
    rows: dict[str, dict] = {"one": {}, "two": {}}
    joined = {name: Contender(name, "mpoe", lambda: None) for name in rows}
    with pytest.raises(CaptureError):
        section._time_graphs(joined, rows, None, Setup())
    assert rows == {"one": {"graph_reason": "the capture of a CUDA graph failed: no"}, "two": {}}
    assert timed == []

    spoilt = {"key": "", "title": "first", "case": {}, "rows": [], "spoilt": "failed: CaptureError: no"}
    later = NamedSection("second", lambda: pytest.fail("it was measured"))
    monkeypatch.setattr(run, "sections_of", lambda *_: [lambda: dict(spoilt), later])
    results = run_suite("gpu", threads=1, clock="cpu", scale="tiny", backend="eager")
    assert [each["title"] for each in results["sections"]] == ["first"]
    assert results["skipped"] == ["second"]
    assert results["failures"] == ["first: failed: CaptureError: no; what was to follow is left out"]


def test_the_gpu_suite_on_a_cpu_is_a_trial_only() -> None:
    with pytest.raises(ValueError, match="scale must be tiny for suite gpu on a CPU"):
        check_options("gpu", "cpu", None, "wall", "real")


def test_targets_of_a_gpu() -> None:
    def row(name: str, x: float, **facts: object) -> dict:
        return {"name": name, "kind": "peer", "reason": None, "forward": {"x": x}, **facts}

    ours = {"kind": "mpoe", "backend": "triton", "masked": False}
    case = {"experts": 64, "tokens": 64, "load": "uniform", "model": 768, "hidden": 3072, "dtype": "bfloat16"}
    rows = [row("mpoe", 2.0, shape="paper_32", **ours), row("dense experts, grouped_mm", 7.0)]
    (line,) = check_targets([{"key": "ffn", "title": "", "case": case, "rows": rows}], "cuda")
    assert line["reached"] is True
    assert line["found"] == {"bfloat16": "3.50"}
    assert any(target.shape == "paper_full" for target in GPU_TARGETS)
