"""The script for a GPU, tried on the CPU: what its parts select, its limits, its report; and what a
run does out of time or after a broken capture."""

import os
import re
import subprocess
import sys
import tarfile

import pytest
import torch
from mpoe_bench import run
from mpoe_bench.contender import CaptureError, Comparison, Contender, Truth
from mpoe_bench.layers import LIMIT, cases
from mpoe_bench.run import run_suite
from mpoe_bench.suites import SCALES, Plan
from mpoe_bench.targets import GPU_TARGETS

from tests.cases import ROOT
from tests.faults.processes import fork

ON_CPU = [
    "machine",
    "neurons",
    "stress",
    "neurons-times",
    "trace",
    "others-times",
    "instructions",
    "bfloat16",
    "memcheck",
    "step",
    "profile",
    "graphs",
    "graphs-times",
]


def script(*words, **environment):
    command = [str(ROOT / "bench/gpu.sh"), *words]
    own = {**os.environ, "PYTHON": sys.executable, **environment}
    return subprocess.run(command, capture_output=True, text=True, env=own, cwd=ROOT, check=False)


def plan(device):
    """Seconds and command of every part."""
    done = script("--plan", "--device", device, PYTHON="true")
    assert done.returncode == 0, done.stderr
    parts = re.findall(r"^([\w-]+) \((\d+) s\): (.*)$", done.stdout, re.MULTILINE)
    return {name: (int(seconds), command) for name, seconds, command in parts}


def test_the_limits_of_the_parts_fit_thirty_minutes():
    parts = plan("cuda")
    assert list(parts) == ["card", *ON_CPU]
    assert sum(seconds for seconds, _ in parts.values()) <= 30 * 60


def test_the_parts_on_a_gpu():
    parts = {name: command for name, (_, command) in plan("cuda").items()}
    assert parts["neurons"].endswith("test_device_experts.py::test_neurons_of_any_number_of_tokens")
    for name in ("neurons-times", "others-times"):
        assert "--device cuda" in parts[name]
        assert "--suite layers --phases forward,train --only " in parts[name]
    assert (
        "PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9"
        in parts["memcheck"]
    )
    three = "regex:^(neurons_fused|hidden_rows|fused)_kernel$"
    assert (
        f"--filter-mode per-launch-config --launch-count 1 --kernel-name {three}"
        in parts["profile"]
    )
    # A capture that breaks off spoils its process, and ncu may be refused: after everything else.
    order = list(parts)
    assert order.index("trace") < order.index("profile") < order.index("graphs")
    assert order[-2:] == ["graphs", "graphs-times"]
    assert [name for name, command in parts.items() if "--phases graph" in command] == [
        "graphs-times"
    ]
    assert "build_ext" not in " ".join(parts.values())


def program(folder, code):
    """A shell script in place of Python."""
    file = folder / "python"
    file.write_text(f"#!/usr/bin/env bash\n{code}\n")
    file.chmod(0o755)
    return str(file)


def test_the_library_is_built_beforehand(tmp_path):
    python = program(tmp_path, 'echo "$MPOE_BUILD $TORCH_CUDA_ARCH_LIST $*"')
    done = script("--build", PYTHON=python)
    assert done.stdout == "cuda 9.0a setup.py -q build_ext --inplace\n"


@pytest.mark.slow
def test_a_visit_tries_every_part_without_a_gpu(tmp_path):
    """Tests are collected: a name that the script has wrong fails its part."""
    walked = tmp_path / "trial"
    done = script("--device", "cpu", "--minutes", "60", "--out", str(walked))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = re.findall(
        r"^\| ([\w-]+) \| ([\w ]+) \|", (walked / "visit.md").read_text(), re.MULTILINE
    )
    results = dict(rows)
    assert list(results) == ["part", *ON_CPU]
    assert {name for name, result in results.items() if result == "passed"} >= {*ON_CPU} - {
        "profile"
    }
    assert results["profile"] in ("passed", "not here")
    names = [case.name for case in cases((32,))]
    timed = (walked / "neurons-times/report.md").read_text() + (
        walked / "others-times/report.md"
    ).read_text()
    for name in names:
        assert timed.count(f"| {name} [eager] ") == 2, name  # one token, and 64
    traces = {path.stem for path in (walked / "traces").iterdir()}
    assert traces == {name.replace(" ", "-") for name in names if name.startswith("neurons")}
    assert "| mpoe T5 neurons " in (walked / "step/report.md").read_text()
    assert (walked / "done").read_text().split() == [
        name for name in ON_CPU if results[name] == "passed"
    ]
    with tarfile.open(f"{walked}.tar.gz") as archive:
        assert {"trial/visit.md", "trial/step.log", "trial/others-times/report.md"} <= set(
            archive.getnames()
        )

    def selected(part):
        lines = (walked / f"{part}.log").read_text().splitlines()
        return sorted(line.split("::", 1)[1] for line in lines if "::" in line)

    backends = ("native", "eager", "triton", "cuda")
    counts = {f"test_neurons_of_any_number_of_tokens[{backend}-T1]" for backend in backends}
    assert counts <= set(selected("neurons"))
    assert all("bfloat16" in name for name in selected("bfloat16"))
    for part in ("stress", "graphs", "instructions"):
        assert selected(part), part
    checked = []  # small cases with tokens, an Inf among them
    for shape in ("neurons", "hidden"):
        checked.append(f"test_experts[triton-bfloat16-{shape}]")
        checked.append(f"test_an_infinite_token_spoils_its_own_row_alone[triton-{shape}]")
    for backend in ("triton", "cuda"):
        checked.append(f"test_routing_is_the_same_everywhere[{backend}-700-64-2-11]")
        checked.append(f"test_strategies[{backend}-light-bfloat16]")
    assert selected("memcheck") == sorted(checked)
    again = script("--device", "cpu", "--out", str(walked))
    assert {line.split()[1] for line in again.stdout.splitlines() if line.startswith("|")} <= {
        "profile"
    }


