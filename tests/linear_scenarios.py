"""What the kernels of every backend are tested with beside their own tests: `LinearProblem` in unusual situations."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest

from mpoe_kernels.mpo.shape import MPOShape
from tests.cases import SMALL_SHAPES
from tests.linear_problem import planned_strategies


def halved(cases: Iterable[tuple[Any, ...]]) -> list[Any]:
    """Parameters of which every second one is left to the exhaustive suite."""
    marks = ([], [pytest.mark.exhaustive])
    return [pytest.param(*case, marks=marks[number % 2]) for number, case in enumerate(cases)]


class LinearScenarios:
    """Tests for pytest; a class ``Test...`` below it says what they run.

    Attributes:
        problem: a `LinearProblem` that runs some kernels.
        strategies: the strategies of a shape.
    """

    problem: Callable[..., Any]
    strategies: Callable[[MPOShape], list[str]] = staticmethod(planned_strategies)

    @pytest.mark.parametrize(
        ("activation", "gathered"),
        halved((a, g) for g in (False, True) for a in ("none", "relu", "gelu", "gelu_tanh", "silu")),
    )
    def test_activations_with_and_without_gather(self, activation: str, gathered: bool) -> None:
        self.problem(SMALL_SHAPES["separable"], activation=activation, gathered=gathered).check("separable")
        light = self.problem(SMALL_SHAPES["light"], activation=activation, gathered=gathered, with_bias=False)
        light.check("rebuild")

    @pytest.mark.parametrize(
        ("name", "kind"),
        halved(
            [("light", "all_to_one"), ("light", "some_idle"), ("separable", "some_idle"), ("separable", "all_to_one")]
        ),
    )
    def test_distributions(self, name: str, kind: str) -> None:
        shape = SMALL_SHAPES[name]
        for strategy in self.strategies(shape):
            case = self.problem(shape, tokens=5, experts=4, top_k=1, capacity=None, kind=kind, activation="silu")
            case.check(strategy)

    @pytest.mark.parametrize("name", ["light", "separable"])
    @pytest.mark.parametrize("activation", ["none", "gelu"])
    def test_no_tokens(self, name: str, activation: str) -> None:
        for strategy in self.strategies(SMALL_SHAPES[name]):
            self.problem(SMALL_SHAPES[name], tokens=0, top_k=1, activation=activation).check(strategy)

    @pytest.mark.parametrize("name", ["paper", "separable"])
    def test_backward_strategy_is_chosen_on_its_own(self, name: str) -> None:
        shape = SMALL_SHAPES[name]
        strategies = self.strategies(shape)
        for forward, backward in zip(strategies, [*strategies[1:], strategies[0]], strict=True):
            self.problem(shape, activation="relu").check(forward, backward)
