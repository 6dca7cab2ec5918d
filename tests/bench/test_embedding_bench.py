"""`python -m mpoe_bench.embedding` on a tiny table: what it counts, what it writes; wrong results are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from mpoe_bench import embedding

from mpoe_kernels.contract import BlockDims

TINY = ["--table", "60,12", "--bond", "4", "--rows", "1,9", "--head_rows", "3", "--seconds", "0.001", "--scale", "16"]
DIMS = BlockDims(iL=5, jL=2, a=3, iC=2, jC=3, b=4, iR=6, jR=2, in_features=60, out_features=12)


def test_shared_products_count_once() -> None:
    # Two distinct rows with the same iL and iC, then with the same iC and iR.
    rows_of_one_left, rows_of_one_right = torch.tensor([0, 1, 1]), torch.tensor([0, 12, 0])
    assert embedding.embedding_flops(rows_of_one_left, DIMS) == 2 * (2 * 3 * 4 * 3 + 2 * 2 * 3 * 4 * 2)
    assert embedding.embedding_flops(rows_of_one_right, DIMS) == 2 * (3 * 4 * 3 * 2 + 2 * 2 * 3 * 3 * 2)


def test_every_row_is_measured_and_written_with_its_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.json"
    assert embedding.main([*TINY, "--backends", "eager", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    keys = [(row["op"], row["rows"], row["dtype"], row["phase"]) for row in found["rows"]]
    cases = [("embedding", 1), ("embedding", 9), ("head", 3)]
    assert keys == [(*c, d, p) for c in cases for d in ("float32", "bfloat16") for p in ("forward", "both")]
    assert all(row["x_full"] > 0 and row["x_bound"] > 0 and row["GFLOP"] > 0 for row in found["rows"])
    assert found["machine"]["processor"]
    assert "torch" in found["machine"]["libraries"]
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(keys)


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "mpo_embedding", lambda ids, blocks, backend: torch.zeros(len(ids), 12))
    with pytest.raises(ValueError, match=r"eager, 1 rows of torch\.float32: the result is off by 1\.0e"):
        embedding.main([*TINY, "--backends", "eager"])
