"""Every refusal: exit code 2, one line, and nothing written. What commands write is whole or not
there."""

import importlib.util
import json
import os
import shutil
import sys

import pytest

from mpoe.cli import bench, models
from mpoe.data.stand_in_models import stand_in_path
from mpoe.models import weight_files
from mpoe.training.published import staging_folder
from tests.assertions import refuses

from .cli_data import write_rows

RUN = "train --output_dir run"
HERE = f"{RUN} --data_dir . --max_steps 1"
DEEP = "[" * 100_000
REFUSED = {
    # values that do not fit
    HERE + """ --shape '{"up": '""": "shape: bad JSON",
    f"{HERE} --shape_pattern {DEEP}": "shape_pattern: bad JSON",
    f"{HERE} --backend quantum": "backend must be one of",
    f"{HERE} --regime dreaming": "invalid choice: 'dreaming'",
    f"{HERE} --seed -1": "seed must be at least 0; got -1",
    f"{HERE} --data_seed {2**32}": "data_seed must be below 2**32",
    f"{HERE} --max_steps {10**9}": "max_steps x items of a step must be at most",
    f"{RUN} --accelerator_config lost": (
        "accelerator_config: [Errno 2] No such file or directory: 'lost'"
    ),
    f"{RUN} --load_best_model_at_end": "load_best_model_at_end requires",
    "generate t5 --prompt x --temperature 0": "temperature must be greater than 0; got 0.0",
    "generate t5 --prompt x --max_new_tokens 0": "max_new_tokens must be at least 1",
    f"generate t5 --prompt x --seed {2**40}": "seed must be below 2**32",
    "evaluate t5 --batch_size 0": "batch_size must be at least 1; got 0",
    "evaluate t5 --split tset": "got 'tset' (did you mean 'test'?)",
    "demo --steps 0 --output_dir run": "steps must be at least 1",
    "bench --minutes -1": "minutes must be at least 0; got -1.0",
    "plan t5-bse": "did you mean 't5-base'",
    "plan t5-base --experts 0": "experts must be at least 1; got 0",
    "plan t5-base --tokens -1": "tokens must be at least 0; got -1",
    "plan t5-base --dtype int8": "argument --dtype: invalid choice: 'int8'",
    "plan t5-base --expert_type dense": "got no MPO experts",
    "plan t5-base --json absent/plan.json": "json must be in an existing folder",
    "plan --experts 8": "plan needs a model first",
    # words and options that are missing, unknown or exclude each other
    "trian": "no such command 'trian'; did you mean 'train'? (see mpoe --help)",
    "train --model t5 --data_dir .": "train needs --output_dir",
    f"{HERE} --overwrite --resume": "exclude each other",
    f"{HERE} --resume_from_checkpoint run": (
        "resume_from_checkpoint is no option of mpoe train: --resume"
    ),
    f"{HERE} --do_predict": "do_predict is no option of mpoe train: mpoe evaluate",
    f"{HERE} --model t5 --load_experiment .": "load_experiment says which model to start from",
    f"{HERE} --load_layer mlp": "load_layer needs load_experiment",
    f"{HERE} --resume": "nothing to resume",
    f"{HERE} --resume --output_dir spoilt": (
        "different configuration (model: was 'gpt2', now 't5'; "
    ),
    f"{HERE} --mpo_layers mpl": "mpo_layers must be one of 'word_embed', 'mlp', 'attention',",
    "convert t5 run --mpo_layers mlp,nompo": "mpo_layers must be nompo alone",
    "convert t5 run --mpo_layers mlp --target_modules ffn": "mpo_layers sets target_modules",
    "convert t5 run --original_checkpoint x --num_experts 2": "num_experts cannot be given with it",
    "convert t5 run --moe_type none --expert_type dense": "nothing to convert",
    "export mixture run --to mistral": "argument --to: invalid choice: 'mistral'",
    "convert t5": "convert needs two arguments",
    "generate --seed 1": "generate needs a model first: mpoe generate MODEL_DIR",
    "generate t5": "needs a prompt",
    "generate gpt2 --prompt ''": "--prompt must hold some text",
    "evaluate --split test": "evaluate needs a model first",
    "demo --model gpt2 --output_dir run": "model is for --compare",
    "bench quick": "values without an option: 'quick'",
    # files and folders
    "generate t5 --file absent.txt": "no such file",
    "generate gpt2 --file latin": "--file must be UTF-8 text; byte 3",
    "train latin.yaml": "the configuration file must be UTF-8 text; byte 3",
    "generate notes --prompt x": "model must be a folder, a hub name, t5 or gpt2; notes is a file",
    "generate empty --prompt x": "holds no config.json",
    "generate ./absent --prompt x": "no such folder",
    "generate runs/frist --prompt x": "no such folder: runs/frist; did you mean 'first'?",
    "generate no-such/model --prompt x": (
        "'no-such/model' is not a folder here, no built-in model (t5, "
    ),
    "evaluate broken": "broken/config.json, line 1, column 2: bad JSON",
    "evaluate spoilt": "task a must be a mapping; got int",
    "evaluate --load_experiment run": (
        "load_experiment must be the folder of an earlier run; got 'run'"
    ),
    "evaluate --load_experiment .": (
        "load_experiment: . holds neither its run's model nor a complete checkpoint"
    ),
    "evaluate t5 --data_dir . --output_file no/s.json": "output_file must be in an existing folder",
    "evaluate t5 --data_dir . --output_file empty": "output_file must be a file",
    "demo --output_dir old": "old holds an earlier demo; give --overwrite",
    "demo --output_dir spoilt --overwrite": "holds a model or a run; choose another folder",
    "bench --out spoilt --overwrite": "holds a model or a run; choose another folder",
    "convert t5 bert": "OUT bert holds a model; give --overwrite",
    "convert t5 spoilt --overwrite": "OUT spoilt holds run.json, which mpoe did not write",
    "convert t5 ''": "OUT must be a folder; got '', which is no name",
    "convert t5 a\0b": "which is no name in UTF-8",
    "convert t5 /proc/x": "OUT must be a folder that can be created; /proc holds none",
    "demo --output_dir ''": "output-dir: must not be empty",
    "convert bert bert": "OUT must be another folder than IN",
    "convert mixture run": "IN is converted already (mpoe_t5)",
    # models and data that do not fit each other
    "generate bert --prompt x": "bert is an encoder (bert): it cannot generate text",
    "evaluate bert": "bert is an encoder (bert) without a head for labels (mpoe train)",
    f"{RUN} --model bert --tasks doc_lm": (
        "task doc_lm is language_modeling; a BERT does classification"
    ),
    f"{RUN} --model bert --tasks two,doc_module --data_dir .": (
        "tasks must be one for an encoder, which has one"
    ),
    f"{RUN} --tasks rte --data_dir absent": "data_dir must be an existing folder; got 'absent'",
    f"{RUN} --data_dir . --tasks two ./two": "tasks must have different names; got two, two",
    f"{HERE} --label_words '{{'": "label_words: bad JSON: Expecting property name",
    f"{HERE} --label_words '[3]'": "label_words must be a JSON object, label -> word; got [3]",
    f"{HERE} --split_validation_test": "which split_validation_test divides,",
}


