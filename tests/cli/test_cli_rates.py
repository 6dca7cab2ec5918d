"""The learning rate that `mpoe train` takes where none is given."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import mpoe.cli.train as train
from mpoe.cli.errors import CommandError
from mpoe.cli.pretrained import Source, find
from mpoe.cli.starting_rate import settle_rate


@pytest.fixture
def settle(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """``settle("--shape", "paper")``: (rate, reason) of `mpoe train` with these tokens."""
    plans: list[train.Plan] = []
    monkeypatch.setattr(train, "run", plans.append)

    def settled(*tokens: str, source: Source | None = None) -> tuple[float, str]:
        train.command([*tokens, "--output_dir", str(tmp_path / "run"), "--use_cpu"])
        plan = plans.pop()
        why = settle_rate(plan, source or find(plan.model.model), plan.experts.build())
        return plan.arguments.learning_rate, why

    return settled


def test_family_shape_and_regime_decide(settle, capsys: pytest.CaptureFixture[str]) -> None:
    assert settle("--model", "t5") == (1.5e-3, "what to start from with a pretrained t5, separable experts, width 128")
    assert capsys.readouterr().out.startswith("learning_rate 0.0015: what to start from with a pretrained t5")
    assert settle("--shape", "paper")[0] == 1e-3
    assert settle("--mpo_layers", "nompo", "--moe_type", "none")[0] == 1e-3
    assert settle("--model", "gpt2")[0] == 3e-4
    assert settle("--model", "gpt2", "--regime", "scratch")[0] == pytest.approx(0.006)
    capsys.readouterr()
    assert settle("--learning_rate", "5e-5") == (5e-5, "as given")
    assert not capsys.readouterr().out


def test_a_file_without_a_rate_and_a_resumed_run_keep_theirs(settle, tmp_path: Path) -> None:
    file = tmp_path / "old.yaml"
    file.write_text("model: t5\nshape: paper\n")
    rate, why = settle(str(file))
    assert rate == 5e-5
    assert "the file names none; 0.001 is what to start from" in why
    file.write_text("learning_rate: 1e-4\n")
    assert settle(str(file)) == (1e-4, "as given")
    (tmp_path / "run").mkdir()
    old = {"config": {"training": {"learning_rate": 5e-5}}}  # as version 0.1 wrote it
    (tmp_path / "run" / "run.json").write_text(json.dumps(old))
    assert settle("--resume") == (5e-5, "as the run began")
    old["config"]["learning_rate_from"] = "as given"
    (tmp_path / "run" / "run.json").write_text(json.dumps(old))
    assert settle("--resume") == (5e-5, "as given")
    (tmp_path / "run" / "run.json").write_text("{")  # refused later, with its reason
    assert settle("--resume")[0] == 1.5e-3


def test_a_configuration_that_cannot_be_read(settle, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "t5", "d_model": "wide"}')
    with pytest.raises(CommandError, match=r"the configuration of .* cannot be read"):
        settle(source=Source(str(tmp_path), "t5"))
