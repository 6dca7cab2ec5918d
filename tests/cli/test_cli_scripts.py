"""The scripts of examples/ that are made to be read: written in cells, run here as a whole."""

from __future__ import annotations

import importlib.util
import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import notebooks
import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def run_script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Run a script in this process, in an empty folder; returns its names."""

    def run(name: str, *arguments: object) -> dict[str, Any]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        return runpy.run_path(str(EXAMPLES / name))

    return run


def test_convert_and_look(run_script, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = run_script("convert_and_look.py", tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").is_file()
    out = capsys.readouterr().out
    assert out.count("DenseReluDense: ") == len(names["model"].mpoe_config.rate_ratios) // 2  # a route for each layer


@pytest.mark.slow
def test_several_domains(run_script, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = run_script("several_domains.py", tmp_path / "walk")
    assert type(names["model"]).__name__ == "GraniteMoeSharedForCausalLM"
    assert names["model"].config.num_local_experts == 4
    assert names["answer"].shape[1] > names["prompt"]["input_ids"].shape[1]
    assert capsys.readouterr().out.count("$ mpoe ") == 5


def test_choose_a_shape(run_script, capsys: pytest.CaptureFixture[str]) -> None:
    run_script("choose_a_shape.py")
    lines = capsys.readouterr().out.splitlines()
    losses = [float(line.split()[-1]) for line in lines if " loss " in line]
    assert len(losses) == 5
    assert losses[1] == pytest.approx(losses[0], abs=2e-3)  # full bonds change nothing
    assert losses[1:] == sorted(losses[1:])  # the smaller the bond, the more is lost
    assert sum("% lost" in line for line in lines) == 12


@pytest.mark.slow
def test_hf_trainer(run_script, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mpoe import load_mpoe

    names = run_script("hf_trainer.py", tmp_path / "run", 4)
    assert type(names["trainer"]).__module__ == "transformers.trainer"
    assert names["trainer"].state.global_step == 4
    assert "validation loss" in capsys.readouterr().out
    trained, loaded = names["model"].state_dict(), load_mpoe(tmp_path / "run").state_dict()
    assert all((trained[name].cpu() == value).all() for name, value in loaded.items())


@pytest.mark.slow
def test_fine_tune_and_compare(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "fine_tune_and_compare.py"), "40", str(tmp_path)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    rows = [line.split() for line in answer.stdout.splitlines() if line.endswith(" M")]
    assert [" ".join(row[:-5]) for row in rows] == ["dense", "8 dense experts", "8 MPO experts"]
    for row in rows:
        assert float(row[-4]) < float(row[-5])  # the loss fell
    assert float(rows[2][-2]) < float(rows[1][-2]) / 2  # parameters in millions


@pytest.mark.parametrize("name", notebooks.NAMES)
def test_notebooks_hold_the_cells_of_their_scripts_and_pictures(name: str) -> None:
    file = EXAMPLES / f"{name}.ipynb"
    stored = json.loads(file.read_text(encoding="utf-8"))["cells"]
    cells = notebooks.cells_of((EXAMPLES / f"{name}.py").read_text(encoding="utf-8"))
    found = [(cell["cell_type"], "".join(cell["source"])) for cell in stored]
    assert found.pop(1) == ("code", notebooks.NO_ARGUMENTS)
    assert found == cells, "the script has changed: python tools/notebooks.py"
    outputs = [output for cell in stored for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 1
    assert file.stat().st_size < 300_000


# The cells of the others are run as scripts.
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=pytest.mark.slow if n == "convert_and_look" else pytest.mark.exhaustive)
        for n in notebooks.NAMES
    ],
)
def test_notebooks_run(name: str, lacks, tmp_path: Path) -> None:
    if importlib.util.find_spec("nbclient") is None or importlib.util.find_spec("ipykernel") is None:
        lacks('pip install ".[docs]"')
    made = notebooks.run(notebooks.notebook(name), tmp_path)
    assert all(cell["execution_count"] for cell in made.cells if cell.cell_type == "code")
    assert [o for cell in made.cells for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