def trial(tmp_path, code, *words):
    """Status and report of the script with a program in place of Python, for a part each."""
    python = program(tmp_path, code)
    done = script("--device", "cpu", "--out", str(tmp_path / "out"), *words, PYTHON=python)
    return done.returncode, (tmp_path / "out/visit.md").read_text()


@pytest.mark.parametrize(
    "failing, wrong, line",
    [
        ("forward,train --only neurons", "--only hidden", "mpoe: wrong or failed: a: wrong result"),
        ("any_number_of_tokens", "experts.py tests", "E       AssertionError: y"),
        ("any_number_of_tokens", "experts.py tests", "E       assert False"),
    ],
)
def test_after_a_wrong_result_a_visit_goes_on(tmp_path, failing, wrong, line):
    """Its status says so; it does not of a missing package, nor of a program that fails."""
    missing = "E   ModuleNotFoundError: no"
    code = (
        f'case "$*" in *"{failing}"*) echo "{missing}"; exit 1 ;; *"{wrong}"*) echo "{line}"; '
        "exit 2 ;; esac"
    )
    status, report = trial(tmp_path, code)
    assert status == 1
    assert report.count("| failed |") >= 1
    (row,) = [row for row in report.splitlines() if "| WRONG |" in row]
    assert row.endswith(f"| {line} |")
    assert report.splitlines()[-1].startswith("| graphs-times | passed |")


def test_what_gave_a_wrong_result_is_left_out_afterwards(tmp_path):
    """By its backend and op: of two tests that ask for the same, the first of which is wrong, and
    in the next run."""
    (tmp_path / "conftest.py").write_text("from tests.device.conftest import *\n")
    (tmp_path / "test_two.py").write_text(
        'def test_wrong(check_able):\n    check_able("eager", "combine")\n    assert 1 == 2\n'
        'def test_after(check_able):\n    check_able("eager", "combine")\n    raise '
        'RuntimeError("not skipped")\n'
        'def test_other(check_able):\n    check_able("eager", "route")\n'
        'def test_missing(check_able):\n    check_able("eager", "route")\n    raise '
        'ImportError("no package")\n'
    )
    wrong, words = tmp_path / "wrong", f"-q -p no:cacheprovider -p no:xdist -o addopts= {tmp_path}"

    def twice():
        os.environ["MPOE_TEST_WRONG"] = str(wrong)
        for _ in range(2):
            pytest.main([*words.split(), f"--rootdir={tmp_path}"])
            print("kept:", wrong.read_text(), flush=True)

    said = tmp_path / "said"
    assert fork(twice, said).wait() == 0, said.read_text()
    first, second, end = said.read_text().split("kept: eager combine\n")
    assert "2 failed, 1 passed, 1 skipped" in first, first
    assert "1 failed, 1 passed, 2 skipped" in second, second
    assert not end.strip()


def test_what_has_no_time_is_left_for_the_next_call(tmp_path):
    status, report = trial(tmp_path, "exit 0", "--minutes", "0")
    assert status == 0
    assert report.count("| no time was left |") == len(ON_CPU)
    status, report = trial(tmp_path, 'case "$*" in *models*) exit 1 ;; esac')
    assert status == 0
    assert "| step | failed | " in report
    assert "step" not in (tmp_path / "out/done").read_text().split()


def test_what_has_no_time_is_named():
    results = run_suite("targets", threads=1, scale="tiny", backend="eager", minutes=1e-9)
    assert results["sections"] == []
    assert results["skipped"][0] == "FFN E=4 48x192 T=32 float32"
    titles = [each.title for each in Plan(SCALES["tiny"], "cpu", ("eager",)).of("targets")]
    assert results["skipped"] == list(dict.fromkeys(titles))


def test_after_a_capture_that_broke_off_nothing_is_measured(monkeypatch):
    """Not in that section, not in a later one; the run has failed and says why."""

    def graphed(function):
        raise CaptureError("the capture of a CUDA graph failed: no")

    def build(_):
        y = torch.ones(2)
        return Contender(lambda: y), Truth({"y": y.double()}, {"y": 0.0}, y.dtype)

    def comparison(title):
        return Comparison(
            "",
            title,
            dict,
            [("one", "limit", build), ("two", "mpoe", build)],
            {"tokens": 2},
            ("graph",),
        )

    monkeypatch.setattr(run, "graphed", graphed)
    monkeypatch.setattr(Plan, "of", lambda *_: [comparison("first"), comparison("second")])
    results = run_suite("targets", threads=1, scale="tiny", backend="eager")
    assert [each["title"] for each in results["sections"]] == ["first"]
    assert (
        results["sections"][0]["rows"][0]["graph_reason"]
        == "the capture of a CUDA graph failed: no"
    )
    assert not any("graph" in row for row in results["sections"][0]["rows"])
    assert results["skipped"] == ["second"]
    assert results["failures"] == [
        "first: failed: CaptureError: the capture of a CUDA graph failed: no; what was to follow "
        "is left out"
    ]


def test_on_a_gpu_the_targets_are_measured():
    compared = list(Plan(SCALES["real"], "cuda", ("triton",)).of("targets"))
    for target in GPU_TARGETS:
        names = [
            [name for name, *_ in comparison.contenders]
            for comparison in compared
            if (comparison.facts["experts"], comparison.facts["tokens"])
            == (target.experts, target.tokens)
        ]
        assert len(names) == 1, target
        assert {f"mpoe {target.shape} [triton]", target.peer or LIMIT} <= set(names[0]), target
