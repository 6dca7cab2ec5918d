"""Every refusal: exit code 2, one line that names what was expected and what came, and nothing written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from mpoe.cli import bench
from mpoe.cli.errors import CommandError
from mpoe.cli.options import ExperimentOptions
from mpoe.cli.train import take_layers
from mpoe.data.embedded import stand_in_path


def train_flags(folder: Path, data: Path, *more: object) -> list[object]:
    return ["train", "--model", "t5", "--data_dir", data, "--output_dir", folder, "--max_steps", 1, *more]


def test_unknown_option_of_train_names_close_matches(refused, tmp_path: Path) -> None:
    line = refused("train", "--output_dir", tmp_path / "run", "--num_expert", 4)
    assert "'--num_expert'" in line
    assert "'--num_experts'" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_experts", 0], "num_experts must be at least 1; got 0"),
        (["--shape", "separabel"], "shape must be one of"),
        (["--shape", '{"up": '], "shape: bad JSON"),
        (["--max_bond", 0], "max_bond must be at least 1; got 0"),
        (["--gauge", "landau"], "gauge must be one of"),
        (["--backend", "quantum"], "backend must be one of"),
        (["--moe_type", "mixture"], "moe_type must be one of switch, moe, none; got 'mixture'"),
        (["--top_k", 9], "top_k must be at most num_experts = 8; got 9"),
        (["--gradient_mask_prob", 1.5], "gradient_mask_prob must be between 0 and 1"),
        (["--regime", "dreaming"], "invalid choice: 'dreaming'"),
        (["--n_train", 0], "n_train must be >= 1 or unset; got 0"),
        (["--temperature", 0], "temperature must be > 0; got 0"),
        (["--max_source_length", 1], "max_source_length must be at least 2"),
        (["--learning_rate", "fast"], "invalid float value: 'fast'"),
        (["--layers_to_transform", 77], "layers_to_transform must hold layer indices 0..1; got 77"),
        (["--exclude_modules", "encoder.blok.0"], "exclude_modules names 'encoder.blok.0'"),
        (["--overwrite", "--resume"], "exclude each other"),
    ],
)
def test_values_that_do_not_fit(refused, sentiment: Path, tmp_path: Path, flags: list, message: str) -> None:
    assert message in refused(*train_flags(tmp_path / "run", sentiment, *flags))
    assert not (tmp_path / "run").exists()


def test_no_output_folder(refused, sentiment: Path) -> None:
    assert "--output_dir" in refused("train", "--model", "t5", "--data_dir", sentiment)


def test_a_hub_that_does_not_answer_is_asked_once(refused, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    asked: list[object] = []

    def no_way(address: object, timeout: float) -> None:
        asked.append(address)
        raise OSError("unreachable")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("socket.create_connection", no_way)
    line = refused("generate", "no-such-run", "--prompt", "x")
    assert "'no-such-run' is not a folder here, no built-in model (t5, gpt2), and the hub did not give it" in line
    assert asked == [("huggingface.co", 443)]


def test_unknown_model_family_lists_the_known_ones(refused, tmp_path: Path) -> None:
    folder = tmp_path / "mamba"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "mamba"}')
    for command in (
        ["train", "--output_dir", tmp_path / "run", "--model", folder],
        ["convert", folder, tmp_path / "out"],
    ):
        line = refused(*command)
        assert "'mamba'" in line
        assert {"t5", "gpt2", "llama", "bert"} <= set(line.replace(",", " ").split())


def test_models_that_are_not_there(refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    assert "holds no config.json" in refused("generate", tmp_path / "empty", "--prompt", "x")
    assert "no such folder" in refused("generate", tmp_path / "absent", "--prompt", "x")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "first").mkdir(parents=True)
    assert "no such folder: runs/frist; did you mean 'first'?" in refused("generate", "runs/frist", "--prompt", "x")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    assert "config.json is not readable" in refused("evaluate", tmp_path / "broken")


def test_arguments_of_the_other_commands(refused, tmp_path: Path) -> None:
    assert "two arguments" in refused("convert", "t5")
    assert "nothing to convert" in refused(
        "convert", "t5", tmp_path / "out", "--moe_type", "none", "--expert_type", "dense"
    )
    assert "num_experts must be at least 1" in refused("convert", "t5", tmp_path / "out", "--num_experts", 0)
    assert "needs a prompt" in refused("generate", "t5")
    assert "no such file" in refused("generate", "t5", "--file", tmp_path / "absent.txt")
    assert "max_new_tokens must be at least 1" in refused("generate", "t5", "--prompt", "x", "--max_new_tokens", 0)
    assert "split must be one of train, validation, test" in refused("evaluate", "t5", "--split", "tset")
    assert "unknown option '--splitt'" in refused("evaluate", "t5", "--splitt", "test")
    assert "needs a model first" in refused("evaluate", "--split", "test")
    assert "argument --model: invalid choice: 't5x'" in refused("demo", "--model", "t5x")
    assert "model is for --compare" in refused("demo", "--model", "gpt2", "--output_dir", tmp_path / "demo")
    assert "steps must be at least 1" in refused("demo", "--steps", 0, "--output_dir", tmp_path / "demo")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "demo").exists()


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a model fails the test: what is refused must be refused before."""

    def load(source: object) -> None:
        raise AssertionError("a model was loaded before the refusal")

    monkeypatch.setattr("mpoe.cli.pretrained.load_model", load)


