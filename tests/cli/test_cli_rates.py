"""The learning rate and the shape that `mpoe train` takes where none is given."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest

import mpoe.cli.train as train
from mpoe.cli.command import CommandError
from mpoe.cli.models import Source, find
from mpoe.cli.settle import settle_experts, settle_rate
from mpoe.training.rates import find_rate


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """``planned("--shape", "paper")``: the `Plan` of `mpoe train` with these tokens."""
    plans: list[train.Plan] = []
    monkeypatch.setattr(train, "run", plans.append)

    def plan(*tokens: str) -> train.Plan:
        train.command([*tokens, "--output_dir", str(tmp_path / "run"), "--use_cpu"])
        return plans.pop()

    return plan


@pytest.fixture
def settle(planned):
    """``settle("--shape", "paper")``: (rate, reason) of `mpoe train` with these tokens."""

    def settled(*tokens: str, source: Source | None = None) -> tuple[float, str]:
        plan = planned(*tokens)
        why = settle_rate(plan, source or find(plan.run.model), plan.experts.build())
        return plan.arguments.learning_rate, why

    return settled


def test_family_shape_and_regime_decide(settle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert settle("--model", "t5") == (1.5e-3, "what to start from with a pretrained t5, hidden experts, width 128")
    assert capsys.readouterr().out.startswith("learning_rate 0.0015: what to start from with a pretrained t5")
    assert settle("--shape", "paper")[0] == 1e-3
    assert settle("--max_bond", "8")[1] == "what to start from with a pretrained t5, separable experts, width 128"
    assert settle("--mpo_layers", "nompo", "--moe_type", "none")[0] == 1e-3
    assert settle("--model", "gpt2")[0] == 3e-4
    assert settle("--model", "gpt2", "--regime", "scratch")[0] == pytest.approx(0.006)
    (tmp_path / "c.yaml").write_text("shape: paper\n")  # a file is no other than flags
    assert settle(str(tmp_path / "c.yaml"))[0] == 1e-3
    capsys.readouterr()
    assert settle("--learning_rate", "5e-5") == (5e-5, "as given")
    assert not capsys.readouterr().out
    (tmp_path / "config.json").write_text('{"model_type": "t5", "d_model": "wide"}')
    with pytest.raises(CommandError, match=r"the configuration of .* cannot be read"):
        settle(source=Source(str(tmp_path), "t5"))


def test_a_resumed_run_keeps_its_rate(settle, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    record = {"config": {"training": {"learning_rate": 5e-5}, "learning_rate_from": "a search"}}
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    assert settle("--resume") == (5e-5, "a search")


@pytest.mark.parametrize(
    ("flags", "kind", "shape", "top_k"),
    [
        (["--block_size", "16"], "t5", "hidden", 2),
        # what other shapes have alone selects separable
        (["--linear_trunc=30"], "t5", "separable", 1),
        (["--tensor_learn=true"], "t5", "separable", 1),
        (["--gauge=symmetric"], "t5", "separable", 1),
        (["--capacity_factor=1.5"], "t5", "separable", 1),
        (["--mpo_layers=mlp"], "t5", "separable", 1),
        # no blocks where there is no module for them
        ([], "opt", "separable", 1),
        ([], "mixtral", "separable", 1),
        ([], "phi3", "hidden", 2),
        ([], "bert", "hidden", 2),
    ],
)
def test_shapes(planned, capsys: pytest.CaptureFixture[str], flags: list, kind: str, shape: str, top_k: int) -> None:
    plan, source = planned(*flags), Source("somewhere", kind)
    config = settle_experts(plan, source)
    assert config is not None
    assert (config.shape, config.top_k) == (shape, top_k)
    assert plan.experts.shape == shape  # as it is recorded
    out = capsys.readouterr().out
    if "--tensor_learn=true" not in flags:
        why = "what gained most in our trials" if shape == "hidden" else "what the model or other options need"
        assert f"shape {shape}, {top_k} of 8 experts per token: {why}" in out
    assert settle_experts(plan, source) == config


def test_where_there_is_no_shape_to_speak_of(planned, capsys: pytest.CaptureFixture[str]) -> None:
    for flags in (["--mpo_layers", "nompo", "--moe_type", "none"], ["--expert_type", "dense"]):
        plan = planned(*flags)
        settle_experts(plan, find(plan.run.model))
        assert plan.experts.shape is None
    assert settle_experts(planned(), Source("somewhere", "mpoe_t5")) is None  # of a converted model its own counts
    assert "shape" not in capsys.readouterr().out


def test_a_rate_that_is_searched_for_is_recorded_and_kept(
    cli, refused, sentiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpoe.training.rates.find_rate", partial(find_rate, steps=3))
    flags = ["train", "--model", "t5", "--data_dir", sentiment, "--max_steps", 1, "--num_experts", 2, "--use_cpu"]
    flags += ["--per_device_train_batch_size", 2, "--find_rate", "--output_dir", tmp_path / "run"]
    assert "give --find_rate or --learning_rate, not both" in refused(*flags, "--learning_rate", 1e-3)
    answer = cli(*flags)
    record = json.loads((tmp_path / "run" / "run.json").read_text())["config"]
    rate = record["training"]["learning_rate"]
    assert f"learning_rate {rate:g}: the least loss on held-out training items after 30 steps of each" in answer.out
    assert record["learning_rate_from"].startswith("the least loss on held-out")
    answer = cli(*flags, "--resume")
    assert "least loss" not in answer.out
