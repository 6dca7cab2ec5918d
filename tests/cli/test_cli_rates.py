"""The learning rate and the shape that `mpoe train` takes where none is given."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest

import mpoe.cli.train as train
from mpoe.cli.errors import CommandError
from mpoe.cli.pretrained import Source, find
from mpoe.cli.settle import settle_experts, settle_rate
from mpoe.training.rate_search import find_rate


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
        why = settle_rate(plan, source or find(plan.model.model), plan.experts.build())
        return plan.arguments.learning_rate, why

    return settled


def test_family_shape_and_regime_decide(settle, capsys: pytest.CaptureFixture[str]) -> None:
    assert settle("--model", "t5") == (1.5e-3, "what to start from with a pretrained t5, hidden experts, width 128")
    assert capsys.readouterr().out.startswith("learning_rate 0.0015: what to start from with a pretrained t5")
    assert settle("--shape", "paper")[0] == 1e-3
    assert settle("--max_bond", "8")[1] == "what to start from with a pretrained t5, separable experts, width 128"
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


def test_a_new_run_is_of_hidden_experts(planned, capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned("--model", "t5", "--block_size", "16")
    config = settle_experts(plan, find(plan.model.model))
    assert config is not None
    assert (config.shape, config.top_k, config.block_size) == ("hidden", 2, 16)
    assert (plan.experts.shape, plan.experts.top_k) == ("hidden", 2)  # as it is recorded
    assert "shape hidden, 2 of 8 experts per token: what gained most in our trials" in capsys.readouterr().out
    again = settle_experts(plan, find(plan.model.model))
    assert again == config


@pytest.mark.parametrize(
    "flag",
    ["--linear_trunc=30", "--tensor_learn=true", "--gauge=symmetric", "--capacity_factor=1.5", "--mpo_layers=mlp"],
)
def test_what_other_shapes_have_alone_still_selects_separable(planned, flag: str) -> None:
    plan = planned(flag)
    config = settle_experts(plan, find(plan.model.model))
    assert config is not None
    assert (config.shape, config.top_k) == ("separable", 1)
    assert (plan.experts.shape, plan.experts.top_k, plan.experts.light_p) == ("separable", None, 64)


def test_dense_models_and_dense_experts_have_no_shape_to_speak_of(planned, capsys: pytest.CaptureFixture[str]) -> None:
    for flags in (["--mpo_layers", "nompo", "--moe_type", "none"], ["--expert_type", "dense"]):
        plan = planned(*flags)
        settle_experts(plan, find(plan.model.model))
        assert plan.experts.shape == "separable"  # as it was always recorded
    assert "shape" not in capsys.readouterr().out


def test_a_file_and_a_resumed_run_keep_their_shape(planned, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "old.yaml"
    for text, shape, top_k in (("model: t5\n", "separable", 1), ("shape: hidden\n", "hidden", 1)):
        file.write_text(text)
        config = settle_experts(planned(str(file)), find("t5"))
        assert config is not None
        assert (config.shape, config.top_k) == (shape, top_k)
    assert "shape separable, 1 of 8 experts per token: as the file names none" in capsys.readouterr().out
    (tmp_path / "run").mkdir()
    for kept, shape, top_k in (
        ({}, "separable", 1),  # from before there were shapes
        ({"shape": "separable", "top_k": None}, "separable", 1),
        ({"shape": "hidden", "top_k": None}, "hidden", 1),
        ({"shape": "hidden", "top_k": 2}, "hidden", 2),
    ):
        (tmp_path / "run" / "run.json").write_text(json.dumps({"config": {"experts": kept}}))
        plan = planned("--resume")
        config = settle_experts(plan, find(plan.model.model))
        assert config is not None
        assert (config.shape, config.top_k) == (shape, top_k)
        assert (plan.experts.shape, plan.experts.top_k) == (kept.get("shape"), kept.get("top_k"))


def test_the_model_decides_where_it_must(planned, capsys: pytest.CaptureFixture[str]) -> None:
    """No blocks where there is no module for them; of a converted model its own mixture counts."""
    for kind, shape in (("opt", "separable"), ("mixtral", "separable"), ("phi3", "hidden"), ("bert", "hidden")):
        plan = planned()
        config = settle_experts(plan, Source("somewhere", kind))
        assert config is not None
        assert config.shape == plan.experts.shape == shape
    assert "shape separable, 1 of 8 experts per token: what the model or other options need" in capsys.readouterr().out
    plan = planned()
    settle_experts(plan, Source("somewhere", "mpoe_t5"))
    assert (plan.experts.shape, plan.experts.top_k) == ("separable", None)
    assert "shape" not in capsys.readouterr().out


def test_a_rate_that_is_searched_for_is_recorded_and_kept(
    cli, refused, sentiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpoe.training.rate_search.find_rate", partial(find_rate, steps=3))
    flags = ["train", "--model", "t5", "--data_dir", sentiment, "--max_steps", 1, "--num_experts", 2, "--use_cpu"]
    flags += ["--per_device_train_batch_size", 2, "--find_rate", "--output_dir", tmp_path / "run"]
    assert "give --find_rate or --learning_rate, not both" in refused(*flags, "--learning_rate", 1e-3)
    answer = cli(*flags)
    assert answer.code == 0, answer.err
    record = json.loads((tmp_path / "run" / "run.json").read_text())["config"]
    rate = record["training"]["learning_rate"]
    assert f"learning_rate {rate:g}: the least loss on held-out training items after 30 steps of each" in answer.out
    assert record["learning_rate_from"].startswith("the least loss on held-out")
    answer = cli(*flags, "--resume")
    assert answer.code == 0, answer.err
    assert "least loss" not in answer.out
