"""What counts as an open failure in other people's suites."""

from __future__ import annotations

import json
import sys

import pytest
from external_table import compare, main

PASSED, SKIPPED = {"outcome": "passed"}, {"outcome": "skipped", "reason": "no GPU"}
FAILED = {"id": "test_models.py::MPOE_t5::test_a", "outcome": "failed", "reason": "AssertionError: 1 != 2"}


def test_a_failure_is_open_unless_the_dense_class_fails_too_or_it_is_explained():
    ours = {
        "test_a": FAILED,
        "test_b": FAILED,
        "test_c": SKIPPED,
        "test_d": PASSED,
        "test_reverse_loading_mapping": FAILED,
    }
    dense = {"test_a": PASSED, "test_b": FAILED, "test_c": SKIPPED, "test_reverse_loading_mapping": PASSED}
    counts, lines = compare(ours, dense)
    assert counts == {"passed": 1, "skipped": 1, "failed": 3, "open": 1}
    assert lines == [
        "`test_a` failed: open: AssertionError: 1 != 2",
        "`test_reverse_loading_mapping` failed: renames keys of older checkpoints, which mixtures never had",
    ]


def test_a_skip_beyond_the_dense_class_is_listed():
    counts, lines = compare({"test_a": SKIPPED}, {"test_a": PASSED})
    assert (counts["skipped"], counts["open"]) == (1, 0)
    assert lines == ["`test_a` skipped: no GPU"]


def test_tests_that_are_explained_alike_share_a_line():
    alike = {f"test_fsdp2_{name}": SKIPPED for name in "ab"}
    counts, lines = compare(alike, dict.fromkeys(alike, PASSED))
    assert (counts["skipped"], counts["open"]) == (2, 0)
    assert lines == ["`test_fsdp2_*` skipped: starts processes for a list of Transformers' own model types"]
    assert compare({"test_fsdp2_a": FAILED}, {"test_fsdp2_a": PASSED})[0]["open"] == 1


def test_the_command_fails_while_something_is_open(tmp_path, monkeypatch, capsys):
    results = {"MPOE_t5::test_a": FAILED, "Dense_t5::test_a": PASSED}
    (tmp_path / "transformers-t5.json").write_text(json.dumps(results))
    monkeypatch.setattr(sys, "argv", ["external_table.py", str(tmp_path)])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 1
    assert "| Transformers: t5 | 0 | 0 | 1 | 1 |" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["external_table.py", "--failed", str(tmp_path / "transformers-t5.json")])
    main()
    assert capsys.readouterr().out == FAILED["id"]
