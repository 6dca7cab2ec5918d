"""The cases of `tools/auto_choice.py`."""

from __future__ import annotations

import pytest
from auto_choice import SUBSET, cases_of


def test_the_default_are_cases_of_every_phase_and_dtype() -> None:
    names = [case.name for case in cases_of(SUBSET)]
    assert len(names) == len(set(names)) == 32
    assert all(any(part in name for name in names) for part in ("float32", "bfloat16", "forward", "training"))


def test_texts_in_no_name_are_refused() -> None:
    with pytest.raises(ValueError, match=r"only must be texts in names of planner cases.*E7-T7"):
        cases_of("E7-T7-")
