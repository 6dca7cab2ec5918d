"""Benchmarks with a command of their own, on tiny sizes."""

from __future__ import annotations

import json

import pytest
from mpoe_bench import decoding, whole_step


def test_decoding_times_whole_calls_and_later_tokens(tmp_path, capsys) -> None:
    words = "--shapes light --batches 2 --width 64 --layers 1 --rounds 1 --tokens 4 --after 2 --dtype float32"
    out = tmp_path / "decoding.json"
    assert decoding.main([*words.split(), "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert "light" in capsys.readouterr().out
    assert found["machine"]["processor"]
    (row,) = found["rows"]
    assert set(row["x"]) == set(row["x_after"]) == set(decoding.CHOICES)
    assert all(value > 0 for key in ("x", "x_after") for value in row[key].values())
    # Two layers of 64 x 256 in float32. With room for all, full weights are cached of the experts that were used.
    dense = 2 * 2 * 64 * 256 * 4 / 1e6
    assert row["MB"]["dense layers"] == pytest.approx(dense)
    assert dense < row["MB"]["room for all"] <= 8 * dense
    assert row["MB"]["dense experts"] == pytest.approx(8 * dense)


def test_decoding_refuses_to_leave_out_all_tokens(capsys) -> None:
    with pytest.raises(SystemExit):
        decoding.main(["--tokens", "4", "--after", "4"])
    assert "--after must be between 0 and 3, one less than --tokens; got 4" in capsys.readouterr().err


def test_whole_steps_against_dense_experts(tmp_path, capsys) -> None:
    out = tmp_path / "steps.json"
    words = "--tokens 2,8 --layers 1 --width 64 --vocabulary 64 --experts 4 --dtype float32 --rounds 1"
    assert whole_step.main([*words.split(), "--out", str(out)]) == 0
    dense, separable, experts = json.loads(out.read_text())["rows"]
    assert [row["name"] for row in (dense, separable, experts)] == ["dense", "separable", "dense experts"]
    networks = 2 * 2 * 64 * 256  # of two layers
    assert experts["parameters"] - dense["parameters"] == pytest.approx(3 * networks, rel=0.02)  # and routers
    assert dense["parameters"] < separable["parameters"] < experts["parameters"]
    assert all(row["state_bytes"] == 4 * 4 * row["parameters"] for row in (dense, separable, experts))
    assert all(row["activation_bytes"] > 0 for row in (dense, separable, experts))
    assert len(separable["x"]) == 1
    assert "dense experts" in capsys.readouterr().out
