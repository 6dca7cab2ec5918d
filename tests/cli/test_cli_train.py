"""`mpoe train`: a tiny run from start to end, resumed and used; the rate and the shape that it
takes."""

import json
import shutil
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

import mpoe.cli.train as train_module
from mpoe import MPOEConfig, convert_to_mpoe, load_mpoe
from mpoe.cli.evaluate import command as evaluate
from mpoe.cli.models import Source, find
from mpoe.cli.settle import order_items, set_intervals, settle_experts, settle_rate
from mpoe.cli.train import command as train
from mpoe.data.stand_in_models import load_stand_in, stand_in_path
from mpoe.training import MPOETrainingArguments, read_metrics
from mpoe.training.rates import find_rate
from tests.assertions import read_json, refuses

from ..models.tiny_models import tiny_model
from .cli_data import run, same_weights, words, write_sentiment

BASE = "--max_steps 3 --per_device_train_batch_size 4 --learning_rate 0.001 --num_experts 2"
BASE += " --save_steps 1 --save_total_limit 5 --disable_tqdm true --use_cpu"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Flags of a run, and its folder."""
    folder = tmp_path_factory.mktemp("trained")
    data = write_sentiment(folder / "sentiment")
    flags = f"train --model t5 --data_dir {data} {BASE} --gradient_mask_prob 0.5"
    run(f"{flags} --output_dir {folder}/run")
    return flags, folder / "run"


@pytest.fixture
def t5_run(trained, tmp_path):
    """The same with a folder of the test's own."""
    shutil.copytree(trained[1], tmp_path / "run")
    return trained[0], tmp_path / "run"


def test_t5_run_leaves_metrics_results_and_a_model_that_loads(cli, t5_run, tmp_path):
    _, run = t5_run
    results = read_json(run / "results.json")
    assert results["steps"] == 3
    assert results["class"] == "MPOET5ForConditionalGeneration"
    assert set(results["validation"]["sentiment"]) == {"accuracy", "f1", "matthews", "items"}
    assert results["validation"]["sentiment"]["items"] == 8
    accuracy = results["validation"]["sentiment"]["accuracy"]
    assert f"| validation, sentiment.accuracy | {accuracy:.4g} |" in (run / "README.md").read_text()
    records = read_metrics(run)
    assert [r["step"] for r in records if "loss" in r] == [1, 2, 3]
    assert [r["step"] for r in records if "eval_loss" in r] == [1, 2, 3]
    assert len(next(r for r in records if "expert_load" in r)["expert_load"]["share"][0]) == 2

    scores = tmp_path / "scores.json"
    answer = cli(f"evaluate {run} --split validation --output_file {scores}")
    assert read_json(scores)["scores"] == results["validation"]

    answer = cli(f"generate {run} --prompt 'sentiment sentence: good' --max_new_tokens 4")
    assert answer.out.count("\n") == 1


def test_resumed_run_ends_in_the_same_weights(cli, t5_run, tmp_path):
    flags, run = t5_run
    torn = tmp_path / "torn"
    shutil.copytree(run, torn)
    for name in ("checkpoint-2", "checkpoint-3"):
        shutil.rmtree(torn / name)
    for name in ("model.safetensors", "results.json"):
        (torn / name).unlink()
    # what a kill while saving leaves: a folder that looks like the newest checkpoint, without its
    # weights
    (torn / "checkpoint-2").mkdir()
    (torn / "checkpoint-2/trainer_state.json").write_text('{"global_step": 2')

    answer = cli(f"{flags} --output_dir {torn} --resume --compute_time")
    time = read_json(torn / "results.json")["time"]
    assert time["seconds_per_step"] == time["train_seconds"] / 2
    assert time["items_per_second"] == pytest.approx(4 / time["seconds_per_step"])
    assert "resuming from checkpoint-1" in answer.out
    assert same_weights(run, torn)


