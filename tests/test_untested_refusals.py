"""The plugin that looks for refusals without a test: which statements it counts, and that marks are reached."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

SOURCE = """
def check(value):
    if value is None:
        raise AttributeError(value)  # of the language
    try:
        return int(value)
    except ValueError:
        if value == "":
            raise ValueError("value must be a number")
        raise
"""


def test_what_counts_and_what_is_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", sys.meta_path.copy())  # importing the plugin marks nothing here
    plugin = pytest.importorskip("untested_refusals")
    file = tmp_path / "module.py"
    file.write_text(SOURCE)
    assert list(plugin.refusals(file)) == [(f"{file}:9", 'raise ValueError("value must be a number")')]
    reached: list[str] = []
    monkeypatch.setattr("builtins.__reached__", reached.append)
    marked = ast.fix_missing_locations(plugin._Marks(str(file)).visit(ast.parse(SOURCE)))
    names: dict = {}
    exec(compile(marked, str(file), "exec"), names)
    assert names["check"]("3") == 3
    assert reached == []
    with pytest.raises(ValueError, match="value must be a number"):
        names["check"]("")
    assert reached == [f"{file}:9"]
