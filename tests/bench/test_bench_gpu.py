"""The script for a GPU, tried on the CPU: its steps, its limits, its report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mpoe_bench import gpu, run, section
from mpoe_bench.contender import Contender
from mpoe_bench.run import check_options, run_suite
from mpoe_bench.section import Setup
from mpoe_bench.suites import SCALES, sections_of
from mpoe_bench.suites.gpu import NamedSection
from mpoe_bench.targets import GPU_TARGETS, check_targets

from mpoe_kernels.testing.graphs import CaptureError

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_script_tries_every_step_without_a_gpu(tmp_path: Path, capsys) -> None:
    """With a few of the tests of the device: all of them run on the CPU as tests of their own."""
    words = ["--device", "cpu", "--minutes", "60", "--out", str(tmp_path / "trial")]
    command = [str(ROOT / "bench" / "gpu.sh"), *words]
    environment = {**os.environ, "PYTHON": sys.executable, "PYTEST_ADDOPTS": "-k 'no_tokens or two_runs'"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    outcomes = {each["name"]: each for each in json.loads((tmp_path / "trial" / "steps.json").read_text())}
    assert list(outcomes) == ["build", "machine", "card", "twins", "results", "graphs", "times"]
    for name in ("machine", "results", "graphs", "times"):
        assert outcomes[name]["result"] == "passed", outcomes[name]
        assert (tmp_path / "trial" / f"{name}.log").stat().st_size > 0
    assert " passed" in outcomes["results"]["detail"]
    for name in ("build", "twins"):
        assert outcomes[name]["result"] == "skipped"
    text = (tmp_path / "trial" / "report.md").read_text()
    assert "| results | every backend on the device | passed |" in text
    results = json.loads((tmp_path / "trial" / "times" / "results.json").read_text())
    assert results["suite"] == "gpu"
    assert results["failures"] == []
    assert results["skipped"] == []
    assert gpu.main(words) == 2
    assert "holds earlier results" in capsys.readouterr().err


def step(code: str, **options: object) -> gpu.Step:
    return gpu.Step("one", "in words", [sys.executable, "-c", code], 1.0, **options)


def test_steps_pass_fail_and_run_out_of_time(tmp_path: Path) -> None:
    passed = gpu.run_step(step("print('fine'); print('=== 3 passed ===')"), 60, tmp_path)
    assert (passed.result, passed.detail) == ("passed", "3 passed")
    failed = gpu.run_step(step("print('/a/folder/of/ours/file.py: bad'); raise SystemExit(3)"), 60, tmp_path)
    assert (failed.result, failed.detail) == ("failed", "file.py: bad")
    assert (tmp_path / "one.log").read_text() == "file.py: bad\n"
    late = gpu.run_step(step("print('begun', flush=True); import time; time.sleep(60)"), 2, tmp_path)
    assert (late.result, late.detail) == ("out of time", "begun")
    unable = gpu.run_step(step("print('no compiler'); raise SystemExit(2)", unable=2), 60, tmp_path)
    assert (unable.result, unable.detail) == ("skipped", "no compiler")
    assert gpu.run_step(step("", missing="no such thing"), 60, tmp_path).detail == "no such thing"
    assert gpu.run_step(step(""), 0.0, tmp_path).result == "skipped"
    text = gpu.report([passed, failed, late], "cpu", 3.0)
    assert "| one | in words | out of time |" in text


def test_a_failed_step_is_the_scripts_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(gpu, "steps", lambda *_: [step("raise SystemExit(1)"), step("print('still done')")])
    assert gpu.main(["--device", "cpu", "--out", str(tmp_path / "out")]) == 1
    assert "still done" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_it_says_so(capsys) -> None:
    assert gpu.main([]) == 2
    assert "no CUDA device: --device cpu" in capsys.readouterr().err


def test_on_a_gpu_the_tests_and_times_are_those_of_the_device(tmp_path: Path) -> None:
    steps = {each.name: each for each in gpu.steps("cuda", tmp_path)}
    for name in ("results", "graphs"):
        assert steps[name].environment["MPOE_TEST_DEVICE"] == "cuda"
    words = " ".join(steps["times"].command)
    assert "--suite gpu --device cuda" in words
    assert "tiny" not in words
    assert sum(each.share for each in steps.values() if each.name != "times") < 0.8, "time is left for the times"


def test_the_cuda_kernels_are_built_first_and_then_required(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "nvcc"
    compiler.write_text("")
    compiler.chmod(0o755)
    monkeypatch.setenv("CUDACXX", str(compiler))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    build, *others = gpu.steps("cuda", tmp_path)
    assert (build.name, build.missing) == ("build", "")
    assert list(build.command[1:]) == ["setup.py", "-q", "build_ext", "--inplace"], "pip would build in isolation"
    assert build.environment == {"MPOE_BUILD": "cuda", "TORCH_CUDA_ARCH_LIST": "9.0a"}
    tests = [each for each in others if each.name in ("results", "graphs")]
    assert [each.environment["MPOE_TEST_REQUIRED"] for each in tests] == ["eager triton cuda"] * 2
    monkeypatch.setenv("CUDACXX", str(tmp_path / "absent"))
    steps = {each.name: each for each in gpu.steps("cuda", tmp_path)}
    assert steps["build"].missing == "no nvcc"
    assert steps["results"].environment["MPOE_TEST_REQUIRED"] == "eager triton"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_a_required_backend_that_is_absent_fails(tmp_path: Path) -> None:
    tests = [str(ROOT / "tests/device/test_device_ops.py"), "-k", "test_no_tokens and (cuda or eager)"]
    options = ["-p", "no:cacheprovider", "-q", "--confcutdir", str(ROOT / "tests/device")]
    command = [sys.executable, "-m", "pytest", *options, *tests]
    one = gpu.Step("one", "in words", command, 1.0, {"MPOE_TEST_REQUIRED": "cuda"})
    outcome = gpu.run_step(one, 120, tmp_path)
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