def test_finished_run_is_refused_resumed_and_overwritten(cli, refused, t5_run):
    flags, run = t5_run
    assert "holds another run" in refused(f"{flags} --output_dir {run}")
    before = (run / "model.safetensors").read_bytes()
    assert (
        "resuming from checkpoint-3"
        in cli(f"{flags} --output_dir {run} --resume --compute_time").out
    )
    assert (run / "model.safetensors").read_bytes() == before
    assert not [path.name for path in run.iterdir() if path.name.startswith(".")]  # no staging
    for name in ("notes.txt", "README.md"):
        (run / name).write_text("mine")
    cli(f"{flags} --output_dir {run} --overwrite --max_steps 1")
    assert [(run / name).read_text() for name in ("notes.txt", "README.md")] == ["mine", "mine"]
    assert sorted(p.name for p in run.glob("checkpoint-*")) == ["checkpoint-1"]
    assert read_json(run / "results.json")["steps"] == 1


def test_the_originals_baseline_trains_too(cli, sentiment, tmp_path):
    flags = f"train --model t5 --data_dir {sentiment} --output_dir {tmp_path}/run --max_steps 1"
    answer = cli(f"{flags} --per_device_train_batch_size 4 --moe_type none --mpo_layers nompo")
    run = read_json(tmp_path / "run/run.json")["config"]
    assert run["training"]["learning_rate"] == 1e-3
    assert f"learning_rate 0.001: {run['learning_rate_from']}" in answer.out
    assert run["command"].startswith("mpoe train --model t5 ")
    assert read_json(tmp_path / "run/results.json")["class"] == "T5ForConditionalGeneration"


@pytest.mark.parametrize(
    "baseline", [pytest.param("dense", marks=pytest.mark.exhaustive), "wider", "switch"]
)
def test_named_baselines(cli, refused, sentiment, tmp_path, baseline):
    flags = f"train --model t5 --data_dir {sentiment} {BASE} --max_steps 1 --baseline {baseline}"
    cli(f"{flags} --output_dir {tmp_path}/run")
    results = read_json(tmp_path / "run/results.json")
    dense, _ = load_stand_in("t5")
    mixture = convert_to_mpoe(dense, MPOEConfig(num_experts=2)).parameter_report()
    total = results["parameters"]["total"]
    assert results["parameters"]["trainable"] == total
    assert results["class"] == (
        "MPOET5ForConditionalGeneration" if baseline == "switch" else type(dense).__name__
    )
    if baseline == "wider":
        assert total == pytest.approx(mixture["total"], rel=2e-3)
    else:
        assert total == (
            mixture["dense_total"] if baseline == "dense" else results["parameters"]["switch_total"]
        )
    cli(f"{flags} --output_dir {tmp_path}/run --resume")
    if baseline == "switch":
        again = f"train --model {tmp_path}/run --baseline dense --output_dir {tmp_path}/again"
        assert "is converted already (mpoe_t5): baseline cannot be changed any more" in refused(
            again
        )


def test_convert_shows_errors_and_parameters_and_train_takes_the_result(
    cli, refused, sentiment, tmp_path
):
    out = tmp_path / "converted"
    answer = cli(f"convert t5 {out} --num_experts 4 --max-bond 8")
    assert "error: of the conversion" in answer.out
    assert "auxiliary" in answer.out
    load_mpoe(out).bfloat16().save_pretrained(out)
    same = f"train --model {out} --data_dir {sentiment} --output_dir {out} --overwrite"
    assert "output_dir must be another folder than the model's" in refused(same)
    flags = f"train --model {out} --data_dir {sentiment} --output_dir {tmp_path}/run --max_steps 1"
    assert "num_experts cannot be changed any more" in refused(f"{flags} --num_experts 8")
    cli(f"{flags} --per_device_train_batch_size 4")
    assert (
        load_mpoe(tmp_path / "run").dtype == torch.float32
    )  # AdamW's steps would vanish in bfloat16


