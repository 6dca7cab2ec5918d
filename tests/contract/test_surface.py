"""Nothing that a user could name at commit e1aa197 is gone or has another default; more may be there."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from .surface import missing, names, options

EARLIER: dict[str, Any] = json.loads(Path(__file__).with_name("surface_e1aa197.json").read_text())
# Changed on purpose: what `missing` says of it -> why.
DELIBERATE: dict[str, str] = {}


@pytest.mark.parametrize(("kind", "today"), [("names", names), ("options", options)])
def test_nothing_is_gone(kind: str, today: Any) -> None:
    found = missing(EARLIER[kind], today())
    assert sorted(set(found) - set(DELIBERATE)) == []


def test_what_goes_is_noticed() -> None:
    today = copy.deepcopy(EARLIER)
    del today["options"]["train"]["--num-experts"]
    today["options"]["bench"]["--clock"]["default"] = "cpu"
    del today["names"]["mpoe.convert_to_mpoe"]
    parameters = today["names"]["mpoe_kernels.mpo_linear"]["parameters"]
    today["names"]["mpoe_kernels.mpo_linear"]["parameters"] = {"new": "POSITIONAL_OR_KEYWORD None", **parameters}
    assert missing(EARLIER, today) == [
        "names: mpoe.convert_to_mpoe is gone",
        "names: mpoe_kernels.mpo_linear: parameters: other arguments by position",
        "options: train: --num-experts is gone",
        "options: bench: --clock: default was 'wall', is 'cpu'",
    ]
