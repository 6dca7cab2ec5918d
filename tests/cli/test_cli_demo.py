"""The demos' arithmetic and words; the demos themselves run in test_cli_slow.py."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from mpoe import plotting
from mpoe.cli import demo, demo_experts
from mpoe.cli.demo_arms import SETTINGS, Settings, count_parameters, training_items, with_steps
from mpoe.cli.demo_cost import large_costs
from mpoe.cli.demo_tables import (
    check,
    comparison_lines,
    comparison_table,
    show_comparison,
    what_holds,
)
from mpoe.cli.report import write_demo_report
from mpoe.data.demo_texts import DOMAINS, domain_text
from mpoe.models.expert_mixture import kept_experts


def arms_of(kind: str, switch: float, mpoe: float, experts: int = 400) -> list[dict]:
    metric = "perplexity" if kind == "gpt2" else "accuracy"
    arms = []
    for arm in SETTINGS[kind].arms:
        value = {"switch": switch, "hidden": mpoe}.get(arm.key, mpoe)
        count = {"total": 2000, "experts": 1000, "central": 0, "auxiliary": 0}
        if arm.key in ("hidden", "separable"):
            count = {"total": 1400, "experts": experts, "central": experts // 2, "auxiliary": experts - experts // 2}
        arms.append(
            {
                "key": arm.key,
                "name": arm.name,
                "parameters": count,
                "scores": {"doc": {metric: value, "items": 2500}},
                "mean": value,
                "baselines": {"doc": {metric: 0.25}},
                "remarks": [],
                "seconds": 10.0,
                "loss": [(1, 3.0), (2, 2.5)],
                "expert_load": [[3, 5], [4, 4]] if arm.experts else [],
                "conversion_difference": None if arm.key == "dense" else 3e-7,
                "large": {"parameters": 223e6 if arm.experts is None else 250e6, "forward": 1.1, "training": 1.25},
            }
        )
    return arms


@pytest.mark.parametrize(
    ("kind", "switch", "mpoe", "experts", "held"),
    [
        ("t5", 0.70, 0.69, 400, True),
        ("t5", 0.70, 0.67, 400, False),
        ("t5", 0.70, 0.70, 500, False),
        ("t5", 0.96, 0.96, 400, False),
        ("gpt2", 30.0, 30.5, 400, True),
        ("gpt2", 30.0, 31.0, 400, False),
    ],
)
def test_claim(kind: str, switch: float, mpoe: float, experts: int, held: bool) -> None:
    answer = check(arms_of(kind, switch, mpoe, experts), SETTINGS[kind])
    assert answer["held"] is held
    assert ("did NOT hold" in answer["statement"]) is not held
    assert answer["test_items"] == 2500


def test_comparison_says_what_is_equal_and_what_is_counted() -> None:
    text = " ".join(comparison_lines(SETTINGS["t5"]))
    for words in ("same start", "120 steps", "same order", "validation", "one seed", "does not show"):
        assert words in text


def results_of(arms: list[dict], settings: Settings) -> dict:
    """As in results.json."""
    return {
        "model": "t5",
        "seed": 0,
        "steps": 2,
        "comparison": comparison_lines(settings),
        "arms": arms,
        "holds": what_holds(arms, settings),
        "check": check(arms, settings),
        "score": "mean test score here, per cent",
        "large": "T5-base",
        "examples": [{"prompt": "<b>", "expected": "x", "generated": "y"}],
        "stages": {"train": 1.0},
        "reloaded_equal": True,
        "versions": {"mpoe": "0"},
    }


def test_table_and_report_show_every_arm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = SETTINGS["t5"]
    arms = arms_of("t5", 0.7, 0.71)
    header, rows = comparison_table(arms, settings)
    assert len(rows) == 6
    assert rows[0][:6] == ["dense", "-", "1.00", "223", "1.25", "71.0"]
    assert rows[3][:5] == ["MPOE", "2", "0.40", "250", "1.25"]
    assert rows[-1] == ["baseline", "-", "-", "-", "-", "25.0", "25.0"]
    assert all(len(row) == len(header) for row in rows)
    results = results_of(arms, settings)
    write_demo_report(tmp_path / "report.html", copy.deepcopy(results), header, rows)
    text = (tmp_path / "report.html").read_text()
    assert "&lt;b&gt;" in text
    assert all(arm["name"] in text for arm in arms)
    assert "http-equiv" not in text
    assert "src=" not in text  # self-contained
    if plotting.have_matplotlib():
        assert text.count("<svg") == 3 + 2 + 3
    monkeypatch.setattr(plotting, "have_matplotlib", lambda: False)
    write_demo_report(tmp_path / "report.html", results, header, rows)
    assert "mpoe[report]" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("kind", ["t5", "gpt2"])
def test_the_table_fits_eighty_columns(kind: str) -> None:
    settings, arms = SETTINGS[kind], arms_of(kind, 0.7, 0.71)
    header, rows = comparison_table(arms, settings)
    rows = [[cell if cell != "223" else "1,016" for cell in row] for row in rows]
    printed = io.StringIO()
    show_comparison(Console(width=80, file=printed), results_of(arms, settings), header, rows)
    assert "MPOE separable" in printed.getvalue()
    assert "…" not in printed.getvalue()


def test_parameters_count_weights_of_experts_alone() -> None:
    report = {"central": 10, "auxiliary": 6, "expert": 0, "router": 3, "rest": 100, "total": 119, "dense_total": 108}
    assert count_parameters(report) == {"total": 119, "experts": 16, "central": 10, "auxiliary": 6}
    assert count_parameters(report, dense=True) == {"total": 108, "experts": 8, "central": 0, "auxiliary": 0}
    assert count_parameters(report, dense=True, grown=5)["experts"] == 13


@pytest.mark.slow  # eight experts of T5-base's size
def test_costs_of_the_large_model() -> None:
    costs = large_costs(SETTINGS["t5"], tokens=4, rounds=1)
    millions = {key: round(cost["parameters"] / 1e6, 1) for key, cost in costs.items()}
    assert millions["dense"] == 222.9
    assert millions["separable"] == 249.8
    assert millions["hidden"] == 298.5
    assert millions["switch"] == 1015.8
    assert abs(millions["wider"] - millions["hidden"]) < 0.3
    assert costs["dense"]["training"] == 1.0
    assert all(cost["forward"] > 0 for cost in costs.values())


class _Tokens:
    eos_token_id, pad_token_id = 1, 0

    def __call__(self, texts: list[str], **_: object) -> dict:
        return {"input_ids": [[len(text) + 2, 1] for text in texts]}


class _Task:
    kind, max_source_length, max_target_length = "classification", 8, 8

    def __init__(self, name: str, size: int) -> None:
        from mpoe.data.task import Example

        self.items = tuple(Example("s" * (i + (100 if name == "b" else 0)), "t") for i in range(size))

    def examples(self, split: str) -> tuple:
        return self.items


def test_order_of_items_is_a_function_of_the_seed_and_one_task_per_step() -> None:
    settings = with_steps(SETTINGS["t5"], 6)
    tasks = [_Task("a", 50), _Task("b", 50)]
    first = training_items(settings, tasks, _Tokens(), 6, seed=1)
    assert first == training_items(settings, tasks, _Tokens(), 6, seed=1)
    assert first != training_items(settings, tasks, _Tokens(), 6, seed=2)
    assert len(first) == 6 * settings.batch
    for step in range(6):
        lengths = [item["input_ids"][0] for item in first[step * settings.batch : (step + 1) * settings.batch]]
        assert all(n >= 102 for n in lengths) or all(n < 102 for n in lengths)


def test_a_short_demo_of_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(demo_experts, "TESTED", 2)
    demo.command(["--output_dir", str(tmp_path / "demo"), "--steps", "2"])
    results = json.loads((tmp_path / "demo" / "results.json").read_text())
    assert list(results["losses"]) == ["law", "code", "names", "documentation"]
    assert all(list(own) == ["base", "own", "composed", "merged"] for own in results["losses"].values())
    assert results["experts"] == ["law", "code", "names", "none"]
    assert {expert for _, expert in results["picture"]} <= {0, 1, 2, 3}
    assert [expert.name for expert in kept_experts(tmp_path / "demo" / "model")[0]] == ["law", "code", "names"]
    page = (tmp_path / "demo" / "report.html").read_text()
    assert page.count("<span style=") == len(results["picture"]) + 4
    out = capsys.readouterr().out
    assert "own expert" in out
    assert "Forgetting" in out


def test_what_the_demo_says_of_its_numbers() -> None:
    own = {"base": 5.0, "own": 4.0, "composed": 4.25, "merged": 4.5}
    losses = {"law": own, "code": own, "names": own, "documentation": {**own, "own": 5.5, "composed": 5.125}}
    assert demo_experts.kept(losses) == {"law": 0.75, "code": 0.75, "names": 0.75}
    lines = demo_experts.conclusions({"losses": losses, "kept": demo_experts.kept(losses)})
    assert "law 75%, code 75%, names 75%" in lines[0]
    assert "always on +0.500 nats, the mixture +0.125, merged -0.500" in lines[1]
    assert demo_experts.rows_of(losses)[3] == ["documentation", "5.000", "5.500", "5.125", "4.500"]


@pytest.mark.parametrize("name", DOMAINS)
def test_texts_of_the_domains(name: str) -> None:
    train, held_out = (domain_text(name, part) for part in (False, True))
    assert len(train) > 50_000
    assert len(held_out) > 10_000
    assert held_out[:200] not in train
    assert domain_text(name, True) == held_out
