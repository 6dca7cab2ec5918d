"""`tools/compare_benches.py`: pairs of reports, line by line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from compare_benches import compared, main

MACHINE = {"processor": "EPYC", "family": "25", "threads": 1}


def report(ours: float, peer: float, **machine: Any) -> dict[str, Any]:
    rows = [
        {"name": "dense FFN", "forward": {"x": 1.0}},
        {"name": "mpoe [auto]", "forward": {"x": ours}, "train": None},
        {"name": "loop", "forward": {"x": peer}},
    ]
    section = {"title": "FFN", "baseline": "dense FFN", "rows": rows}
    return {"suite": "targets", "machine": MACHINE | machine, "sections": [section]}


def test_ratios_are_those_of_the_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = [
        (report(2.0, 5.0), report(1.0, 5.0)),
        (report(4.0, 5.0), report(3.0, 6.0)),
        (report(1.0, 5.0), report(1.5, 5.0)),
    ]
    folders = {"before": [], "after": []}
    for number, pair in enumerate(pairs):
        for name, one in zip(folders, pair, strict=True):
            folder = tmp_path / f"{name}{number}"
            folder.mkdir()
            (folder / "results.json").write_text(json.dumps(one), encoding="utf-8")
            folders[name].append(str(folder))
    out = tmp_path / "pairs.json"
    assert main(["--before", *folders["before"], "--after", *folders["after"], "--out", str(out)]) == 0
    ours, peer = json.loads(out.read_text(encoding="utf-8"))
    assert (ours["before"], ours["after"], ours["ratio"], ours["range"]) == ([2, 4, 1], [1, 3, 1.5], 0.75, [0.5, 1.5])
    assert (peer["contender"], peer["ratio"], peer["range"]) == ("loop", 1.0, [1.0, 1.2])
    assert "| FFN | mpoe [auto] | forward | 2.00 | 1.50 | 0.750 (0.500-1.500) |" in capsys.readouterr().out


def test_reports_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(ValueError, match="as many folders as before; got 2 and 1"):
        compared([report(1, 1)], [report(1, 1), report(1, 1)])
    with pytest.raises(ValueError, match="one suite, processor and number of threads"):
        compared([report(1, 1)], [report(1, 1, threads=2)])
