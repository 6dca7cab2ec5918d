"""`mpoe bench` on tiny sizes: results, tables, report, refusals."""

import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mpoe_bench import suites
from mpoe_bench.cases import JUDGED_WORKLOADS
from mpoe_bench.contender import failure_text
from mpoe_bench.run import run_suite
from mpoe_bench.tables import table_of

from mpoe.cli.main import main
from mpoe_kernels import available_backends
from tests.cases import ROOT


def test_quick_measures_everything_and_nothing_is_wrong(quick):
    assert quick.code == 0
    results = quick.results
    assert results["failures"] == []
    keys = [section["key"] for section in results["sections"]]
    assert {"ffn", "train_step", "layers"} == set(keys)
    main_section = results["sections"][0]
    rows = {row["name"]: row for row in main_section["rows"]}
    backend = "eager" if available_backends() == ("eager",) else "auto"
    for name in (
        f"mpoe separable [{backend}]",
        f"mpoe paper_full [{backend}]",
        "dense experts, grouped_mm",
    ):
        assert rows[name]["forward"]["x"] > 0
        assert rows[name]["train"]["low"] <= rows[name]["train"]["x"] <= rows[name]["train"]["high"]
    ours = rows[f"mpoe separable [{backend}]"]
    assert ours["floor"]["forward"] > 1.0
    assert ours["weight_bytes"] == 4 * ours["parameters"]


def test_report_shows_every_section(quick):
    report = (quick.folder / "report.md").read_text()
    for section in quick.results["sections"]:
        assert f"### {table_of(section).title}" in report
        first, *_ = table_of(section).columns.values()
        assert all(re.search(rf"\| {re.escape(name)} +\|", report) for name in first)
    for line in report.splitlines():  # every row of a table has as many cells as its header
        assert not line.startswith("|") or line.endswith("|")


