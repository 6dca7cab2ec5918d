"""`mpoe inspect`: a report that stands alone, its plots and numbers; refusals."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path

import pytest
import torch

from mpoe import MPOEConfig, convert_to_mpoe
from mpoe.cli.plots import training_curves
from mpoe.cli.routes import expert_colour
from mpoe.data.embedded import load_stand_in

pytest.importorskip("matplotlib")
ALWAYS = {"expert_load.png", "bond_rank.png", "bond_spectra.png", "parameters.png"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders t5, gpt2 (paper shapes) and dense (experts) of converted stand-ins."""
    root = tmp_path_factory.mktemp("models")
    for name, kind, values in (
        ("t5", "t5", {"shape": "separable"}),
        ("gpt2", "gpt2", {"shape": "paper", "target_modules": ["ffn", "attention"], "router": {"top_k": 2}}),
        ("dense", "gpt2", {"expert_type": "dense"}),
        ("none", "gpt2", {"moe_type": "none"}),
    ):
        dense, tokenizer = load_stand_in(kind)
        convert_to_mpoe(dense, MPOEConfig(num_experts=3, **values)).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


def page(folder: Path) -> str:
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert not re.search(r'(src|href)="(?!data:)', text), "the report must need nothing beside itself"
    assert text.count("<table") == text.count("</table>")
    return text


def size_of(png: Path) -> tuple[int, int]:
    data = png.read_bytes()
    assert data.startswith(b"\x89PNG")
    return struct.unpack(">II", data[16:24])


def test_report_of_a_t5(cli, models: Path, sentiment: Path, tmp_path: Path) -> None:
    out, sentence = tmp_path / "out", "the film is <good>"
    answer = cli("inspect", models / "t5", "--data_dir", sentiment, "--text", sentence, "--output_dir", out)
    assert answer.code == 0, answer.err
    assert {p.name for p in out.iterdir()} == ALWAYS | {"report.html", "inspect.json"}
    assert all(min(size_of(out / name)) > 200 for name in ALWAYS)
    text = page(out)
    assert "the film is &lt;good&gt;" in text
    numbers = json.loads((out / "inspect.json").read_text())
    (followed,) = numbers["routes"]
    assert [stream["stream"] for stream in followed["streams"]] == ["encoder", "decoder"]
    cells = re.findall(r'<td style="background:#\w{6}" title="expert (\d): p = [\d.]+">\1</td>', text)
    assert len(cells) == sum(len(s["tokens"]) * len(s["layers"]) for s in followed["streams"])
    # 8 items of the split; every token of every layer is counted once
    assert len({sum(layer) for layer in numbers["expert_load"][:2]}) == 1
    assert sum(numbers["expert_load"][2]) < sum(numbers["expert_load"][0])
    assert set(numbers["bonds"]) == {"up", "down"}
    assert numbers["parameters_by_experts"]["experts"] == [1, 2, 3, 4, 8, 16, 32, 64]


@pytest.mark.slow
def test_other_mixtures(cli, models: Path, prose: Path, tmp_path: Path) -> None:
    data = ["--data_dir", prose, "--max_source_length", 16]
    answer = cli("inspect", models / "gpt2", *data, "--output_dir", tmp_path / "gpt2")
    assert answer.code == 0, answer.err
    numbers = json.loads((tmp_path / "gpt2" / "inspect.json").read_text())
    assert len(numbers["routes"]) == 2  # the first items, where no text is given
    assert set(numbers["bonds"]) == {"up", "down", "c_attn", "c_proj"}
    assert re.search(r">[012]\+[012]</td>", page(tmp_path / "gpt2"))
    answer = cli("inspect", models / "dense", *data, "--output_dir", tmp_path / "dense")
    assert answer.code == 0, answer.err
    assert {p.suffix for p in (tmp_path / "dense").iterdir()} == {".png", ".html", ".json"}
    assert not (tmp_path / "dense" / "bond_rank.png").exists()
    answer = cli("inspect", models / "none", *data, "--output_dir", tmp_path / "none")
    assert answer.code == 0, answer.err
    assert "no routers" in page(tmp_path / "none")
    assert not (tmp_path / "none" / "expert_load.png").exists()


