"""The table of a model's MPO weights, and freezing the parts that the experts share."""

from __future__ import annotations

import json

import pytest
import torch

from mpoe import MPOEConfig, convert_to_mpoe, load_mpoe, save_mpoe_only
from mpoe.models import MPOEGPT2Model, mpo_modules, parameter_kind
from mpoe.models.report import HEADER, short_name, summarize

from .small_models import batch, dense_model


def test_a_row_for_every_weight(converted):
    model = converted("t5_gated", shape="paper", max_bond=3, target_modules=["ffn", "attention"])
    rows = summarize(model, 100)
    assert [row.name for row in rows] == [name for name, _ in mpo_modules(model)]
    for row in rows:
        assert row.plan.shape == row.cores.shape
        assert (row.plan.num_experts, row.plan.num_tokens) == (row.cores.num_experts, 100)
        assert row.error == model.conversion_report[row.name]["relative_error_bound"]
    report = model.parameter_report()
    assert sum(row.cores.central.numel() for row in rows) == report["central"]
    assert sum(row.cores.own_parameters() for row in rows) == report["auxiliary"]


def test_the_table_is_printed_whole(converted, capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    model = converted("gpt2")
    model.mpoe_summary(num_tokens=64)
    lines = capsys.readouterr().out.splitlines()
    assert "plans for 64 tokens" in lines[0]
    assert all(name in lines[2] for name in HEADER)
    for row in summarize(model, 64):
        (line,) = [line for line in lines if line.split()[:1] == [short_name(row.name)]]
        assert all(cell in line for cell in row.cells())
    assert any("trainable params" in line for line in lines)


def test_errors_of_the_conversion_are_kept(tmp_path):
    dense = dense_model("gpt2")
    model = convert_to_mpoe(dense, MPOEConfig(num_experts=2, max_bond=3, shape="paper"))
    errors = [row.error for row in summarize(model, 8)]
    assert min(errors) > 0.01
    model.save_pretrained(tmp_path / "whole")
    save_mpoe_only(model, tmp_path / "parts", dense)
    loaded = {
        "whole": load_mpoe(tmp_path / "whole"),
        "parts": load_mpoe(tmp_path / "parts", base=dense),
        "base": MPOEGPT2Model.from_pretrained(tmp_path / "whole"),  # its weights have shorter names
    }
    for name, each in loaded.items():
        assert [row.error for row in summarize(each, 8)] == errors, name


@pytest.mark.parametrize("kept", [None, "x", {}, {"transformer.h.0.mlp.experts.up": "x"}])
def test_errors_that_a_checkpoint_does_not_hold(converted, tmp_path, kept):
    """Older checkpoints have none."""
    converted("gpt2", max_bond=3, shape="paper").save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    values["conversion_errors"] = kept
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    assert {row.cells()[6] for row in summarize(load_mpoe(tmp_path), 8)} == {"-"}


def test_no_weights_no_summary(converted):
    model = converted("gpt2", expert_type="dense")
    with pytest.raises(ValueError, match="mpoe_summary needs a model with MPO weights"):
        model.mpoe_summary()
    with pytest.raises(ValueError, match="no central cores to freeze"):
        model.freeze_central()
    with pytest.raises(ValueError, match="num_tokens must be at least 0; got -1"):
        converted("gpt2").mpoe_summary(-1)


def test_frozen_centres_stay_and_everything_else_learns(converted):
    model, inputs = converted("t5").train(), batch("t5")
    model.freeze_central()
    kinds = parameter_kind(model)
    model(**inputs).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (kinds[name] != "central"), name
        assert (parameter.grad is None) == (kinds[name] == "central"), name
    model.unfreeze_central()
    model(**inputs).loss.backward()
    assert all(torch.isfinite(p.grad).all() for n, p in model.named_parameters() if kinds[n] == "central")
