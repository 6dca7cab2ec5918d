"""A whole AdamW step of a small T5: dense, with dense experts, with MPO experts."""

from __future__ import annotations

import pytest
from conftest import parametrize, scale_of
from mpoe_bench.suites.train_step import train_step_comparison


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    scale = scale_of(metafunc.config)
    shapes, sizes = ("separable", "light", "paper"), (scale.model, scale.hidden)
    parametrize(metafunc, [train_step_comparison(shapes, sizes, scale.few_experts, scale.step_tokens, "cpu")])


def test_train_step(time_contender, comparison, contender, phase) -> None:
    time_contender(comparison, contender, phase)
