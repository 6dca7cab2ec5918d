"""Every file in examples/ runs."""

import importlib.util
import re
import runpy
import shutil
import sys
from pathlib import Path

import notebooks
import pytest
import yaml

from mpoe.data.tasks import read_task_file
from tests.assertions import read_json, run_python
from tests.cases import ROOT

from .cli_data import described, write_described

EXAMPLES = ROOT / "examples"


def test_drop_in(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["drop_in.py", str(tmp_path / "model")])
    runpy.run_path(str(EXAMPLES / "drop_in.py"), run_name="__main__")
    assert "central:" in capsys.readouterr().out
    assert (tmp_path / "model/model.safetensors").is_file()


@pytest.mark.slow
def test_plain_loop():
    out = run_python(EXAMPLES / "plain_loop.py", 3)
    assert re.search(
        r"step 0: loss .*, masked True, tokens per expert .*\nstep 2: loss .*, masked False", out
    )


def wikitext(folder):
    folder.mkdir()
    for split in ("train", "valid", "test"):
        lines = "".join(
            f" \n Paragraph {i} of {split} tells what a list holds . \n" for i in range(12)
        )
        (folder / f"wiki.{split}.raw").write_text(" \n = Lists = \n" + lines)
    return folder


FLAGS = "--max_steps 1 --eval_steps 1 --num_experts 2 --per_device_train_batch_size 2 --use_cpu"
FLAGS += " --max_source_length 16 --logging_steps 1 --save_strategy no --disable_tqdm true"


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("train_*.yaml")), ids=lambda p: p.stem)
def test_configurations(cli, sentiment, prose, tmp_path, file):
    values = yaml.safe_load(file.read_text())
    assert not Path(values["data_dir"]).is_absolute()
    assert not Path(values["output_dir"]).is_absolute()
    tasks = values.get("tasks", [])
    data = {"train_t5_movie_sentiment": sentiment, "train_gpt2_austen": prose}.get(file.stem)
    if data is None:
        data = described(tmp_path / "data", *tasks) if tasks else wikitext(tmp_path / "data")
    cli(f"train {file} --data_dir {data} --output_dir {tmp_path}/run {FLAGS}")
    results = read_json(tmp_path / "run/results.json")
    assert list(results["validation"]) == (tasks or [data.name])
    report = (tmp_path / "run/report.html").read_text()
    assert all(f"<td>{task}: " in report for task in results["validation"])
    assert ("average over tasks" in report) == (len(tasks) > 1)
    assert report.count("<img") == 2  # curves, and the expert load by layer


@pytest.mark.parametrize("name", ["finetune.sh", "finetune_single_task.sh"])
def test_scripts_of_the_original_are_one_line(cli, tmp_path, name):
    text = re.sub("^#.*\n", "", (EXAMPLES / name).read_text())
    (line,) = re.findall(r'^mpoe (.*) "\$@"\n$', text)
    tasks = re.findall("--tasks ([^ ]*)", line)[0].split(",")
    data = described(tmp_path / "data", *tasks)
    cli(f"{line} --data_dir {data} {FLAGS} --output_dir {tmp_path}/run")
    assert list(read_json(tmp_path / "run/results.json")["validation"]) == tasks


def test_tasks_of_a_file(cli, refused, tmp_path):
    file = EXAMPLES / "my_tasks.yaml"
    for spec in read_task_file(file).values():
        write_described(tmp_path / "data", spec)
    data = f"--task_file {file} --data_dir {tmp_path}/data"
    train = f"train --model t5 {data} {FLAGS}"
    answer = cli(f"{train} --output_dir {tmp_path}/run")
    assert "average over tasks" in answer.out

    results = read_json(tmp_path / "run/results.json")
    assert list(results["validation"]) == ["review", "headline"]
    assert set(results["validation"]["headline"]) == {"rouge_l", "bleu", "items"}

    scores = tmp_path / "scores.json"
    answer = cli(
        f"evaluate {tmp_path}/run {data} --tasks review --split test --output_file {scores}"
    )
    found = read_json(scores)
    assert found["scores"]["review"]["items"] == 4
    assert found["mean"] == found["scores"]["review"]["accuracy"]

    # without the file, or with another in its place, a run is evaluated on what the file said when
    # it was trained
    kept = tmp_path / "moved.yaml"
    shutil.copy(file, kept)
    run_file = tmp_path / "run/run.json"
    run_file.write_text(run_file.read_text().replace(str(file), str(kept)))
    kept.write_text("review: {template: '{sentence}', label_words: {0: same, 1: same}}")
    again = f"evaluate {tmp_path}/run --split test --output_file {scores}"
    cli(again)
    assert read_json(scores)["scores"]["review"] == found["scores"]["review"]
    assert "label_words of task review must give at least two different words" in refused(
        f"{again} --task_file {kept}"
    )
    assert "label_words" in refused(
        f"{train} --output_dir {tmp_path}/run --resume --task_file {kept}"
    )
    kept.write_text(file.read_text().replace("rouge_l, bleu", "bleu"))
    message = refused(f"{train} --output_dir {tmp_path}/run --resume --task_file {kept}")
    assert "described.headline.metrics: was ['rouge_l', 'bleu'], now ['bleu']" in message