def test_neurons_are_converted_trained_continued_and_inspected(cli, sentiment, tmp_path):
    shape = "--shape neurons --neurons 8 --latent 16 --num_experts 4"
    cli(f"convert t5 {tmp_path}/converted {shape}")
    router = "--scoring_func sigmoid --bias_update_rate 0.001"
    flags = f"train --model t5 --data_dir {sentiment} --output_dir {tmp_path}/run {shape} {router}"
    flags += " --per_device_train_batch_size 4 --save_steps 1 --save_strategy steps"
    for more in ("--max_steps 2", "--max_steps 2 --resume"):
        cli(f"{flags} {more}")
    found = read_json(tmp_path / "run/config.json")["mpoe"]
    assert (found["shape"], found["neurons"], found["latent"], found["router"]["top_k"]) == (
        "neurons",
        8,
        16,
        2,
    )
    assert found["router"]["routed_scaling_factor"] == 2.0
    cli(f"inspect {tmp_path}/run --output_dir {tmp_path}/seen")
    assert "8 neurons" in (tmp_path / "seen/report.html").read_text()


def test_a_model_without_a_tokenizer_is_converted_exported_and_inspected(cli, tmp_path):
    tiny_model("llama", "LlamaForCausalLM").save_pretrained(tmp_path / "llama")
    answer = cli(f"convert {tmp_path}/llama {tmp_path}/mixture --num_experts 2")
    assert "llama holds no tokenizer: what needs one is left out" in answer.out
    answer = cli(f"export {tmp_path}/mixture {tmp_path}/mixtral --to mixtral")
    assert "mixture holds no tokenizer" in answer.out
    assert (tmp_path / "mixtral/model.safetensors").is_file()
    assert "left out" in cli(f"inspect {tmp_path}/mixture --output_dir {tmp_path}/seen").out


def test_a_train_file_alone_is_enough(cli, sentiment, tmp_path):
    for split in ("validation", "test"):
        (sentiment / f"{split}.jsonl").unlink()
    flags = f"train --model t5 --data_dir {sentiment} {BASE} --max_steps 1"
    answer = cli(f"{flags} --output_dir {tmp_path}/run")
    assert (
        "holds no validation file: a tenth of the training items, at most 1,000, is held out"
        in answer.out
    )
    assert read_json(tmp_path / "run/results.json")["validation"]["sentiment"]["items"] == 2
    report = (tmp_path / "run/report.html").read_text()
    assert "<td>items of a step</td><td>4</td>" in report
    assert "<td>training.train_batch_size</td><td>4</td>" in report.split("<details>")[1]


def test_generate_from_a_file_with_the_dense_stand_ins(cli, tmp_path):
    (tmp_path / "prompts.txt").write_text("Return the\n\nA list of\n")
    answer = cli(f"generate gpt2 --file {tmp_path}/prompts.txt --max_new_tokens 3")
    assert answer.out.startswith("Return the")
    assert "A list of" in answer.out


def test_several_tasks_one_per_step_at_any_accumulation():
    pools = {"a": [("a", i) for i in range(40)], "b": [("b", i) for i in range(24)]}
    batch = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 2,
    }
    arguments = MPOETrainingArguments(output_dir="unused", **batch, use_cpu=True)
    dataset, per_epoch = order_items(pools, arguments, temperature=1.0, seed=3)
    assert (per_epoch, arguments.max_steps, len(dataset)) == (8, 16, 16 * 8)
    steps = [{dataset[i][0] for i in range(s * 8, s * 8 + 8)} for s in range(16)]
    assert all(len(tasks) == 1 for tasks in steps)
    assert set.union(*steps) == {"a", "b"}
    assert order_items(pools, arguments, temperature=9.0, seed=3)[0].indices != dataset.indices


def test_a_diverged_run_publishes_nothing(cli, refused, sentiment, tmp_path):
    flags = f"train --model t5 --data_dir {sentiment} {BASE} --max_steps 5 --learning_rate 1e+30"
    line = refused(f"{flags} --output_dir {tmp_path}/run")
    assert "training diverged at step" in line
    assert "the last good checkpoint is " + str(tmp_path / "run/checkpoint-") in line
    left = {
        path.name
        for path in (tmp_path / "run").iterdir()
        if not path.name.startswith("checkpoint-")
    }
    assert left == {"run.json", "metrics.jsonl"}  # no model, no results, no report

    cli(f"{flags} --max_steps 3 --output_dir {tmp_path}/allowed --allow_non_finite")
    assert (tmp_path / "allowed/results.json").exists()


