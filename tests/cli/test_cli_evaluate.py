"""Evaluation: which model and which data of a run it takes, and its table of scores."""

import json
from types import SimpleNamespace

from mpoe.cli import evaluate
from mpoe.cli.errors import CommandError
from mpoe.cli.evaluate import score_table
from mpoe.cli.expert import limit_measuring
from mpoe.cli.tasks import DataOptions, data_of_run, model_of_experiment
from mpoe.data.stand_in_models import load_stand_in
from mpoe.training import prepare_output_dir
from mpoe.training.checkpoints import publish, staging_root
from tests.assertions import refuses


def test_average_is_over_tasks_in_the_table():
    run = {"a": {"accuracy": 1.0, "f1": 0.0, "items": 3}}
    constant = {"a": {"accuracy": 0.5, "f1": 0.25}}
    assert score_table({"value": run}, constant, "").rows == [
        ["a: accuracy", "1.0000", "0.5000"],
        ["a: f1", "0.0000", "0.2500"],
    ]
    run["b"] = {"pearson": 0.5, "items": 4}
    constant["b"] = {"pearson": 0.0}
    assert score_table({"value": run}, constant, "").rows[-1][1:] == ["0.7500", "0.2500"]


def test_the_best_perplexity_is_the_lowest_and_a_tie_has_no_best():
    runs = {
        "one": {"c": {"perplexity": 8.0, "loss": 2.0, "items": 1}},
        "other": {"c": {"perplexity": 7.0, "loss": 2.0, "items": 1}},
        "unfinished": {},
    }
    table = score_table(runs, {"c": {"perplexity": 9.0}}, "")
    assert table.rows == [
        ["c: perplexity", "8.0000", "7.0000", "-", "9.0000"],
        ["c: loss", "2.0000", "2.0000", "-", "-"],
    ]
    assert table.best == {(0, 2)}


def as_trained(folder, run, data=None, *flags):
    """`data_of_run` for a folder whose ``run.json`` holds ``run``."""
    (folder / "run.json").write_text(json.dumps({"config": run}))
    return data_of_run(str(folder), data or DataOptions(), set(flags))


def test_evaluation_divides_the_data_as_the_run_did(tmp_path):
    checkpoint = tmp_path / "checkpoint-3"
    checkpoint.mkdir()
    assert data_of_run(str(checkpoint), DataOptions(), set())[1:] == (0, None)
    for training, seed in (({"seed": 7, "data_seed": None}, 7), ({"seed": 7, "data_seed": 0}, 0)):
        assert as_trained(tmp_path, {"training": training})[1] == seed
        assert data_of_run(str(checkpoint), DataOptions(), set())[1] == seed
    (tmp_path / "run.json").write_text("{")
    refuses(
        ValueError,
        r"run\.json does not describe a run",
        data_of_run,
        str(checkpoint),
        DataOptions(),
        set(),
    )


def test_a_model_of_an_earlier_run_is_not_taken_for_the_runs(tmp_path, capsys):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).touch()
    prepare_output_dir(tmp_path, True, run_config={"drawn_by": 5}, keep_model=True)
    assert data_of_run(str(tmp_path), DataOptions(), set())[1] == 0
    assert "holds the model of a run before the one in run.json" in capsys.readouterr().out
    refuses(CommandError, "holds neither its run's model", model_of_experiment, str(tmp_path))
    staged = staging_root(tmp_path) / "checkpoint-3"
    staged.mkdir(parents=True)
    publish(staged, tmp_path)
    assert model_of_experiment(str(tmp_path)) == str(tmp_path / "checkpoint-3")
    assert data_of_run(str(tmp_path / "checkpoint-3"), DataOptions(), set())[1] == 5


def test_evaluation_reads_the_data_as_the_run_did(capsys, tmp_path):
    run = {
        "data": {
            **vars(DataOptions()),
            "tasks": ["a", "b"],
            "data_dir": "there",
            "max_source_length": 300,
        }
    }
    same = as_trained(tmp_path, run)[0]
    assert (same.tasks, same.data_dir, same.max_source_length) == (["a", "b"], "there", 300)
    assert (
        "as in training: data_dir there, max_source_length 300, tasks ['a', 'b']"
        in capsys.readouterr().out
    )
    other = as_trained(tmp_path, run, DataOptions(data_dir="here"), "data_dir")[0]
    assert (other.tasks, other.data_dir, other.max_source_length) == ([], "here", 300)
    given = DataOptions(max_source_length=128)
    assert as_trained(tmp_path, run, given, "max_source_length")[0].max_source_length == 128
    assert as_trained(tmp_path, {}, given)[0] is given


def test_batches_are_as_large_as_their_logits_may_be(monkeypatch):
    model, tokenizer = load_stand_in("gpt2")
    monkeypatch.setattr(evaluate, "LOGITS", 10 * model.config.vocab_size)
    batches = evaluate.padded_batches(model, [{"input_ids": [5] * 4}] * 5, tokenizer)
    assert [len(batch["input_ids"]) for batch in batches] == [2, 2, 1]


def test_an_experts_validation_takes_a_share_of_its_training():
    """A quarter of 8,000 items less 512 for statistics, at nine points."""
    arguments = SimpleNamespace(max_steps=96, process_index=1)
    validation = {"law": list(range(1000))}
    assert limit_measuring(arguments, validation, 8000, frozenset()) == 512
    assert (arguments.eval_steps, len(validation["law"])) == (12, 165)