@pytest.fixture
def here(monkeypatch, tmp_path):
    """A working folder with data, a file, and models of which a configuration is enough; none may
    be loaded."""

    def load(*_):
        raise AssertionError("a model was loaded before the refusal")

    monkeypatch.setattr("mpoe.cli.models.load_model", load)
    monkeypatch.chdir(tmp_path)
    for name, text in {
        "bert": '{"model_type": "bert"}',
        "spoilt": '{"model_type": "t5"}',
        "broken": "{",
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    (tmp_path / "mixture").mkdir()
    (tmp_path / "mixture/config.json").write_text('{"model_type": "mpoe_t5"}')
    config = {"model": "gpt2", "described": {"a": 3}, "training": {"learning_rate": 1}}
    (tmp_path / "spoilt/run.json").write_text(json.dumps({"config": config}))
    (tmp_path / "notes").write_text("no model")
    for name in ("latin", "latin.yaml"):
        (tmp_path / name).write_bytes("caf\u00e9".encode("latin-1"))
    for name in ("empty", "runs/first", "two", "old"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "old/results.json").write_text("{}")
    write_rows(tmp_path / "two/train.jsonl", [{"text": word, "label": word} for word in "ab"])
    write_rows(tmp_path / "two/test.jsonl", [{"text": "a", "label": "a"}])
    for split in ("train", "validation"):
        (tmp_path / f"{split}.csv").write_text("text,label\na,0\nb,1\n")
    return tmp_path


@pytest.mark.parametrize("line, message", REFUSED.items(), ids=[line[:40] for line in REFUSED])
def test_refused(refused, here, line, message):
    assert message in refused(line)
    assert not (here / "run").exists()
    assert (here / "old/results.json").read_text() == "{}"


@pytest.mark.parametrize(
    "command, missing, extra",
    [
        ("train --output_dir run", "sklearn", "train"),
        ("evaluate run", "datasets", "train"),
        ("compare run run", "matplotlib", "report"),
        ("inspect run", "scipy", "train"),
        ("demo --compare --output_dir run", "matplotlib", "train"),
    ],
    ids=["train", "evaluate", "compare", "inspect", "demo"],
)
def test_a_missing_extra_is_named_before_any_work(
    refused, here, monkeypatch, command, missing, extra
):
    whole = importlib.util.find_spec

    def without(name, *rest):
        return None if name == missing else whole(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    said = refused(command)
    assert f'needs what is not installed here, {missing}: pip install "mpoe[{extra}]"' in said
    assert not (here / "run").exists()


def test_a_hub_that_does_not_answer_is_asked_once(refused, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    asked = []

    def no_way(address, timeout):
        asked.append(address)
        raise OSError("unreachable")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("socket.create_connection", no_way)
    line = refused("generate no-such-run --prompt x")
    assert (
        "'no-such-run' is not a folder here, no built-in model (t5, gpt2), and the hub did not "
        "give it" in line
    )
    assert asked == [("huggingface.co", 443)]
    assert not models._hub_answers()


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda folder: os.truncate(folder / "model.safetensors", 5000), "cannot be loaded"),
        (
            lambda folder: os.rename(folder / "model.safetensors", folder / "pytorch_model.bin"),
            "cannot be loaded",
        ),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "no usable tokenizer"),
    ],
    ids=["cut", "no_pickle", "tokenizer"],
)
def test_damaged_dense_models(refused, tmp_path, spoil, message):
    shutil.copytree(stand_in_path("t5"), tmp_path / "t5")
    spoil(tmp_path / "t5")
    assert message in refused(f"convert {tmp_path}/t5 {tmp_path}/out")
    assert not (tmp_path / "out").exists()


