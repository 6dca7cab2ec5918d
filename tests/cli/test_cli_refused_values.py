"""Values that a command refuses by itself, and models and runs that it cannot take."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from mpoe.cli import bench
from mpoe.cli.errors import CommandError
from mpoe.cli.options import ExperimentOptions
from mpoe.cli.train import take_layers

RUN = ["train", "--output_dir", "run"]
HERE = [*RUN, "--data_dir", "."]
ENCODER = "is an encoder (bert)"


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty working folder but for an encoder, of which a configuration is enough, a file and some data."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "spoilt").mkdir()
    (tmp_path / "spoilt" / "config.json").write_text('{"model_type": "t5"}')
    (tmp_path / "spoilt" / "run.json").write_text('{"config": {"described": {"a": 3}}}')
    (tmp_path / "notes").write_text("no model")
    for split in ("train", "validation"):
        (tmp_path / f"{split}.csv").write_text("text,label\na,0\nb,1\n")
    return tmp_path


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "gpt2", "--prompt", "x", "--temperature", 0], "temperature must be greater than 0; got 0.0"),
        (["generate", "bert", "--prompt", "x"], f"bert {ENCODER}: it cannot generate text"),
        (["generate", "notes", "--prompt", "x"], "model must be a folder, a hub name, t5 or gpt2; notes is a file"),
        (
            ["generate", "no-such/model", "--prompt", "x"],
            "'no-such/model' is not a folder here, no built-in model (t5, gpt2), and",
        ),
        (["evaluate", "bert"], f"bert {ENCODER} without a head for labels (mpoe train)"),
        (["evaluate", "spoilt"], "described in run.json does not describe tasks: task a must be a mapping of fields"),
        (["evaluate", "t5", "--batch_size", 0], "batch_size must be at least 1; got 0"),
        (["evaluate", "--load_experiment", "run"], "load_experiment must be the folder of an earlier run; got 'run'"),
        (["evaluate", "--load_experiment", "."], "load_experiment: . holds neither a model nor a complete checkpoint"),
        (
            [*RUN, "--model", "bert", "--tasks", "doc_lm"],
            "task doc_lm is language_modeling; a BERT does classification",
        ),
        (
            [*RUN, "--model", "bert", "--tasks", "doc_kind,doc_module"],
            "tasks must be one for an encoder, which has one",
        ),
        ([*RUN, "--model", "t5", "--load_experiment", "."], "load_experiment says which model to start from"),
        ([*RUN, "--shape", '{"up": 3}'], "shape['up'] must be an MPOShape or its mapping; got int 3"),
        ([*RUN, "--accelerator_config", "lost"], "accelerator_config: [Errno 2] No such file or directory: 'lost'"),
        ([*RUN, "--load_best_model_at_end"], "load_best_model_at_end requires"),
        ([*RUN, "--load_layer", "mlp"], "load_layer needs load_experiment"),
        ([*RUN, "--tasks", "rte", "--data_dir", "absent"], "data_dir must be an existing folder; got 'absent'"),
        ([*HERE, "--label_words", "{"], "label_words: bad JSON at character 1: Expecting property name"),
        ([*HERE, "--label_words", "[3]"], "label_words must be a JSON object, label -> word; got [3]"),
        ([*HERE, "--split_validation_test"], "which split_validation_test divides, must hold at least two"),
        (
            [*RUN, "--mpo_layers", "mpl"],
            "mpo_layers must be among word_embed, mlp, attention, pooler, nompo; got 'mpl'",
        ),
        (["trian"], "no such command 'trian'"),
        (["generate"], "generate needs a model first: mpoe generate MODEL_DIR"),
        (["generate", "t5", "--promt", "x"], "unknown option '--promt'; did you mean '--prompt'?"),
        (["generate", "t5", "--max_new_tokens", "many"], "invalid int value: 'many'"),
        (["bench", "quick"], "values without an option: 'quick'"),
        (["bench", "--minutes", 0], "minutes must be greater than 0; got 0.0"),
    ],
)
def test_refused_values(refused, arguments: list, message: str) -> None:
    assert message in refused(*arguments)


def test_what_cannot_be_read_says_where_help_is(refused) -> None:
    assert refused("trian").endswith("(see mpoe --help)")
    assert refused("generate").endswith("(see mpoe generate --help)")


def test_components_of_an_earlier_run_need_a_mixture() -> None:
    with pytest.raises(CommandError, match="load_layer needs a model with MPO layers; this one stays dense"):
        take_layers(SimpleNamespace(), ExperimentOptions("run", ["mlp"]))


def test_benchmarks_that_are_wrong_or_absent(refused, monkeypatch: pytest.MonkeyPatch, here: Path) -> None:
    monkeypatch.setattr(bench, "_measure", lambda options: {"failures": ["linear: a wrong sum"]})
    assert "wrong or failed: linear: a wrong sum" in refused("bench")

    monkeypatch.setattr(bench, "importlib", SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: None)))
    assert "the benchmarks are not installed: no package mpoe_bench" in refused("bench", "--out", "other")