@pytest.fixture
def run_script(monkeypatch, tmp_path):
    """Run a script in this process, in an empty folder; returns its names."""

    def run(name, *arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        return runpy.run_path(str(EXAMPLES / name))

    return run


def test_convert_and_look(run_script, tmp_path, capsys):
    names = run_script("convert_and_look.py", tmp_path / "model")
    assert (tmp_path / "model/model.safetensors").is_file()
    out = capsys.readouterr().out
    assert (
        out.count("DenseReluDense: ") == len(names["model"].mpoe_config.rate_ratios) // 2
    )  # a route for each layer


@pytest.mark.slow
def test_one_domain(run_script, tmp_path, capsys):
    names = run_script("one_domain.py", tmp_path / "walk")
    out = capsys.readouterr().out
    assert "What code changes" in out
    assert "quiet expert" in out
    before, after = names["losses"]  # on documentation
    assert after - before < 0.15
    assert out.count("$ mpoe ") == 2


@pytest.mark.slow
def test_several_domains(run_script, tmp_path, capsys):
    names = run_script("several_domains.py", tmp_path / "walk")
    assert type(names["model"]).__name__ == "GraniteMoeSharedForCausalLM"
    assert names["model"].config.num_local_experts == 4
    assert names["answer"].shape[1] > names["prompt"]["input_ids"].shape[1]
    assert capsys.readouterr().out.count("$ mpoe ") == 5


def test_choose_a_shape(run_script, capsys):
    run_script("choose_a_shape.py")
    lines = capsys.readouterr().out.splitlines()
    losses = [float(line.split()[-1]) for line in lines if " loss " in line]
    assert len(losses) == 5
    assert losses[1] == pytest.approx(losses[0], abs=2e-3)  # full bonds change nothing
    assert losses[1:] == sorted(losses[1:])  # the smaller the bond, the more is lost
    assert sum("% lost" in line for line in lines) == 12


@pytest.mark.slow
def test_hf_trainer(run_script, tmp_path, capsys):
    from mpoe import load_mpoe

    names = run_script("hf_trainer.py", tmp_path / "run", 4)
    assert type(names["trainer"]).__module__ == "transformers.trainer"
    assert names["trainer"].state.global_step == 4
    assert "validation loss" in capsys.readouterr().out
    trained, loaded = names["model"].state_dict(), load_mpoe(tmp_path / "run").state_dict()
    assert all((trained[name].cpu() == value).all() for name, value in loaded.items())


@pytest.mark.slow
def test_fine_tune_and_compare(tmp_path):
    out = run_python(EXAMPLES / "fine_tune_and_compare.py", 40, tmp_path)
    rows = [line.split() for line in out.splitlines() if line.endswith(" M")]
    assert [" ".join(row[:-5]) for row in rows] == ["dense", "8 dense experts", "8 MPO experts"]
    for row in rows:
        assert float(row[-4]) < float(row[-5])  # the loss fell
    assert float(rows[2][-2]) < float(rows[1][-2]) / 2  # parameters in millions


@pytest.mark.parametrize("name", notebooks.NAMES)
def test_notebooks_hold_the_cells_of_their_scripts_and_pictures(name):
    file = EXAMPLES / f"{name}.ipynb"
    stored = read_json(file)["cells"]
    wanted = [(cell.cell_type, cell.source) for cell in notebooks.notebook(name).cells]
    found = [(cell["cell_type"], "".join(cell["source"])) for cell in stored]
    assert len(found) > 10
    assert found == wanted, "the script has changed: python tools/notebooks.py"
    outputs = [output for cell in stored for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 1
    assert file.stat().st_size < 300_000


# The cells of the others are run as scripts.
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            n, marks=pytest.mark.slow if n == "convert_and_look" else pytest.mark.exhaustive
        )
        for n in notebooks.NAMES
    ],
)
def test_notebooks_run(name, lacks, tmp_path):
    if (
        importlib.util.find_spec("nbclient") is None
        or importlib.util.find_spec("ipykernel") is None
    ):
        lacks('pip install ".[docs]"')
    made = notebooks.run(notebooks.notebook(name), tmp_path)
    assert all(cell["execution_count"] for cell in made.cells if cell.cell_type == "code")
    assert [
        o
        for cell in made.cells
        for o in cell.get("outputs", [])
        if "image/png" in o.get("data", {})
    ]
