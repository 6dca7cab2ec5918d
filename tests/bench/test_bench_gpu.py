"""The script for a GPU, tried on the CPU: what its parts select, its limits, its report; and the suite ``gpu``."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
from itertools import product
from pathlib import Path

import pytest
import torch
from mpoe_bench import run
from mpoe_bench.contender import CaptureError, Comparison, Contender, Truth
from mpoe_bench.layers import cases
from mpoe_bench.machine import check_options
from mpoe_bench.run import run_suite
from mpoe_bench.suites import SCALES, Plan

ROOT = Path(__file__).resolve().parents[2]
ON_CPU = [
    *("smoke-triton", "machine", "smoke-cuda", "instructions", "experts-bfloat16", "linear-bfloat16", "memcheck"),
    *("racecheck", "targets", "graphs", "models", "profile", "experts-float32", "linear-float32", "peers"),
]


def script(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [str(ROOT / "bench" / "gpu.sh"), *words]
    own = {**os.environ, "PYTHON": sys.executable, **environment}
    return subprocess.run(command, capture_output=True, text=True, env=own, cwd=ROOT, check=False)


def plan(device: str) -> dict[str, str]:
    """Commands by part."""
    done = script("--plan", "--device", device, PYTHON="true")
    assert done.returncode == 0, done.stderr
    return dict(re.findall(r"^([\w-]+) \(\d+ s\): (.*)$", done.stdout, re.MULTILINE))


def test_the_parts_on_a_gpu() -> None:
    parts = plan("cuda")
    assert list(parts) == [*ON_CPU[:2], "card", "build", *ON_CPU[2:]]
    for backend in ("triton", "cuda"):
        assert f"--suite layers --backend {backend}" in parts[f"smoke-{backend}"]
    assert "--device cuda" in parts["targets"]
    assert "MPOE_BUILD=cuda" in parts["build"]
    for tool in ("memcheck", "racecheck"):
        assert parts[tool].startswith(f"compute-sanitizer --tool {tool} --error-exitcode 9 ")
    four = "regex:^(neurons_fused|hidden_rows|fused|grouped_rows)_kernel$"
    assert f"--filter-mode per-launch-config --launch-count 1 --kernel-name {four}" in parts["profile"]
    assert parts["peers"].endswith("--suite gpu")
    assert "--scale tiny" in plan("cpu")["peers"]


@pytest.mark.slow
def test_a_visit_tries_every_part_without_a_gpu(tmp_path: Path) -> None:
    """Tests are collected: a name that the script has wrong fails its part."""
    walked = tmp_path / "trial"
    done = script("--device", "cpu", "--minutes", "60", "--out", str(walked))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = re.findall(r"^\| ([\w-]+) \| ([\w ]+) \|", (walked / "visit.md").read_text(), re.MULTILINE)
    results = dict(rows)
    assert list(results) == ["part", *ON_CPU]
    assert {name for name, result in results.items() if result == "passed"} >= {*ON_CPU} - {"profile"}
    assert results["profile"] in ("passed", "not here")
    for part in ("smoke-triton", "smoke-cuda", "targets"):
        report = (walked / part / "report.md").read_text()
        assert all(f"| {case.name} [eager] " in report for case in cases((32,)))
    report = (walked / "models" / "report.md").read_text()
    assert all(f"| mpoe {name} {shape} " in report for name in ("T5", "Llama") for shape in ("neurons", "separable"))
    assert (walked / "done").read_text().split() == [name for name in ON_CPU if results[name] == "passed"]
    with tarfile.open(f"{walked}.tar.gz") as archive:
        assert {"trial/visit.md", "trial/models.log", "trial/peers/report.md"} <= set(archive.getnames())

    def selected(part: str) -> list[str]:
        lines = (walked / f"{part}.log").read_text().splitlines()
        return sorted(line.split("::", 1)[1] for line in lines if "::" in line)

    every = ("native", "eager", "triton", "cuda"), ("neurons", "neurons of 64", "hidden", "hidden of 64")
    first = {re.split(r"[\[\]]", name)[1] for name in selected("experts-bfloat16")}
    assert first == {f"{backend}-bfloat16-{shape}" for backend, shape in product(*every)}
    for dtype in ("bfloat16", "float32"):
        assert all(dtype in name for part in ("experts", "linear") for name in selected(f"{part}-{dtype}"))
    assert len(selected("graphs")) > 10
    checked = []  # small cases with tokens, an Inf among them
    for backend in ("triton", "cuda"):
        for shape in ("neurons", "hidden"):
            checked.append(f"test_experts[{backend}-bfloat16-{shape}]")
            checked.append(f"test_an_infinite_token_spoils_its_own_row_alone[{backend}-{shape}]")
        checked.append(f"test_routing_is_the_same_everywhere[{backend}-700-64-2-11]")
        checked.append(f"test_strategies[{backend}-light-bfloat16]")
    assert selected("memcheck") == selected("racecheck") == sorted(checked)
    again = script("--device", "cpu", "--out", str(walked))
    assert {line.split()[1] for line in again.stdout.splitlines() if line.startswith("|")} <= {"profile"}


def trial(tmp_path: Path, code: str, *words: str) -> tuple[int, str]:
    """Status and report of the script with a program in place of Python, for a part each."""
    program = tmp_path / "python"
    program.write_text(f"#!/usr/bin/env bash\n{code}\n")
    program.chmod(0o755)
    done = script("--device", "cpu", "--out", str(tmp_path / "out"), *words, PYTHON=str(program))
    return done.returncode, (tmp_path / "out" / "visit.md").read_text()


@pytest.mark.parametrize(
    ("failing", "wrong", "line"),
    [
        ("smoke", "targets", "mpoe: wrong or failed: a: wrong result"),
        ("experts.py -k bfloat16", "experts.py -k float32", "E       AssertionError: y"),
        ("experts.py -k bfloat16", "experts.py -k float32", "E       assert False"),
    ],
)
def test_only_a_wrong_result_ends_a_visit(tmp_path: Path, failing: str, wrong: str, line: str) -> None:
    """A missing package does not, nor a program that fails."""
    missing = "E   ModuleNotFoundError: no"
    code = f'case "$*" in *"{failing}"*) echo "{missing}"; exit 1 ;; *"{wrong}"*) echo "{line}"; exit 2 ;; esac'
    status, report = trial(tmp_path, code)
    assert status == 1
    assert "| machine | passed | " in report
    assert report.count("| failed |") >= 1
    assert report.splitlines()[-1].split(" | ")[1] == "WRONG"
    assert report.splitlines()[-1].endswith(f"| {line} |")


def test_what_has_no_time_is_left_for_the_next_call(tmp_path: Path) -> None:
    status, report = trial(tmp_path, "exit 0", "--minutes", "0")
    assert status == 0
    assert report.count("| no time was left |") == len(ON_CPU)
    status, report = trial(tmp_path, 'case "$*" in *models*) exit 1 ;; esac')
    assert status == 0
    assert "| models | failed | " in report
    assert "models" not in (tmp_path / "out" / "done").read_text().split()


def test_what_has_no_time_is_named() -> None:
    results = run_suite("gpu", threads=1, scale="tiny", backend="eager", minutes=1e-9)
    assert results["sections"] == []
    assert results["skipped"][0] == "FFN E=8 48x192 T=8 bfloat16"
    titles = [each.title for each in Plan(SCALES["tiny"], "cpu", ("eager",)).of("gpu")]
    assert results["skipped"] == list(dict.fromkeys(titles))


def test_after_a_capture_that_broke_off_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in that section, not in a later one; the run has failed and says why."""

    def graphed(function):
        raise CaptureError("the capture of a CUDA graph failed: no")

    def build(_: object) -> tuple[Contender, Truth]:
        y = torch.ones(2)
        return Contender(lambda: y), Truth({"y": y.double()}, {"y": 0.0}, y.dtype)

    def comparison(title: str) -> Comparison:
        return Comparison("", title, dict, [("one", "limit", build), ("two", "mpoe", build)], 2, {}, ("graph",))

    monkeypatch.setattr(run, "graphed", graphed)
    monkeypatch.setattr(Plan, "of", lambda *_: [comparison("first"), comparison("second")])
    results = run_suite("gpu", threads=1, scale="tiny", backend="eager")
    assert [each["title"] for each in results["sections"]] == ["first"]
    assert results["sections"][0]["rows"][0]["graph_reason"] == "the capture of a CUDA graph failed: no"
    assert not any("graph" in row for row in results["sections"][0]["rows"])
    assert results["skipped"] == ["second"]
    assert results["failures"] == [
        "first: failed: CaptureError: the capture of a CUDA graph failed: no; what was to follow is left out"
    ]


def test_the_gpu_suite_on_a_cpu_is_a_trial_only() -> None:
    with pytest.raises(ValueError, match="scale must be tiny for suite gpu on a CPU"):
        check_options("gpu", "cpu", None, "real")
