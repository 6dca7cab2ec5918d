"""Whether a gated network's projections run together or separately: by predicted times, or measured ones if any."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from mpoe_kernels import MPOShape, choice, registry
from mpoe_kernels.contract.autotune import Problem, cheaper_together, strategy_together
from mpoe_kernels.linear.gpu.cost import TRITON, gated_seconds, gpu_seconds, multiply_seconds
from mpoe_kernels.linear.triton import cost
from mpoe_kernels.contract import HARDWARE, BlockDims, Contraction, contraction
from mpoe_kernels.registry import Backend, Candidate, GatedPrice

CARD = HARDWARE["h100"]
DIMS = BlockDims.of_shape(MPOShape.paper(768, 3072, max_bond=32))
SEPARABLE = BlockDims.of_shape(MPOShape.separable(768, 3072))
PROBLEM = Problem("grouped_mpo_linear", DIMS, 8, 4096, torch.bfloat16, "cuda")
# Strategy -> seconds of one projection, and of both together.
PRICES = {"rebuild": (3.0, 4.0), "half_left": (2.0, 3.5), "half_right": (9.0, 9.5), "chain": (8.0, 9.0)}


def nothing(_: object) -> None:
    raise AssertionError("not called")


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Backend]:
    """A function that registers a backend with the prices above."""

    def registered(multiplying: float = 0.0, gated: bool = True, refuses: str = "") -> Backend:
        made = Backend(
            "made up",
            {},
            candidates=lambda plan: [
                Candidate("made up", f"{plan.strategy} on chip", plan.strategy, 0.1, nothing),
                Candidate("made up", plan.strategy, plan.strategy, PRICES[plan.strategy][0], nothing),
            ],
            contraction_reasons=lambda plan: ["no"] if plan.strategy == refuses else [],
            gated_price=(lambda plan: GatedPrice(PRICES[plan.strategy][1], multiplying)) if gated else None,
        )
        monkeypatch.setattr(registry, "BACKENDS", {"made up": made})
        strategy_together.cache_clear()
        return made

    return registered


def alone(seconds: float) -> Candidate:
    return Candidate("made up", "half_left on chip", "half_left", seconds, nothing)


def test_the_cheapest_strategy_that_beats_each_alone(backend: Callable[..., Backend]) -> None:
    backend()
    assert strategy_together(alone(1.8), PROBLEM) == "half_left"
    assert strategy_together(alone(1.7), PROBLEM) is None
    assert strategy_together(alone(2.1), PROBLEM._replace(strategy="rebuild")) == "rebuild", (
        "only the one that was asked for"
    )
    assert strategy_together(alone(1.9), PROBLEM._replace(strategy="rebuild")) is None


def test_together_needs_no_multiplication(backend: Callable[..., Backend]) -> None:
    backend(multiplying=0.2)
    assert strategy_together(alone(1.7), PROBLEM) == "half_left"


def test_what_the_backend_cannot_compute_is_no_choice(backend: Callable[..., Backend]) -> None:
    backend(refuses="half_left")
    assert strategy_together(alone(2.1), PROBLEM) == "rebuild"
    backend(gated=False)
    assert strategy_together(alone(100.0), PROBLEM) is None


def test_a_measured_time_of_the_steps_scales_their_pairs(
    backend: Callable[..., Backend], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = backend()
    slower = {"half_left": 4.0}  # seconds, twice the predicted ones

    def seconds_of(_: object, name: str, candidate: str, plan: Contraction) -> float | None:
        assert name == made.name
        return slower.get(candidate)

    monkeypatch.setattr(choice.measured, "seconds_of", seconds_of)
    assert strategy_together(alone(2.1), PROBLEM) == "rebuild", "pairs by half_left are expected to take 7"
    assert strategy_together(alone(1.9), PROBLEM) is None


def test_at_twice_the_seconds_each_stays_alone() -> None:
    assert cheaper_together({"a": 2.0, "b": 3.0}, 1.0) is None
    assert cheaper_together({"a": 3.0, "b": 1.9}, 1.0) == "b"
    assert cheaper_together({}, 1.0) is None


def test_a_card_that_is_not_here_has_the_price_of_one_that_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "_here", lambda plan: (None, CARD, 0.0))
    for strategy in ("rebuild", "half_left"):
        plan = contraction(strategy, DIMS, 8, 4096, torch.bfloat16, "forward")
        assert cost.gated_price(plan) == cost.gated_price_on(plan, CARD)


def price(dims: BlockDims, strategy: str, tokens: int, experts: int = 8) -> tuple[float, float]:
    """Seconds of both projections together, and of both separately with their product."""
    plan = contraction(strategy, dims, experts, tokens, torch.bfloat16, "forward")
    apart = 2 * gpu_seconds(plan, CARD, TRITON) + multiply_seconds(plan, CARD)
    return gated_seconds(plan, CARD, TRITON), apart


def test_few_tokens_wait_for_launches_and_pairs_have_fewer() -> None:
    together, apart = price(SEPARABLE, "separable", 64)
    assert apart - together > 3.5 * CARD.launch_seconds, "3 launches instead of 7"


def test_rows_that_both_share_are_read_once() -> None:
    """By hand: rebuilding reads x in one place; this saves the product's launch and bytes, and one read of x."""
    plan = contraction("rebuild", DIMS, 8, 32768, torch.bfloat16, "forward")
    together, apart = price(DIMS, "rebuild", 32768)
    assert apart - together > multiply_seconds(plan, CARD)


def test_rows_of_their_own_draw_more_from_the_cache() -> None:
    """128 columns of both are 64 of each, so the rows are read twice as often: no gain over large tiles."""
    together, apart = price(SEPARABLE, "separable", 32768)
    assert together > apart


def test_no_tokens_take_no_time() -> None:
    plan = contraction("rebuild", DIMS, 8, 0, torch.bfloat16, "forward")
    assert gated_seconds(plan, CARD, TRITON) == gpu_seconds(plan, CARD, TRITON) * 2