def test_results_tell_the_machine_but_not_whose_it_is(quick):
    machine = quick.results["machine"]
    assert machine["processor"]
    assert machine["threads"] == 1
    # The name of a build, like +cpu, is not always part of the version of the package.
    assert machine["libraries"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    text = (quick.folder / "results.json").read_text()
    for private in (platform.node(), str(ROOT), str(Path.home()), str(Path(torch.__file__).parent)):
        assert len(private) < 3 or private not in text


def test_failures_are_told_without_folders():
    error = RuntimeError("kernels_of, /some/where/csrc/linear.cpp:98, no kernel at 3 tokens/s")
    assert (
        failure_text(error)
        == "failed: RuntimeError: kernels_of, linear.cpp:98, no kernel at 3 tokens/s"
    )


def test_results_are_json_without_nan(quick):
    text = (quick.folder / "results.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert not (quick.folder / "incomplete.json").exists()


@pytest.mark.parametrize("suite", ["planner", pytest.param("targets", marks=pytest.mark.slow)])
def test_other_suites(suite, monkeypatch):
    seen, plan = [], suites.Plan(suites.SCALES["tiny"], "cpu", ("eager",))
    dtypes = [each.facts["dtype"] for each in plan.of(suite)]
    monkeypatch.setattr(suites, "DTYPES", (torch.bfloat16,))
    results = run_suite(suite, threads=1, scale="tiny", on_section=seen.append, backend="eager")
    assert results["failures"] == []
    assert results["sections"] == seen
    assert results["backends"] == ["eager"]
    assert results["targets"] == []  # the targets speak of real sizes
    if suite == "planner":
        (section,) = results["sections"]
        assert len(section["rows"]) == 4
        assert section["backend"] == "eager"
        for row in section["rows"]:
            assert row["ratio"] >= 1.0
            assert row["chosen"].keys() == row["best"].keys() == row["seconds"].keys()
            assert all(row["chosen"][phase] in times for phase, times in row["seconds"].items())
            assert all(
                name.endswith("[eager]") for times in row["seconds"].values() for name in times
            )
    else:
        assert [section["key"] for section in seen] == ["ffn"] * 3
        assert {section["case"]["dtype"] for section in seen} == {"bfloat16"}
        assert dtypes == ["float32"] * 3 + ["bfloat16"] * 3
        masked = [row for section in seen for row in section["rows"] if row.get("masked")]
        assert masked
        assert all(
            "forward" not in row and row["train"]["x"] > 0 for row in masked
        )  # masking changes no forward


@pytest.mark.slow
def test_mixtures_around_a_dense_network(monkeypatch):
    monkeypatch.setattr(suites, "DTYPES", (torch.bfloat16,))  # the quick suite has some in float32
    results = run_suite("layers", threads=1, scale="tiny", backend="eager")
    assert results["failures"] == []
    assert {section["case"]["layers"] for section in results["sections"]} == {1, 2}
    for section in results["sections"]:
        rows = {row["name"]: row for row in section["rows"]}
        model, hidden = section["case"]["model"], section["case"]["hidden"]
        if model == 32:  # the layers that have limits on a GPU
            is_batch = section["case"]["tokens"] > 1
            trained = {name: "train" in row for name, row in rows.items()}
            assert set(trained.values()) == {is_batch}, trained
            continue
        neurons = rows[f"neurons 64 x {model // 12}, 8 [eager]"]
        assert neurons["floor"]["forward"] == pytest.approx(
            1 + 8 * (model // 12) / hidden + 64 / (2 * hidden)
        )
        assert neurons["parameters"] > rows["dense FFN"]["parameters"]
        assert ("train" in neurons) == (section["case"]["layers"] == 1)
        assert neurons["forward"]["x"] > 0


def test_the_planner_suite_judges_all_cases():
    assert len(JUDGED_WORKLOADS) == len({case.name for case in JUDGED_WORKLOADS}) == 49


def refusal(capsys, *arguments):
    """The one line of a refused command."""
    with pytest.raises(SystemExit) as exit_info:
        main(["bench", *(str(a) for a in arguments)])
    assert exit_info.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@pytest.mark.parametrize(
    "arguments, words",
    [
        (
            ["--suite", "slow"],
            "suite must be one of 'quick', 'planner', 'targets', 'layers', 'models'; got 'slow'",
        ),
        (["--device", "tpu"], "device must be one of 'cpu', 'cuda'; got 'tpu'"),
        (["--threads", 0], f"threads must be between 1 and {CORES}"),
        (["--threads", CORES + 1], f"threads must be between 1 and {CORES}"),
        (["--backend", "quantum"], "backend must be one of 'all', 'auto', 'eager'"),
        (["--backend", "eager,"], "backend must be one of 'all', 'auto', 'eager'"),
        (
            ["--phases", "forward,backward"],
            "phases must be one of 'forward', 'train', 'graph'; got 'backward'",
        ),
        (
            "--suite layers --scale tiny --only nobody".split(),
            "only and phases must leave something to measure; got 'nobody'",
        ),
    ],
)
def test_refusals(capsys, tmp_path, arguments, words):
    line = refusal(capsys, "--out", tmp_path / "out", *arguments)
    assert words in line
    assert not (tmp_path / "out").exists()


def test_cuda_without_cuda_is_refused(capsys, tmp_path):
    if torch.cuda.is_available():
        line = refusal(capsys, "--device", "cuda", "--suite", "planner", "--out", tmp_path / "out")
        assert "its cases are a CPU's" in line
    else:
        line = refusal(capsys, "--device", "cuda", "--out", tmp_path / "out")
        assert "torch finds no CUDA device here" in line
    assert not (tmp_path / "out").exists()


def test_earlier_results_are_not_overwritten_by_accident(capsys, quick):
    before = (quick.folder / "results.json").read_bytes()
    assert "holds earlier results" in refusal(capsys, "--out", quick.folder)
    assert (quick.folder / "results.json").read_bytes() == before


@pytest.mark.slow
def test_pytest_benchmark_suites_pass_on_tiny_sizes():
    pytest.importorskip("pytest_benchmark")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "bench",
        "--scale",
        "tiny",
        "--benchmark-disable",
        "-q",
    ]
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")
    }
    environment["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, check=False, env=environment
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert int(passed.group(1)) > 60, done.stdout  # FFN, decoding, train step, layers
