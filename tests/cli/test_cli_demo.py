"""What the demos write and say, in few steps; the demos themselves run in test_cli_slow.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mpoe.cli import demo
from mpoe.cli.main import run
from mpoe.data.demo_texts import DOMAINS, domain_text
from mpoe.models.expert_mixture import kept_experts


def test_a_short_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setitem(demo.SETTINGS, "t5", {**demo.SETTINGS["t5"], "batch": 2})
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
    short = {name: " ".join(f"{name} of {number}" for number in range(2000)) for name in DOMAINS}
    monkeypatch.setattr("mpoe.data.demo_texts.domain_text", lambda name, held_out: short[name])
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
