"""What the demos write and say, in few steps; slow: what they claim, and what the README trains."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mpoe.cli import demo
from mpoe.cli.main import run
from mpoe.data.embedded import DOMAINS, domain_text
from mpoe.models.expert_mixture import kept_experts


def test_a_short_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    tasks = f"{demo.SETTINGS['t5']['tasks']} --n_train 64 --n_val 16"
    monkeypatch.setitem(demo.SETTINGS, "t5", {**demo.SETTINGS["t5"], "tasks": tasks, "batch": 2})
    monkeypatch.setattr(
        "mpoe.data.predict.generate_texts", lambda model, tokenizer, examples, *_: ["x"] * len(examples)
    )
    run(["demo", "--compare", "--steps", "1", "--output_dir", str(tmp_path / "demo")])
    out = capsys.readouterr().out
    assert "mpoe plan t5-base" in out
    page = (tmp_path / "demo" / "report.html").read_text()
    runs = json.loads((tmp_path / "demo" / "compare.json").read_text())
    assert [each["name"] for each in runs] == ["dense", "wider", "switch", "hidden", "separable"]
    assert len({json.dumps(each["results"]["data"]) for each in runs}) == 1  # the same items
    total = {each["name"]: each["results"]["parameters"]["total"] for each in runs}
    assert total["dense"] < total["hidden"] < total["switch"]
    assert abs(total["wider"] - total["hidden"]) < 0.01 * total["dense"]
    assert all(f"<th>{name}</th>" in page for name in total)


def test_a_short_demo_of_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(demo, "TESTED", 2)
    monkeypatch.setattr("mpoe.models.expert_mixture.PIECES", 8)
    short = {name: " ".join(f"{name} of {number}" for number in range(400)) for name in DOMAINS}
    monkeypatch.setattr("mpoe.data.embedded.domain_text", lambda name, held_out: short[name])
    demo.command(["--output_dir", str(tmp_path / "demo"), "--steps", "2"])
    results = json.loads((tmp_path / "demo" / "results.json").read_text())
    assert list(results["losses"]) == ["law", "code", "names", "documentation"]
    assert all(list(own) == ["base", "own", "composed", "merged"] for own in results["losses"].values())
    assert results["experts"] == ["law", "code", "names", "none"]
    assert {expert for _, expert in results["picture"]} <= {0, 1, 2, 3}
    assert [expert.name for expert in kept_experts(tmp_path / "demo" / "model")[0]] == ["law", "code", "names"]
    page = (tmp_path / "demo" / "report.html").read_text()
    assert page.count("<span style=") == len(results["picture"]) + 4  # and the legend
    out = capsys.readouterr().out
    assert "own expert" in out
    assert "Forgetting" in out


def test_what_the_demo_says_of_its_numbers() -> None:
    own = {"base": 5.0, "own": 4.0, "composed": 4.25, "merged": 4.5}
    losses = {"law": own, "code": own, "names": own, "documentation": {**own, "own": 5.5, "composed": 5.125}}
    assert demo.kept(losses) == {"law": 0.75, "code": 0.75, "names": 0.75}
    lines = demo.conclusions({"losses": losses, "kept": demo.kept(losses)})
    assert "law 75%, code 75%, names 75%" in lines[0]
    assert "always on +0.500 nats, the mixture +0.125, merged -0.500" in lines[1]


@pytest.mark.parametrize("name", DOMAINS)
def test_texts_of_the_domains(name: str) -> None:
    train, held_out = (domain_text(name, part) for part in (False, True))
    assert len(train) > 50_000
    assert len(held_out) > 10_000
    assert held_out[:200] not in train
    assert domain_text(name, True) == held_out


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
