"""`mpoe compare`, the report of a run, what `mpoe train` shows while it runs; the demos."""

import json
import math
import os
import re
import shlex
import shutil
from html import escape
from pathlib import Path

import pytest
from transformers import TrainerControl, TrainerState

from mpoe.cli import demo, demo_compare
from mpoe.cli.compare import read_run, write_report
from mpoe.cli.demo_experts import DemoResults, DomainLosses
from mpoe.cli.report import bars_html
from mpoe.cli.train import going_on
from mpoe.data.domains import DOMAINS, domain_text
from mpoe.models.expert_mixture import experts_in
from mpoe.training.callbacks import LogLineCallback
from tests.assertions import read_json, run_python, write_json
from tests.cases import ROOT

from .cli_data import run, words

PARAMETERS = {
    "central": 60,
    "auxiliary": 30,
    "expert": 0,
    "router": 2,
    "rest": 8,
    "total": 100,
    "dense_total": 80,
}


def make_run(folder, accuracy, rate, ended=True, **more):
    folder.mkdir()
    training = {
        "learning_rate": rate,
        "train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "seed": 0,
    }
    config = {
        "model": "t5",
        "training": {**training, "output_dir": str(folder)},
        "experts": {"num_experts": 2},
    }
    config |= {
        "command": f"mpoe train --output_dir {folder.name} <b>",
        "learning_rate_from": "as given",
    }
    write_json(folder / "run.json", {"config": config})
    records = [
        {
            "step": k,
            "loss": 3 / k,
            "task_loss": 2 / k,
            "time": 10.0 + k,
            "expert_load": {"share": [[0.3, 0.7]]},
        }
        for k in (1, 2, 3)
    ]
    records.append({"step": 3, "eval_loss": 0.5, "time": 20.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    results = {
        "model": "t5",
        "class": "MPOET5",
        "mixture": "2 MPO experts",
        "layers": ["encoder.0.1"],
        "steps": 3,
        "seconds": 9.0,
        "validation": {"task": {"accuracy": accuracy, "loss": 1 - accuracy, "items": 8}},
        "constant": {"task": {"accuracy": 0.5}},
        "remarks": ["task: odd"],
        "data": {"task": {"train": 1200, "seen": 24, "validation": 8}},
        "made_with": {"mpoe": "0"},
        "parameters": PARAMETERS,
        **more,
    }
    if ended:
        write_json(folder / "results.json", results)
    return folder


def test_runs_side_by_side(cli, tmp_path):
    first, second = make_run(tmp_path / "a", 0.6, 1e-3), make_run(tmp_path / "b", 0.7, 2e-3)
    third = make_run(tmp_path / "c", 0.0, 1e-3, ended=False)
    answer = cli(f"compare {first} {second} {third} --output_dir {tmp_path}/out")
    lines = {
        line.split("│")[1].strip(): line.split("│")[2:-1]
        for line in answer.out.splitlines()
        if "│" in line
    }
    cells = {name: [cell.strip() for cell in row] for name, row in lines.items()}
    assert cells["task: accuracy"] == ["0.6000", "0.7000 *", "-", "0.5000"]
    assert cells["task: loss"] == ["0.4000", "0.3000 *", "-", "-"]  # lower is better
    assert cells["optimizer steps"] == ["3", "3", "3, not ended"]
    assert cells["training, seconds"] == ["9", "9", "-"]
    assert cells["seconds per step, median"] == ["1", "1", "1"]
    assert cells["auxiliary"] == ["30", "30", "-"]
    assert cells["training.learning_rate"] == ["0.001", "0.002", "0.001"]
    assert not {"training.output_dir", "command", "training.seed"} & set(
        cells
    )  # neutral, or the same in all
    text = (tmp_path / "out/report.html").read_text()
    assert "&lt;b&gt;" in text
    assert "<td class=best>0.7000 *</td>" in text
    assert text.count("data:image/png;base64,iVBOR") == 1
    assert [run["name"] for run in read_json(tmp_path / "out/compare.json")] == ["a", "b", "c"]
    (third / "metrics.jsonl").write_text("")  # killed before it logged a step
    assert "0, not ended" in cli(f"compare {first} {third} --output_dir {tmp_path}/early").out


def test_means_over_seeds(cli, tmp_path):
    runs = []
    for k, (rate, accuracy) in enumerate([(1e-3, 0.6), (1e-3, 0.64), (2e-3, 0.7), (2e-3, 0.72)]):
        runs.append(make_run(tmp_path / f"r{k}", accuracy, rate))
        record = read_json(runs[-1] / "run.json")
        record["config"]["training"]["seed"] = k % 2
        record["config"]["arm"] = {"baseline": "dense" if rate == 2e-3 else None}
        write_json(runs[-1] / "run.json", record)
    answer = cli("compare", *runs, "--output_dir", tmp_path / "out")
    arms = answer.out.split("Arms")[1].split("Parameters")[0]
    cells = (re.split("[│┃]", line)[1:-1] for line in arms.splitlines())
    rows = [[cell.strip() for cell in row] for row in cells if row]
    assert rows[0] == ["", "2 MPO experts", "dense"]
    assert ["runs", "2", "2"] in rows
    # 12.706 x sd / sqrt(2) = 12.706 x .02; .1 and .08 are the differences
    assert ["task: accuracy", "0.6200 ± 0.2541", "0.7100 ± 0.1271"] in rows
    assert ["task: accuracy, less the first arm's", "", "0.0900 ± 0.1271"] in rows
    assert "Arms" not in cli("compare", runs[0], runs[2], "--output_dir", tmp_path / "two").out
    again = make_run(tmp_path / "again", 0.1, 1e-3)  # the first once more: no run has two partners
    shutil.copy(runs[0] / "run.json", again)
    out = cli("compare", *runs, again, "--output_dir", tmp_path / "three").out
    assert "0.0900 ± 0.1271" in out


def test_names_and_refusals(cli, refused, tmp_path):
    first, second = make_run(tmp_path / "a", 0.6, 1e-3), make_run(tmp_path / "b", 0.6, 1e-3)
    out = f"--output_dir {tmp_path}/out"
    assert "compare needs two arguments" in refused(f"compare {first} {out}")
    assert "is not the folder of a run: it holds no run.json" in refused(
        f"compare {first} {tmp_path} {out}"
    )
    assert "holds a model or a run" in refused(f"compare {first} {second} --output_dir {first}")
    answer = cli(f"compare {first} {second} {out}")
    assert "*" not in answer.out.split("Scores")[1].split("Validation")[0]  # a tie has no best
    assert "earlier report" in refused(f"compare {first} {second} {out}")
    assert "1 a" in cli(f"compare {first} {first} {out} --overwrite").out
    (second / "results.json").write_text("[")
    assert "holds a run that cannot be read" in refused(
        f"compare {first} {second} {out} --overwrite"
    )


@pytest.mark.usefixtures("drawn")
def test_the_report_of_a_run_says_everything(tmp_path):
    run = read_run(str(make_run(tmp_path / "a", 0.6, 1e-3)))
    write_report(tmp_path / "report.html", [run])
    text = (tmp_path / "report.html").read_text()
    assert (
        "<h1>a: 2 MPO experts after 3 steps</h1><pre>a: mpoe train --output_dir a &lt;b&gt;</pre>"
        in text
    )
    for row in (
        "task: accuracy</td><td>0.6000</td><td>0.5000",
        "task: train</td><td>1,200",
        "task: seen</td><td>24",
        "optimizer steps</td><td>3",
        "items of a step</td><td>8",
        "learning rate</td><td>0.001: as given",
    ):
        assert f"<td>{row}</td>" in text
    assert '<p class="failed">a: task: odd</p>' in text
    assert "central: shared by the experts of a layer" in text
    assert "training.seed" in text.split("<details>")[1]
    assert 'name="viewport"' in text
    assert not re.search(r'(src|href)="(?!data:|#)', text)
    assert text.count("data:image/png;base64,iVBOR") == 2  # curves, and the expert load


def test_a_line_for_each_log_call():
    lines = []
    shown, state = LogLineCallback(lines.append), TrainerState(global_step=20, max_steps=500)
    call = (None, state, TrainerControl())
    shown.on_step_begin(*call)
    shown.on_step_end(*call)
    shown._seconds = 2.0
    shown.on_log(
        *call, logs={"loss": 0.7, "task_loss": 0.5, "learning_rate": 1e-3, "grad_norm": 2.0}
    )
    shown.on_log(*call, logs={"eval_loss": 0.25, "eval_runtime": 1.0})
    shown.on_log(*call, logs={"eval_film_loss": 0.125})
    shown.on_log(*call, logs={"train_runtime": 3.0})
    shown._evaluated_since = -1000.0
    shown.on_prediction_step(*call, eval_dataloader=range(3))
    state.is_world_process_zero = False
    shown.on_log(*call, logs={"loss": 1.0})
    assert lines == [
        "step  20/500  loss 0.5000  rate 1.00e-03  0.5 steps/s  960 s left",
        "step  20/500  validation loss 0.2500",
        "step  20/500  validation loss 0.1250  film",
        "validating: batch 1 of 3",
    ]


def test_an_interrupted_run_says_how_to_go_on(cli, tmp_path, monkeypatch):
    def stop(words):
        with going_on(tmp_path, shlex.join(["mpoe", "train", *words])):
            raise KeyboardInterrupt

    monkeypatch.setattr("mpoe.cli.train.command", stop)
    said = cli("train --output_dir 'my run' --overwrite", code=130).err
    assert re.match(
        r"mpoe: interrupted: go on at step 0, .* with mpoe train --output_dir 'my run' --resume\n",
        said,
    )


# ------------------------------------------------------------------ demos


def test_a_short_comparison(tmp_path, monkeypatch, capsys):
    short = " --n_train 64 --n_val 16 --per_device_train_batch_size 2"
    settings = demo_compare.SETTINGS["t5"]
    shorter = settings._replace(options=settings.options + short)
    monkeypatch.setitem(demo_compare.SETTINGS, "t5", shorter)
    monkeypatch.setattr(
        "mpoe.data.predict.generate_texts",
        lambda model, tokenizer, examples, *_: ["x"] * len(examples),
    )
    run(f"demo --compare --steps 1 --output_dir {tmp_path}/demo")
    out = capsys.readouterr().out
    assert "mpoe plan t5-base" in out
    page = (tmp_path / "demo/report.html").read_text()
    runs = read_json(tmp_path / "demo/compare.json")
    assert [each["name"] for each in runs] == ["dense", "wider", "switch", "hidden", "separable"]
    assert len({json.dumps(each["results"]["data"]) for each in runs}) == 1  # the same items
    total = {each["name"]: each["results"]["parameters"]["total"] for each in runs}
    assert total["dense"] < total["hidden"] < total["switch"]
    assert abs(total["wider"] - total["hidden"]) < 0.01 * total["dense"]
    assert all(f"<th>{name}</th>" in page for name in total)


def test_a_short_demo_of_experts(tmp_path, monkeypatch, capsys):
    for name, value in {"TESTED_PIECES": 2, "PIECE_TOKENS": 64, "AT_ONCE": 4}.items():
        monkeypatch.setattr(f"mpoe.cli.demo_experts.{name}", value)
    short = {name: " ".join(f"{name} of {number}" for number in range(400)) for name in DOMAINS}
    monkeypatch.setattr("mpoe.cli.demo_experts.domain_text", lambda name, held_out: short[name])
    demo.command(words(f"--output_dir {tmp_path}/demo --steps 9"))  # nine: once divided by zero
    out = capsys.readouterr().out
    results = read_json(tmp_path / "demo/results.json")
    domains = {name: DomainLosses(**losses) for name, losses in results["domains"].items()}
    assert list(domains) == list(DOMAINS)
    assert results["experts"] == ["law", "code", "names", "none"]
    assert [expert.name for expert in experts_in(tmp_path / "demo/model")[0]] == [
        "law",
        "code",
        "names",
    ]
    page = (tmp_path / "demo/report.html").read_text()
    for text, tokens in results["picture"].items():
        assert f'<p class="tokens"><b>{text}</b>' in page
        assert {expert for _, expert in tokens} <= {0, 1, 2, 3}
        assert set(results["continued"][text]) == {"prompt", "before", "after"}
    # Numbers and conclusions are the same in the terminal and on the page, bars too.
    numbers = [results["foreign_base"], results["foreign_composed"]]
    for domain in domains.values():
        numbers += [domain.base, domain.always_on, domain.quiet, domain.composed]
        assert f"{domain.foreign_lost_quiet:+.3f}" in out
        assert f"<td>{domain.foreign_lost_quiet:+.3f}</td>" in page
        assert f"</b>{domain.foreign_lost_quiet:.3f}</div>" in page
        assert f"</b>{domain.base - domain.quiet:.3f}</div>" in page
    for loss in numbers:
        assert f"{loss:.3f}" in out
        assert f"<td>{loss:.3f}</td>" in page
    concluded = [line for line in out.splitlines() if line.startswith("A quiet expert keeps ")]
    assert len(concluded) == 1
    assert f"<li>{escape(concluded[0])}</li>" in page


def demo_results(**domain):
    """Of three domains alike."""
    losses = {"base": 5.0, "always_on": 4.0, "quiet": 4.1, "composed": 4.25} | domain
    lost = {"foreign_lost_always_on": 0.5, "foreign_lost_quiet": 0.0625}
    domains = {name: DomainLosses(**losses, **lost) for name in ("law", "code", "names")}
    return DemoResults(60, 0, domains, foreign_base=5.0, foreign_composed=5.125)


def test_an_expert_that_gained_nothing_keeps_no_share():
    results = demo_results(always_on=5.0)
    assert math.isnan(results.domains["law"].kept(4.5))
    assert results.conclusions()[0].startswith("A quiet expert keeps - of its gain")


def test_what_the_demo_says_of_its_numbers():
    results = demo_results()
    assert results.domains["law"].kept(4.1) == pytest.approx(0.9)
    lines = results.conclusions()
    assert "keeps 90% of its gain and costs documentation 0.062 nats" in lines[0]
    assert "always on it costs 0.500" in lines[0]
    assert "The three in one model keep 75% and cost documentation 0.125" in lines[1]


def test_bars_are_as_long_as_their_numbers():
    page = bars_html([("a < b", 2.0), ("c", 1.0), ("d", -1.0)])
    assert "a &lt; b" in page
    assert re.findall(r'width:([\d.]+)%"></b>(-?[\d.]+)<', page) == [
        ("70.0", "2.000"),
        ("35.0", "1.000"),
        ("0.0", "-1.000"),
    ]


@pytest.mark.parametrize("name", DOMAINS)
def test_texts_of_the_domains(name):
    train, held_out = (domain_text(name, part) for part in (False, True))
    assert len(train) > 50_000
    assert len(held_out) > 10_000
    assert held_out[:200] not in train
    assert domain_text(name, True) == held_out


def test_a_paragraph_of_licences_is_long_and_comes_once():
    paragraphs = list(DOMAINS["law"]())
    letters = ["".join(filter(str.isalnum, text.lower())) for text in paragraphs]
    assert len(set(letters)) == len(letters)
    assert min(map(len, paragraphs)) > 80


EXAMPLES = ROOT / "examples"
slow, exhaustive = pytest.mark.slow, pytest.mark.exhaustive


@pytest.mark.parametrize(
    "task, margin",
    [
        pytest.param("movie_sentiment", 0.06, marks=exhaustive),
        pytest.param("doc_module", 0.1, marks=slow),
    ],
)
def test_the_readme_trains_clearly_above_the_majority(request, tmp_path, task, margin):
    readme = (EXAMPLES.parent / "README.md").read_text(encoding="utf-8")
    (line,) = [line for line in readme.splitlines() if line.startswith("mpoe train --model t5")]
    line = re.sub("--output_dir [^ ]*", f"--output_dir {tmp_path}/run", line)
    line = re.sub("--max_steps [^ ]*", "--max_steps 200", line)  # enough for that
    folder = None if task.startswith("doc_") else request.getfixturevalue("shared_data") / task
    data = f"--data_dir {folder}" if folder else f"--tasks {task}"
    out = run_python("-m", *words(re.sub("--data_dir [^ ]*", data, line)))
    assert "learning_rate 0.0015: what to start from" in out
    results = read_json(tmp_path / "run/results.json")
    score, majority = (results[key][task]["accuracy"] for key in ("validation", "constant"))
    assert score > majority + margin
    assert not results["remarks"]


@slow
def test_demo(tmp_path):
    ready = os.environ.get("MPOE_DEMO")  # CI has run the README's
    folder = Path(ready) if ready else tmp_path / "demo"
    if not folder.is_dir():
        run_python("-m", "mpoe", "demo", "--output_dir", folder)
    results = read_json(folder / "results.json")
    # docs/should_i.md shows these figures; other processors train a little otherwise, and other
    # versions of the packages have other texts.
    page = (EXAMPLES.parent / "docs/should_i.md").read_text(encoding="utf-8")
    for name in DOMAINS:
        (row,) = re.findall(rf"^\| {name} \|(.*)\|$", page, flags=re.M)
        base, always_on, quiet, kept, loud, silent, composed = (
            float(cell.strip(" %+")) for cell in row.split("|")
        )
        domain = DomainLosses(**results["domains"][name])
        assert domain.base == pytest.approx(base, abs=0.2)
        assert domain.always_on == pytest.approx(always_on, abs=0.2)
        assert domain.quiet == pytest.approx(quiet, abs=0.2)
        assert 100 * domain.kept(domain.quiet) == pytest.approx(kept, abs=5)
        assert domain.foreign_lost_always_on == pytest.approx(loud, abs=0.12)
        assert domain.foreign_lost_quiet == pytest.approx(silent, abs=0.05)
        assert 100 * domain.kept(domain.composed) == pytest.approx(composed, abs=8)
    assert set(os.listdir(folder / "experts")) == {
        "background.safetensors",
        *(f"{name}.expert" for name in DOMAINS),
    }
    assert results["seconds"] < 600  # of a minute on two cores that are free