def test_of_the_command(sentiment, tmp_path):
    flags = "--max_steps 2 --num_experts 2 --learning_rate 1e-3 --use_cpu --adapter"
    run(f"train --model t5 --data_dir {sentiment} {flags} --output_dir {tmp_path}/run")
    before, after = (
        load_file(folder / "model.safetensors")
        for folder in (stand_in_path("t5"), tmp_path / "run")
    )
    assert all(torch.equal(value, after[name]) for name, value in before.items() if name in after)
    blocks = [value[0, 0] for name, value in after.items() if name.endswith("auxiliary.left")]
    assert not any(torch.equal(block, torch.eye(len(block))) for block in blocks)
    parameters = read_json(tmp_path / "run/results.json")["parameters"]
    assert parameters["trainable"] == parameters["auxiliary"] + parameters["router"]


def test_runs_report_and_go_on_from_earlier_ones(tmp_path, capsys):
    for name in ("one", "other"):
        write_sentiment(tmp_path / "data" / name)
    first, second = tmp_path / "first", tmp_path / "second"
    data = f"--data_dir {tmp_path}/data --eval_tasks other --n_val 4"
    common = "--per_device_train_batch_size 4 --max_steps 1 --use_cpu --disable_tqdm true"
    flags = f"{data} --tasks one {common} --num_experts 2"
    reports = "--compute_time --compute_memory --print_num_parameters"
    train(words(flags, reports, "--output_dir", first))
    out = capsys.readouterr().out
    assert all(words in out for words in ("trainable", "per step of 4 items", "most memory used"))
    results = read_json(first / "results.json")
    assert set(results["validation"]) == {"other"}
    assert results["time"]["seconds_per_step"] > 0
    assert results["memory"]["peak_bytes"] > 0

    (first / "config.json").rename(
        first / "config.away"
    )  # as after a kill: no final model, but a checkpoint
    go_on = f"{data} --tasks one {common} --load_experiment {first} --learning_rate 1e-12"
    train(words(go_on, "--output_dir", second))
    again = read_json(second / "results.json")
    assert again["model"] == str(first / "checkpoint-1")
    assert again["class"] == "MPOET5ForConditionalGeneration"
    evaluation = [r for r in read_metrics(second) if "eval_loss" in r][-1]
    assert evaluation["eval_loss"] == pytest.approx(
        [r for r in read_metrics(first) if "eval_loss" in r][-1]["eval_loss"]
    )

    flags = f"--load_experiment {second} --split validation {data}"
    assert evaluate(words(flags)) == again["validation"]


# ------------------------------------------------------------------ rates, shapes and intervals


@pytest.fixture
def planned(monkeypatch, tmp_path):
    """``planned("--shape paper")``: the `Plan` of `mpoe train` with these words."""
    plans = []
    monkeypatch.setattr(train_module, "run", plans.append)

    def plan(line=""):
        train_module.command(words(line, f"--output_dir {tmp_path}/run --use_cpu"))
        return plans.pop()

    return plan


@pytest.fixture
def settle(planned):
    """``settle("--shape paper")``: (rate, reason) of `mpoe train` with these words."""

    def settled(line="", source=None):
        plan = planned(line)
        why = settle_rate(plan, source or find(plan.run.model), plan.experts.build())
        return plan.arguments.learning_rate, why

    return settled


def test_family_shape_and_regime_decide(settle, tmp_path, capsys):
    assert settle("--model t5") == (
        1.5e-3,
        "what to start from with a pretrained t5, hidden experts, width 128",
    )
    assert capsys.readouterr().out.startswith(
        "learning_rate 0.0015: what to start from with a pretrained t5"
    )
    assert settle("--shape paper")[0] == 1e-3
    assert (
        settle("--max_bond 8")[1]
        == "what to start from with a pretrained t5, separable experts, width 128"
    )
    assert settle("--mpo_layers nompo --moe_type none")[0] == 1e-3
    assert settle("--model gpt2")[0] == 3e-3
    assert settle("--model gpt2 --regime scratch")[0] == pytest.approx(0.006)
    (tmp_path / "c.yaml").write_text("shape: paper\n")  # a file is no other than flags
    assert settle(str(tmp_path / "c.yaml"))[0] == 1e-3
    capsys.readouterr()
    assert settle("--learning_rate 5e-5") == (5e-5, "as given")
    assert not capsys.readouterr().out
    (tmp_path / "config.json").write_text('{"model_type": "t5", "d_model": "wide"}')
    refuses(
        ValueError,
        r"the configuration of .* cannot be read",
        settle,
        source=Source(str(tmp_path), "t5"),
    )