def test_benchmarks_that_are_wrong_or_absent(refused, monkeypatch, here):
    monkeypatch.setattr(bench, "_measure", lambda options: {"failures": ["linear: a wrong sum"]})
    assert "wrong or failed: linear: a wrong sum" in refused("bench")
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "mpoe_bench.run", None)
    assert "the benchmarks are not installed: no package mpoe_bench.run" in refused(
        "bench --out other"
    )


# ------------------------------------------------------------------ files


def test_convert_that_fails_while_saving_leaves_no_model(cli, tmp_path, monkeypatch):
    from transformers import PreTrainedTokenizerBase

    def full(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", full)
    answer = cli(f"convert t5 {tmp_path}/out --num_experts 2", code=130)
    assert answer.err.splitlines()[-1] == "mpoe: interrupted"
    assert list((tmp_path / "out").iterdir()) == []
    monkeypatch.undo()
    cli(f"convert t5 {tmp_path}/out --num_experts 2")
    assert (tmp_path / "out/config.json").is_file()
    assert not staging_folder(tmp_path / "out").exists()


def test_text_is_replaced_in_one_step(tmp_path, monkeypatch):
    file = tmp_path / "report.html"
    weight_files.write_text(file, "old")

    def full(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr(weight_files.os, "fsync", full)
    refuses(OSError, "disk full", weight_files.write_text, file, "new")
    assert file.read_text() == "old"


def test_how_many_words_compose_takes(refused):
    """A base and 128 others."""
    line = "compose base" + 128 * " x"
    assert "texts must name a file for each of 128 fine-tunes" in refused(line)
    assert "values without an option: 'x'" in refused(f"{line} x")


def test_a_folder_with_an_adapter_is_no_model(refused, tmp_path):
    """Transformers would load it unasked, in some versions into a model at any path it names."""
    base = tmp_path / "base"
    shutil.copytree(stand_in_path("gpt2"), base)
    (base / "adapter_config.json").write_text('{"base_model_name_or_path": "/private"}')
    out = tmp_path / "out"
    (tmp_path / "law.expert").touch()
    for line in (
        f"convert {base} {out}",
        f"export {base} {out}",
        f"compose {base} {tmp_path}/law.expert --output_dir {out}",
        f"train --model {base} --expert a --data_dir {tmp_path} --output_dir {out}",
        f"generate {base} --prompt x",
    ):
        assert "holds an adapter too (adapter_config.json)" in refused(line), line
    assert not out.exists()