@pytest.mark.usefixtures("no_model")
def test_refusals_of_train_come_before_the_model(refused, sentiment: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert "nothing to resume" in refused(*train_flags(run, sentiment, "--resume"))
    assert not run.exists()
    run.mkdir()
    (run / "run.json").write_text('{"config": {"model": "gpt2"}}')
    line = refused(*train_flags(run, sentiment, "--resume"))
    assert "with a different configuration" in line
    assert "model: was 'gpt2', now 't5'" in line
    (sentiment / "train.jsonl").unlink()
    assert "must hold a train file" in refused(*train_flags(tmp_path / "new", sentiment))
    assert not (tmp_path / "new").exists()


@pytest.mark.usefixtures("no_model")
def test_scores_need_an_existing_folder(refused, sentiment: Path, tmp_path: Path) -> None:
    flags = ["evaluate", "t5", "--data_dir", sentiment, "--output_file"]
    assert "output_file must be in an existing folder" in refused(*flags, tmp_path / "absent" / "scores.json")
    assert "output_file must be a file" in refused(*flags, tmp_path)


def test_second_demo_needs_overwrite(refused, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("{}")
    assert "give --overwrite" in refused("demo", "--output_dir", tmp_path)
    assert (tmp_path / "results.json").read_text() == "{}"
    (tmp_path / "run.json").write_text("{}")
    assert "holds another run" in refused("demo", "--output_dir", tmp_path, "--overwrite")


@pytest.mark.usefixtures("no_model")
def test_empty_prompts_and_files_in_other_encodings(refused, tmp_path: Path) -> None:
    assert "--prompt must hold some text" in refused("generate", "gpt2", "--prompt", "")
    (tmp_path / "prompts.txt").write_bytes("caf\u00e9".encode("latin-1"))
    assert "--file must be UTF-8 text; byte 3" in refused("generate", "gpt2", "--file", tmp_path / "prompts.txt")
    (tmp_path / "c.yaml").write_bytes("model: caf\u00e9".encode("latin-1"))
    assert "the configuration file must be UTF-8 text; byte 10" in refused("train", tmp_path / "c.yaml")


@pytest.mark.usefixtures("no_model")
def test_two_tasks_of_one_name(refused, sentiment: Path, tmp_path: Path) -> None:
    line = refused(*train_flags(tmp_path / "run", tmp_path, "--tasks", "sentiment", "./sentiment"))
    assert "tasks must have different names; sentiment and ./sentiment are both sentiment" in line


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: os.truncate(folder / "model.safetensors", 5000), "must be a whole safetensors file"),
        (lambda folder: os.rename(folder / "model.safetensors", folder / "pytorch_model.bin"), "cannot be loaded"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "no usable tokenizer"),
    ],
    ids=["cut", "no_pickle", "tokenizer"],
)
def test_damaged_dense_models(refused, tmp_path: Path, spoil: Callable[[Path], object], message: str) -> None:
    shutil.copytree(stand_in_path("t5"), tmp_path / "t5")
    spoil(tmp_path / "t5")
    assert message in refused("convert", tmp_path / "t5", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_model")
def test_numbers_beyond_what_there_is(refused, sentiment: Path, tmp_path: Path) -> None:
    assert "seed must be at least 0; got -1" in refused(*train_flags(tmp_path / "run", sentiment, "--seed", -1))
    assert "data_seed must be below 2**32" in refused(*train_flags(tmp_path / "run", sentiment, "--data_seed", 2**32))
    assert "seed must be below 2**32" in refused("generate", "t5", "--prompt", "x", "--seed", 2**40)
    assert "seed must be at least 0" in refused("demo", "--output_dir", tmp_path / "demo", "--seed", -1)
    line = refused(*train_flags(tmp_path / "run", sentiment, "--max_steps", 10**9))
    assert "max_steps x batch x accumulation must be at most" in line
    deep = "[" * 100_000
    assert "label_words: bad JSON" in refused(*train_flags(tmp_path / "run", sentiment, "--label_words", deep))
    assert "shape_pattern: bad JSON" in refused(*train_flags(tmp_path / "run", sentiment, "--shape_pattern", deep))
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("no_model")
def test_outputs_and_inputs_of_convert(refused, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    assert "OUT" in refused("convert", "t5", tmp_path / "out")
    shutil.copytree(stand_in_path("t5"), tmp_path / "t5")
    assert "OUT must be another folder than IN" in refused("convert", tmp_path / "t5", tmp_path / "t5")
    (tmp_path / "out" / "config.json").write_text('{"model_type": "mpoe_t5"}')
    assert "IN is converted already (mpoe_t5)" in refused("convert", tmp_path / "out", tmp_path / "new")
    line = refused("convert", "t5", tmp_path / "new", "--original_checkpoint", "x", "--num_experts", 2)
    assert "num_experts cannot be given with it" in line
    line = refused("convert", "t5", tmp_path / "new", "--mpo_layers", "mlp", "--target_modules", "ffn")
    assert "mpo_layers sets target_modules and expert_type" in line
    assert "mpo_layers must be nompo alone" in refused("convert", "t5", tmp_path / "new", "--mpo_layers", "mlp,nompo")
    assert not (tmp_path / "new").exists()


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