def test_a_resumed_run_keeps_its_rate(settle, tmp_path):
    (tmp_path / "run").mkdir()
    record = {"config": {"training": {"learning_rate": 5e-5}, "learning_rate_from": "a search"}}
    (tmp_path / "run/run.json").write_text(json.dumps(record))
    assert settle("--resume") == (5e-5, "a search")
    (tmp_path / "run/run.json").write_text('{"config": {}}')  # of another program: refused later
    assert settle("--resume")[0] != 5e-5


@pytest.mark.parametrize(
    "flags, kind, shape, top_k",
    [
        ("--block_size 16", "t5", "hidden", 2),
        # what other shapes have alone selects separable
        ("--linear_trunc=30", "t5", "separable", 1),
        ("--tensor_learn=true", "t5", "separable", 1),
        ("--mpo_layers=mlp", "t5", "separable", 1),
        # no blocks where there is no module for them
        ("", "opt", "separable", 1),
        ("", "phi3", "hidden", 2),
        ("", "bert", "hidden", 2),
    ],
)
def test_shapes(planned, capsys, flags, kind, shape, top_k):
    plan, source = planned(flags), Source("somewhere", kind)
    config = settle_experts(plan, source)
    assert (config.shape, config.top_k) == (shape, top_k)
    assert plan.experts.shape == shape  # as it is recorded
    out = capsys.readouterr().out
    if "--tensor_learn=true" not in flags:
        why = (
            "what gained most with few experts"
            if shape == "hidden"
            else "what the model or other options need"
        )
        assert f"shape {shape}, {top_k} of 8 experts per token: {why}" in out
    assert settle_experts(plan, source) == config


def test_where_there_is_no_shape_to_speak_of(planned, capsys):
    for flags in ("--mpo_layers nompo --moe_type none", "--expert_type dense"):
        plan = planned(flags)
        settle_experts(plan, find(plan.run.model))
        assert plan.experts.shape is None
    assert (
        settle_experts(planned(), Source("somewhere", "mpoe_t5")) is None
    )  # of a converted model its own counts
    assert "shape" not in capsys.readouterr().out


def test_when_a_run_evaluates(planned):
    for flags, wanted in {
        "": 25,
        "--do_eval": 25,
        "--do_eval=false": None,
        "--eval_steps=7": 7,
    }.items():
        plan = planned(f"--max_steps 100 {flags}")
        set_intervals(plan.arguments, 50, plan.given)
        assert (plan.arguments.eval_steps, plan.arguments.do_eval) == (wanted, wanted is not None)
        assert plan.arguments.eval_strategy == ("steps" if wanted else "no")


def test_a_rate_that_is_searched_for_is_recorded_and_kept(
    cli, refused, sentiment, tmp_path, monkeypatch
):
    monkeypatch.setattr("mpoe.training.rates.find_rate", partial(find_rate, steps=1))
    flags = f"train --model t5 --data_dir {sentiment} --max_steps 1 --num_experts 2 --use_cpu"
    flags += f" --per_device_train_batch_size 2 --find_rate --output_dir {tmp_path}/run"
    assert "give --find_rate or --learning_rate, not both" in refused(
        f"{flags} --learning_rate 0.001"
    )
    answer = cli(flags)
    record = read_json(tmp_path / "run/run.json")["config"]
    rate = record["training"]["learning_rate"]
    assert (
        f"learning_rate {rate:g}: the least loss on held-out training items after 30 steps of each"
        in answer.out
    )
    assert record["learning_rate_from"].startswith("the least loss on held-out")
    answer = cli(f"{flags} --resume")
    assert "least loss" not in answer.out
