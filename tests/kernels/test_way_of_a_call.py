"""The recorder of a call's path through the files, and the page that describes it."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SPEC = importlib.util.spec_from_file_location("way_of_a_call", ROOT / "tools" / "way_of_a_call.py")
assert SPEC is not None
assert SPEC.loader is not None
tool = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(tool)


def test_the_page_names_files_that_a_call_passes() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text().split("## The way of a call")[1].split("## Measure")[0]
    numbered = re.findall(r"^\d\. `([^`]+)`", page, re.MULTILINE)
    assert len(numbered) == 6
    named = [name.replace("<backend>", "eager") for name in numbered]
    for name in named:
        assert (ROOT / "mpoe_kernels" / name).is_file(), f"{name} is not there"
    passed = {file for walk in tool.walks("eager", None, cold=True).values() for file in walk.files}
    assert set(named) <= passed


def test_a_return_is_a_call_into_a_file_that_was_left() -> None:
    walk = tool.Walk()
    walk.steps = ["a", "b", "a", "c"]
    assert (walk.files, walk.returns) == (["a", "b", "c"], 1)