def test_a_run_shows_its_curves_and_a_new_report_leaves_no_old_plot(cli, models, sentiment, tmp_path) -> None:
    run, out = models / "t5", tmp_path / "out"
    records = [
        {"step": k, "loss": 3 / k, "task_loss": 2 / k, "aux_loss": 0.1, "expert_entropy": 0.9} for k in (1, 2, 3)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    arguments = ["inspect", run, "--data_dir", sentiment, "--text", "a", "--num_items", 2, "--output_dir", out]
    assert cli(*arguments).code == 0
    assert (out / "training.png").is_file()
    (run / "metrics.jsonl").unlink()
    assert cli(*arguments, "--overwrite").code == 0
    assert not (out / "training.png").exists()


def test_curves_without_what_a_dense_run_lacks() -> None:
    assert (
        training_curves([{"step": 1, "loss": 2.0, "task_loss": 2.0}, {"step": 2, "eval_loss": 1.0}])[:4] == b"\x89PNG"
    )


def test_colours_tell_experts_apart() -> None:
    for experts in (2, 8, 16):
        colours = [expert_colour(expert, experts) for expert in range(experts)]
        assert len(set(colours)) == experts
        rgb = torch.tensor([[int(c[k : k + 2], 16) for k in (1, 3, 5)] for c in colours]).float()
        assert rgb.mean(1).min() > 140  # black letters stay readable


def test_help_and_refusals(cli, refused, models: Path, sentiment: Path, tmp_path: Path, monkeypatch) -> None:
    assert "--output_dir" in cli("inspect").out
    out, t5 = ["--output_dir", tmp_path / "out"], models / "t5"
    assert "inspect needs a model first" in refused("inspect", "--text", "x")
    assert "t5 is a dense t5; inspect looks into mixtures: mpoe convert t5 OUT" in refused("inspect", "t5", *out)
    assert "unknown option '--sentence'" in refused("inspect", t5, "--sentence", "x")
    assert "text must hold words; got an empty one" in refused("inspect", t5, "--text", " ")
    assert "num_items must be at least 1; got 0" in refused("inspect", t5, "--num_items", 0)
    assert "num_tokens must be at least 1; got 0" in refused("inspect", t5, "--num_tokens", 0)
    assert "holds a model or a run; choose another folder" in refused("inspect", t5, "--output_dir", t5)
    assert "data_dir must be an existing folder" in refused("inspect", t5, "--data_dir", tmp_path / "none", *out)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "report.html").write_text("mine")
    assert "holds an earlier report; give --overwrite" in refused("inspect", t5, "--output_dir", tmp_path / "old")
    assert (tmp_path / "old" / "report.html").read_text() == "mine"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert 'pip install "mpoe[report]"' in refused("inspect", t5, *out)
    assert not (tmp_path / "out").exists()


def test_a_runs_load_is_counted_on_its_own_data(cli, prose: Path, tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    flags = ["--data_dir", prose, "--max_source_length", 16, "--num_experts", 2, "--max_steps", 1, "--use_cpu"]
    assert cli("train", "--model", "gpt2", *flags, "--learning_rate", 1e-3, "--output_dir", run).code == 0
    answer = cli("inspect", run, "--output_dir", out)
    assert answer.code == 0, answer.err
    numbers = json.loads((out / "inspect.json").read_text())
    assert numbers["counted_on"].endswith("validation items of prose")
    blocks = int(numbers["counted_on"].split()[0])
    assert {sum(layer) for layer in numbers["expert_load"]} == {blocks * 16 * 2}  # top-2 of 16 tokens a block
    assert numbers["counted_on"] in page(out)
