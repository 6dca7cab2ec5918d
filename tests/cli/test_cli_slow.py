"""Minutes rather than seconds: what the README trains, and what the demos claim."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
slow, exhaustive = pytest.mark.slow, pytest.mark.exhaustive


def complete(*arguments: object) -> str:
    command = [sys.executable, "-m", "mpoe", *map(str, arguments)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


@pytest.mark.parametrize(
    ("task", "margin"),
    [pytest.param("movie_sentiment", 0.06, marks=exhaustive), pytest.param("doc_kind", 0.1, marks=slow)],
)
def test_the_readme_trains_clearly_above_the_majority(request, tmp_path: Path, task: str, margin: float) -> None:
    readme = (EXAMPLES.parent / "README.md").read_text(encoding="utf-8")
    (line,) = [line for line in readme.splitlines() if line.startswith("mpoe train ")]
    words = shlex.split(line)[1:]
    words[words.index("--output_dir") + 1] = str(tmp_path / "run")
    words[words.index("--max_steps") + 1] = "200"  # enough for that
    data = words.index("--data_dir")
    embedded = task.startswith("doc_")
    words[data : data + 2] = (
        ["--tasks", task] if embedded else ["--data_dir", str(request.getfixturevalue("shared_data") / task)]
    )
    out = complete(*words)
    assert "learning_rate 0.0015: what to start from" in out
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    score, majority = (results[key][task]["accuracy"] for key in ("validation", "baselines"))
    assert score > majority + margin
    assert not results["remarks"]


@slow
def test_demo(tmp_path: Path) -> None:
    ready = os.environ.get("MPOE_DEMO")  # CI has run the README's
    folder = Path(ready) if ready else tmp_path / "demo"
    if not folder.is_dir():
        assert "Of its own expert's gain the mixture keeps" in complete("demo", "--output_dir", folder)
    results = json.loads((folder / "results.json").read_text())
    losses = results["losses"]
    assert all(losses[name]["own"] < losses[name]["base"] - 0.2 for name in ("law", "code", "names"))
    assert min(results["kept"].values()) > 0.4
    lost = {column: value - losses["documentation"]["base"] for column, value in losses["documentation"].items()}
    assert lost["composed"] < 0.7 * lost["own"]
    assert {path.name for path in (folder / "experts").iterdir()} == {f"{n}.expert" for n in ("law", "code", "names")}
    assert results["seconds"] < 600  # three minutes on two cores that are free


@pytest.mark.parametrize("kind", [pytest.param("t5", marks=slow), pytest.param("gpt2", marks=exhaustive)])
def test_comparison(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "demo"
    complete("demo", "--compare", "--output_dir", folder, "--model", kind)
    runs = {each["name"]: each["results"] for each in json.loads((folder / "compare.json").read_text())}
    assert list(runs) == ["dense", "wider", "switch", "hidden", "separable"]
    scores = {name: results["mean_validation"] for name, results in runs.items()}
    sizes = {
        name: results["parameters"]["auxiliary"] for name, results in runs.items() if "central" in results["parameters"]
    }
    assert sizes["hidden"] + runs["hidden"]["parameters"]["central"] < 0.5 * runs["switch"]["parameters"]["expert"]
    assert all(sum(values["items"] for values in each["validation"].values()) > 400 for each in runs.values())
    if kind == "t5":  # not below Switch's by more than two points, and no task is saturated
        assert scores["hidden"] > scores["switch"] - 0.02
        assert max(scores.values()) < 0.95
    else:  # perplexity
        assert scores["hidden"] < 1.02 * scores["switch"]
    assert not any(results["remarks"] for results in runs.values())
    assert "data:image/png" in (folder / "report.html").read_text()
    assert sum(results["seconds"] for results in runs.values()) < 600
