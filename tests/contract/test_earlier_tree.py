"""What commit e1aa197 wrote (see `fixtures/e1aa197/make.py`) still works: models, configurations, a killed run."""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from mpoe import load_mpoe
from mpoe.cli.main import main
from mpoe.models.checkpoint import read_mpoe_config
from mpoe.training import read_metrics

EARLIER = Path(__file__).parents[1] / "fixtures" / "e1aa197"
FAMILIES = ("t5", "gpt2", "bert", "llama")
KINDS = ("separable", "paper", "light", "only", "dense_experts")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_saved_models_are_what_they_were(family: str, kind: str, tmp_path: Path) -> None:
    """They give their logits; written and read again, every value of the mixture's configuration is as it was."""
    folder = EARLIER / f"{family}_{kind}"
    tensors = load_file(EARLIER / f"{family}.safetensors")
    inputs = {name: value for name, value in tensors.items() if not name.startswith("logits")}
    model = load_mpoe(folder, base=EARLIER / f"dense_{family}" if kind == "only" else None)
    model.save_pretrained(tmp_path)
    earlier, cls = read_mpoe_config(folder)
    today, same = read_mpoe_config(tmp_path)
    assert cls is same
    assert _known(today["mpoe"], earlier["mpoe"]) == earlier["mpoe"]
    with torch.no_grad():
        logits = model(**inputs).logits
        torch.testing.assert_close(logits, tensors[f"logits_{kind}"], rtol=1e-5, atol=1e-5)
        for parameter in model.parameters():  # the test can fail: other weights, other logits
            parameter.mul_(1.05)
        assert (model(**inputs).logits - logits).abs().max() > 1e-4


def _known(today: Any, earlier: Any) -> Any:
    """The fields of ``today`` that there were earlier, also of the router."""
    if not isinstance(earlier, dict):
        return today
    return {name: _known(today[name], value) for name, value in earlier.items()}


def _without(values: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_configuration_that_names_no_shape_is_of_separable_experts(family: str, tmp_path: Path) -> None:
    """As one written before there was a choice: neither shape nor number of experts per token."""
    folder = tmp_path / "model"
    shutil.copytree(EARLIER / f"{family}_separable", folder)
    values = json.loads((folder / "config.json").read_text())
    values["mpoe"] = _without(values["mpoe"], "shape", "gauge", "light_p", "max_bond")
    values["mpoe"]["router"] = _without(values["mpoe"]["router"], "top_k")
    (folder / "config.json").write_text(json.dumps(values))
    tensors = load_file(EARLIER / f"{family}.safetensors")
    model = load_mpoe(folder)
    assert (model.mpoe_config.shape, model.mpoe_config.top_k) == ("separable", 1)
    with torch.no_grad():
        logits = model(**{name: value for name, value in tensors.items() if not name.startswith("logits")}).logits
    torch.testing.assert_close(logits, tensors["logits_separable"], rtol=1e-5, atol=1e-5)


def test_convert_makes_the_same_configuration(tmp_path: Path) -> None:
    flags = json.loads((EARLIER / "converted.flags.json").read_text())
    with pytest.raises(SystemExit) as done:
        main(["convert", str(EARLIER / "dense_gpt2"), str(tmp_path / "out"), *flags])
    assert not done.value.code
    earlier = json.loads((EARLIER / "converted.json").read_text())["mpoe"]
    today = json.loads((tmp_path / "out" / "config.json").read_text())["mpoe"]
    assert _rounded(_known(today, earlier)) == _rounded(earlier)


def _rounded(value: Any) -> Any:
    """Rate ratios come from a decomposition, whose last digits are the machine's."""
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _flags() -> list[str]:
    """The flags that the run was started with."""
    return list(runpy.run_path(str(EARLIER / "make.py"))["TRAIN"])


@pytest.mark.parametrize("names_shape", [True, False])
def test_a_run_killed_halfway_goes_on_to_its_end(
    names_shape: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("data", "dense_gpt2", "killed"):
        shutil.copytree(EARLIER / name, tmp_path / name)
    run = tmp_path / "killed" / "run.json"
    if not names_shape:
        record = json.loads(run.read_text())
        record["config"]["experts"] = _without(record["config"]["experts"], "shape", "top_k")
        run.write_text(json.dumps(record))
    started_by = json.loads((EARLIER / "dense_gpt2" / "config.json").read_text())["transformers_version"]
    if transformers.__version__ != started_by:
        # Another release has other training arguments, which a resumed run may not change. What they are is not ours.
        _take_defaults_of_this_release(run)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as done:
        main([*_flags(), "killed", "--resume"])
    assert not done.value.code
    earlier = {r["step"]: r for r in map(json.loads, (EARLIER / "end.jsonl").read_text().splitlines()) if "loss" in r}
    today = {record["step"]: record for record in read_metrics(tmp_path / "killed") if "loss" in record}
    assert list(today) == list(range(1, 7))
    for step in (5, 6):
        for name in ("loss", "learning_rate", "masked_steps", "expert_max_share"):
            assert today[step][name] == pytest.approx(earlier[step][name], rel=1e-4), (step, name)
    end, began = load_file(EARLIER / "end.safetensors"), load_file(EARLIER / "killed/checkpoint-4/model.safetensors")
    weights = load_file(tmp_path / "killed" / "model.safetensors")
    assert weights.keys() == end.keys()
    for name, value in weights.items():
        assert (value - end[name]).norm() <= 1e-2 * (end[name] - began[name]).norm() + 1e-6, name


def _take_defaults_of_this_release(run: Path) -> None:
    from dataclasses import fields

    from transformers import Seq2SeqTrainingArguments

    from mpoe.training import MPOETrainingArguments

    record = json.loads(run.read_text())
    training = record["config"]["training"]
    plain = MPOETrainingArguments(output_dir="none", use_cpu=True).to_dict()
    ours = set(vars(MPOETrainingArguments)["__annotations__"])
    theirs = {field.name for field in fields(Seq2SeqTrainingArguments)} - ours
    set_by_flags = {flag.removeprefix("--") for flag in _flags() if flag.startswith("--")}
    for name in sorted((theirs | set(training)) - ours - set_by_flags - {"train_batch_size", "logging_dir"}):
        if name not in plain:
            training.pop(name, None)
        elif name not in training:
            training[name] = plain[name]
    run.write_text(json.dumps(record))
