"""Studies: a tiny one end to end, stopped and continued; what files may say; sizes and
statistics."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from mpoe_bench.study import arms, quiet, texts
from mpoe_bench.study.__main__ import main, open_study, records_in
from mpoe_bench.study.arms import (
    costs,
    dense_model,
    run_once,
    schedule,
    steps_of,
)
from mpoe_bench.study.plan import Arm, Corner, Run, read_study
from mpoe_bench.study.quiet_tables import QuietResults
from mpoe_bench.study.tables import ArmsResults, Spread
from mpoe_bench.study.texts import batches, byte_blocks, domain_texts, read_blocks
from scipy.stats import ttest_1samp
from transformers import LlamaConfig, LlamaForCausalLM

from mpoe.data.stand_in_models import load_stand_in
from mpoe.models import background
from tests.assertions import refuses
from tests.cases import ROOT

NEURONS = ROOT / "bench/studies" / "neurons.toml"
DEPTH = NEURONS.with_name("depth.toml")
TINY = """
title = "Tiny"
question = "Does it run?"
reference = "dense"
seeds = [0, 1]
rate_steps = 4
[rates]
16 = [0.004, 0.008]
[arms.dense]
name = "dense"
[arms.neurons]
name = "neurons"
experts = { shape = "neurons", num_experts = 4, neurons = "1/8", router = { top_k = 2 } }
[arms.fine]
name = "fine"
experts = { expert_type = "dense", num_experts = 4, router = { top_k = 2 } }
hidden = "1/2"
dense_until = 0.0
own_start = true
[arms.large]
name = "as large"
size_of = "neurons"
budget_of = "neurons"
[[stages]]
model = 16
steps = 4
arms = ["neurons", "dense"]
[[stages]]
model = 16
steps = 8
arms = ["neurons", "large"]
[[comparisons]]
arm = "neurons"
beside = "dense"
must_win = true
"""


@pytest.fixture(scope="module")
def tiny_data(tmp_path_factory):
    """Two domains of invented sentences."""
    folder = tmp_path_factory.mktemp("data")
    for name in ("sms_spam", "movie_sentiment"):
        (folder / name).mkdir()
        for split in ("train", "validation", "test"):
            rows = [
                {"sentence": f"the {name} of {split} number {i} is full of words", "label": 0}
                for i in range(40)
            ]
            (folder / name / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture
def data(tiny_data, monkeypatch):
    two = {name: texts.DOMAINS[name] for name in ("messages", "reviews")}
    monkeypatch.setattr(texts, "DOMAINS", two)
    monkeypatch.setattr(texts, "BATCH", 2)
    return tiny_data


@pytest.fixture
def study_file(tmp_path):
    file = tmp_path / "tiny.toml"
    file.write_text(TINY)
    return file


def test_a_study_runs_what_is_missing_and_nothing_twice(study_file, data, capsys):
    words = [str(study_file), "--data_dir", str(data)]
    first = "16/4 neurons 0.004 0"
    assert main([*words, "--run", first]) == 0
    results, table = study_file.with_suffix(".json"), study_file.with_suffix(".md")
    assert list(records_in(results)) == [first]
    assert "waits" in table.read_text()
    before = records_in(results)[first]
    assert main(words) == 0
    records = records_in(results)
    study = read_study(study_file)
    assert records[first] == before
    assert not open_study(study_file).waiting(records)
    # Two candidates of every arm, and the second seed of the chosen one; at the longer corner both
    # seeds.
    assert len(records) == 3 * 2 + 2 + 2 * 2
    rate = ArmsResults(study, records).chosen_rate(16, "neurons")
    losses = {each: records[f"16/4 neurons {each:g} 0"]["validation"] for each in study.rates[16]}
    assert losses[rate] == min(losses.values())
    text = table.read_text()
    assert "waits" not in text
    assert "| neurons | dense | x | 2 |" in text
    capsys.readouterr()
    assert main([str(study_file), "--table"]) == 0
    assert capsys.readouterr().out.strip() == ""


def test_a_run_made_again_is_the_same(study_file, data):
    study, blocks = read_study(study_file), read_blocks(data)
    for arm in ("neurons", "fine"):
        run, starts = Run(Corner(16, 4), arm, 0.004, 1), {}
        one, two, reused = (run_once(study, run, blocks, made) for made in ({}, starts, starts))
        assert len(starts) == 1
        assert {**reused, "cpu_seconds": 0} == {**two, "cpu_seconds": 0}
        assert {**one, "cpu_seconds": 0} == {**two, "cpu_seconds": 0}


def test_a_run_whose_loss_is_not_finite_is_kept_as_the_worst(study_file, data):
    record = run_once(
        read_study(study_file), Run(Corner(16, 4), "dense", math.inf, 0), read_blocks(data), {}
    )
    assert "is nan in step 1" in record["diverged"]
    assert record["validation"] == math.inf


@pytest.mark.parametrize(
    "change, words",
    [
        (
            ("hidden =", "hiden ="),
            "arms.fine has no field 'hiden' .did you mean 'hidden'.*; it has name, experts, .*",
        ),
        (
            ('title = "Tiny"', ""),
            "the study: .* missing 1 required positional argument: 'title'",
        ),
        (
            ('reference = "dense"', 'reference = "thin"'),
            "arms must be one of 'dense', 'neurons', 'fine', 'large'; got 'thin'",
        ),
        (
            ("16 = [0.004, 0.008]", "8 = [0.004]"),
            "rates must have candidates for the model's size 16",
        ),
        (("steps = 8\n", "steps = 8\nlayers = 0\n"), "layers of a stage must be at least 1; got 0"),
    ],
)
def test_files_that_make_no_sense_are_refused(study_file, change, words, capsys):
    study_file.write_text(TINY.replace(*change))
    refuses(ValueError, words, read_study, study_file)
    assert main([str(study_file), "--table"]) == 2
    assert re.search(words, capsys.readouterr().err)


def test_unknown_runs_and_absent_data_are_refused(study_file, data, monkeypatch, capsys):
    assert main([str(study_file), "--data_dir", str(data), "--run", "16/5 dense 0.004 0"]) == 2
    wanted = "run must be one that waits, as '16/4 neurons 0.004 0'; got '16/5 dense 0.004 0'"
    assert wanted in capsys.readouterr().err
    assert main([str(study_file)]) == 2
    assert "data_dir must name the folder of the texts" in capsys.readouterr().err
    monkeypatch.undo()
    refuses(FileNotFoundError, "must hold austen/train", domain_texts, data, "novels", "train")


def test_sizes_of_the_study_of_neurons():
    study = read_study(NEURONS)
    assert len(study.compared()) == 44
    assert sum(one.must_win for _, one in study.compared()) == 10
    found = {arm: costs(study, arm, 48) for arm in study.arms}
    dense = found["dense"]
    assert dense.weights == 2 * 48 * 192
    assert found["switch8"].weights == 8 * dense.weights
    assert found["neurons"].weights / dense.weights == pytest.approx(1 + 128 * 8 / 192)
    assert found["neurons"].flops / dense.flops == pytest.approx(1 + 8 * 8 / 192 + 128 / (2 * 192))
    assert found["hidden"].weights / dense.weights == pytest.approx(1 + 32 * 8 / 48)
    assert found["flops"].flops == pytest.approx(found["neurons"].flops, rel=0.02)
    assert found["large"].parameters == pytest.approx(found["neurons"].parameters, rel=0.01)
    spent = 0.25 * dense.whole_flops + 0.75 * found["neurons"].whole_flops
    assert steps_of(study, "large_budget", Corner(48, 1600)) * found[
        "large"
    ].whole_flops == pytest.approx(1600 * spent, rel=0.002)
    assert steps_of(study, "neurons", Corner(48, 1600)) == 1600


def test_deeper_models_have_corners_of_their_own():
    shallow = Run.of("96/6400 dense 0.008 0")
    deep = Run.of("96/6400/4 dense 0.008 0")
    assert (shallow.corner, deep.corner) == (Corner(96, 6400), Corner(96, 6400, 4))
    assert (shallow.key, deep.key) == ("96/6400 dense 0.008 0", "96/6400/4 dense 0.008 0")
    study = read_study(NEURONS)
    two, four = (costs(study, "neurons", 48, layers) for layers in (2, 4))
    assert (two.weights, two.flops) == (four.weights, four.flops)
    head = 48 * arms.VOCABULARY
    assert four.whole_flops - head == 2 * (two.whole_flops - head)


def test_a_stage_names_its_layers_and_rates_are_chosen_with_two(study_file, data):
    text = TINY.replace("steps = 8\n", "steps = 8\nlayers = 3\n").replace("must_win = true", "")
    text = text.replace('"neurons", "large"]', '"neurons"]')
    study_file.write_text(text)
    assert main([str(study_file), "--data_dir", str(data)]) == 0
    records = records_in(study_file.with_suffix(".json"))
    study = read_study(study_file)
    rate = ArmsResults(study, records).chosen_rate(16, "neurons")
    assert f"16/4 neurons {rate:g} 1" in records
    assert f"16/8/3 neurons {rate:g} 1" in records
    assert not any(key.startswith("16/8 ") for key in records)
    table = study_file.with_suffix(".md").read_text()
    assert "## Model of size 16, 4 steps\n" in table
    assert "## Model of size 16, 8 steps, 3 layers\n" in table
    run = Run.of(f"16/8/3 neurons {rate:g} 1")
    trained = arms.train(study, run, read_blocks(data), {})
    assert len(trained.model.transformer.h) == 3


def test_a_rate_that_is_known_is_not_searched(study_file):
    known = 'name = "as large"\nknown_rates = { 16 = 0.002 }'
    study_file.write_text(
        TINY.replace('name = "as large"', known).replace("16 = [0.004, 0.008]", "16 = [0.004]")
    )
    study = read_study(study_file)
    assert study.candidates(16, "large") == []
    assert ArmsResults(study, {}).chosen_rate(16, "large") == 0.002
    waiting = open_study(study_file).waiting({})
    assert [key for key in waiting if " large " in key] == [
        "16/8 large 0.002 0",
        "16/8 large 0.002 1",
    ]
    assert "16/4 neurons 0.004 0" in waiting


@pytest.mark.parametrize("stage", [0, 1], ids=["four layers", "width 192"])
def test_the_candidate_of_the_study_of_depth_is_at_most_twice_the_dense_model(stage):
    study = read_study(DEPTH)
    corner = study.stages[stage].corner

    def parameters(arm):
        hidden = arms.dense_hidden(study, arm, corner.model)
        model = dense_model(corner.model, hidden, 0, corner.layers)
        if study.arms[arm].experts is not None:
            model = arms.convert(model, study.arms[arm], corner.model, 0)
        return sum(p.numel() for p in model.parameters())

    dense, candidate = parameters("dense"), parameters("candidate")
    assert 1.8 * dense < candidate <= 2 * dense
    assert parameters("latent8") == pytest.approx(candidate, rel=0.02)
    assert parameters("large") == pytest.approx(candidate, rel=0.01)


def test_experts_of_their_own_start_differ():
    arm = Arm("fine", {"expert_type": "dense", "num_experts": 3}, own_start=True)
    layer = arms.convert(dense_model(16, 32, 0), arm, 16, 0).transformer.h[0].mlp
    weight = layer.experts.up.weight
    assert not torch.equal(weight[0], weight[1])
    assert float(weight.detach().std()) == pytest.approx(arms.INIT_STD, rel=0.2)


def test_batches_are_the_same_for_every_arm():
    train = {"one": byte_blocks(["ab" * 400], 8), "two": byte_blocks(["cd" * 100], 8)}
    first, second = (torch.cat(list(batches(train, 3, 4))) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, torch.cat(list(batches(train, 4, 4))))


def test_schedule_warms_up_and_ends_at_zero():
    factors = [schedule(step, 100) for step in range(100)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[-1] < 1e-3


def test_verdicts_are_those_of_a_paired_t_test():
    for values in ([0.1, 0.12, 0.09], [0.1, -0.12, 0.3], [-0.1, -0.11, -0.1], [0.01, 0.05, 0.02]):
        p = ttest_1samp(values, 0).pvalue
        expected = "not significant" if p >= 0.05 else "better" if values[0] > 0 else "worse"
        assert Spread(values).verdict() == expected
    assert Spread([0.3]).verdict() == "one seed"


def test_a_comparison_waits_for_all_seeds(study_file):
    study = read_study(study_file)

    def record(loss):
        return {"validation": loss, "test": loss}

    records = {
        f"16/4 {arm} {rate} 0": record(1.0)
        for arm in ("dense", "neurons")
        for rate in ("0.004", "0.008")
    }
    records["16/4 neurons 0.008 0"] = record(0.9)
    found = ArmsResults(study, records).gain(Corner(16, 4), "neurons", "dense")
    assert found.values == [pytest.approx(0.1)]
    assert "has no result yet" in ArmsResults(study, records).success()
    records |= {"16/4 dense 0.004 1": record(1.1), "16/4 neurons 0.008 1": record(1.0001)}
    assert (
        "has succeeded: of 1 comparisons that it must win, 1 are won"
        in ArmsResults(study, records).success()
    )
    records["16/4 neurons 0.008 1"] = record(1.3)
    assert "has failed" in ArmsResults(study, records).success()


@pytest.mark.parametrize("losses, verdict", [((0.9, 1.12), "enough"), ((0.9, 1.17), "not enough")])
def test_a_mean_gain_may_be_enough(study_file, losses, verdict):
    known = 'name = "{0}"\nknown_rates = {{ 16 = 0.004 }}'
    text = TINY.replace("must_win = true", "must_win = true\nat_least = 0.03")
    for arm in ("dense", "neurons"):
        text = text.replace(f'name = "{arm}"', known.format(arm))
    study_file.write_text(text)
    study = read_study(study_file)
    records = {f"16/4 dense 0.004 {seed}": {"test": loss} for seed, loss in enumerate((1.0, 1.1))}
    records |= {f"16/4 neurons 0.004 {seed}": {"test": loss} for seed, loss in enumerate(losses)}
    section = ArmsResults(study, records).of_comparisons()
    assert [row[-1] for row in section[3]] == [verdict]
    assert section[1].startswith("0 paired t-tests")
    assert section[1].endswith("*Enough*: the mean gain is at least what the study's file names.")
    assert (
        f"The study has {'succeeded' if verdict == 'enough' else 'failed'}"
        in ArmsResults(study, records).success()
    )


COMPOSED = NEURONS.with_name("composed.toml")
QUIET = NEURONS.with_name("quiet.toml")


def test_a_study_that_no_runner_is_for_is_refused(capsys):
    assert main([str(COMPOSED), "--table"]) == 2
    assert (
        "must have arms, or the success of quiet experts; it has title," in capsys.readouterr().err
    )


def test_quiet_experts_need_a_model(tmp_path, capsys):
    file = tmp_path / "quiet.toml"
    file.write_text(QUIET.read_text())
    assert main([str(file)]) == 2
    assert "data_dir must be given for quiet experts; got none" in capsys.readouterr().err


SMALLER = {
    "steps = 40": "steps = 2",
    "[10, 20]": "[1]",
    "[0, 1, 2]": "[0, 1]",
    '["novels", "messages", "reviews", "usage examples"]': '["messages", "reviews"]',
    "neurons = 59": "neurons = 4",
    "rank = 16": "rank = 2",
}


def tiny_study(folder, data, plan, smaller):
    """Words of a command: a plan of fewer things, on a Llama of two layers."""
    tokenizer = load_stand_in("gpt2")[1]
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    config = LlamaConfig(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    text = plan.read_text()
    for old, new in (SMALLER | smaller).items():
        assert old in text, f"{plan.name} lacks {old}"
        text = text.replace(old, new)
    (folder / "tiny.toml").write_text(text)
    words = [str(folder / "tiny.toml"), "--model", str(folder / "base"), "--data_dir", str(data)]
    return [*words, "--work_dir", str(folder / "experts")]


@pytest.fixture
def short_texts(monkeypatch):
    monkeypatch.setattr(texts, "LENGTH", 16)
    monkeypatch.setattr(texts, "PIECES", 4)
    monkeypatch.setattr(quiet, "PROMPTS", quiet.PROMPTS[:2])
    monkeypatch.setattr(quiet, "ANSWER_TOKENS", 4)
    for name, value in {
        "SAMPLES": 4,
        "TEXT_LENGTH": 16,
        "CHAT_LENGTH": 16,
        "GENERAL_PIECES": 4,
    }.items():
        monkeypatch.setattr(background, name, value)


def verdicts_of(plan, records):
    return {what: holds for what, _, holds in QuietResults(plan, records).criteria()}


def test_runs_and_success_of_quiet_experts():
    study = open_study(QUIET)
    plan = study.plan
    waiting = study.waiting({})
    assert waiting[:4] == [
        "base",
        "neurons novels 40 0.012 0",
        "quiet novels 0",
        "neurons messages 40 0.012 0",
    ]
    assert waiting[-1] == "replay usage examples 20 0.006 0", "what needs replay's rate must wait"
    texts_of = [*plan.domains, *(f"{domain}, all" for domain in plan.domains), *plan.probes]

    def record(loss, answers=0.0):
        return dict.fromkeys(texts_of, loss) | {
            "answers": answers,
            "same": 1.0,
            "objective": loss,
        }

    records = {key: record(3.0) for key in waiting if key.startswith(("neurons", "lora", "replay"))}
    records["base"] = record(4.0)
    for rate, loss in zip(plan.replay_rates, (3.0, 2.0, 2.5), strict=True):
        for domain in plan.domains:
            records[f"replay {domain} 20 {rate:g} 0"] = record(loss)
    assert plan.known_rates(records)["replay"] == plan.replay_rates[1]
    assert "replay reviews 40 0.003 2" in study.waiting(records)
    holding = record(3.05, answers=0.004) | dict.fromkeys(plan.probes, 4.01)
    for domain in plan.domains:
        others = {other: 4.02 for other in plan.domains if other != domain}
        records[f"quiet {domain} 0"] = holding | others
    verdicts = verdicts_of(plan, records)
    of_one = [holds for what, holds in verdicts.items() if what.startswith("one")]
    assert of_one == ["yes"] * 6
    assert verdicts["four experts: share of their own gains"] == ""
    records["quiet novels 0"] = holding | {"messages": 4.2, "novels, all": 3.9}
    verdicts = verdicts_of(plan, records)
    assert verdicts["one: worst other domain"] == "**no**"
    assert verdicts["one expert: share of its own gain"] == "**no**"
    records["mixture 0"] = record(3.04, answers=0.01)
    records["rivals"] = {
        "Arrow, top 1": record(3.1),
        "mean of LoRAs": record(3.3),
        "cpu_seconds": 1,
    }
    records["tenants 10"] = {
        "mixture": record(3.0),
        "numpy": [4.0, 3.0, 3.05],
        "torch": [4.0, 3.0, 3.15],
    }
    records["adapter attention: novels"] = {"neurons": 36, "losses": [4.0, 3.0, 3.1]}
    records["adapter attention: reviews"] = {
        "neurons": 36,
        "losses": [4.0, 3.0],
        "refused": "it keeps 70%",
    }
    records["costs"] = {
        "background": {"sampling": 99, "statistics": 77},
        "reading": {"base": [200.0, 600], "one quiet expert": [150.0, 620]},
    }
    verdicts = verdicts_of(plan, records)
    assert verdicts["four: nats ahead of Arrow, top 1"] == "**no**"
    assert verdicts["four: nats ahead of mean of LoRAs"] == "yes"
    assert verdicts["10 tenants: share of their own gains"] == "**no**"
    table = study.table(records)
    assert "| quiet experts, seed 0 |" in table
    assert "| attention | novels | 36 | 1.000 | 90.0% |" in table
    assert "| attention | reviews | 36 | 1.000 | it keeps 70% |" in table
    assert "| reading | one quiet expert | 150.000 | 0.75 | 620 |" in table
    assert "| background | sampling: 99 s |" in table


@pytest.mark.slow
def test_a_study_of_quiet_experts_from_its_first_run_to_its_table(tmp_path, tiny_data, short_texts):
    with QUIET.open() as file:
        tenants = next(line.partition("  #")[0] for line in file if line.startswith("tenants"))
    smaller = {
        tenants: 'tenants = ["jinja2", "safetensors"]',
        'probes = ["headers", "ratings", "descriptions"]': 'probes = ["headers", "descriptions"]',
        "[0.0015, 0.003, 0.006]": "[0.003]",
    }
    words = tiny_study(tmp_path, tiny_data, QUIET, smaller)
    study_file = Path(words[0])
    assert main(words) == 0
    records = records_in(study_file.with_suffix(".json"))
    assert not open_study(study_file).waiting(records)
    assert "| waits |" not in study_file.with_suffix(".md").read_text()
    picture = study_file.with_suffix(".svg").read_text()
    for method in ("quiet expert", "expert, always on", "LoRA with replay"):
        assert f">{method}</text>" in picture, method
