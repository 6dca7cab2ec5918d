"""Tests of the test tools: every assertion can fail."""

import pytest
import torch
from mpoe_bench.cases import expert_choice, relative_error

from tests.assertions import assert_calibrated, poisoned_memory


def test_calibrated_assertion_catches_what_it_should() -> None:
    truth = torch.randn(100, dtype=torch.float64)
    single = truth.float()
    assert_calibrated(single, truth, single)
    with pytest.raises(AssertionError, match="relative error"):
        assert_calibrated(single * (1 + 1e-5), truth, single)
    with pytest.raises(AssertionError, match="holds NaN"):
        assert_calibrated(torch.full_like(single, float("nan")), truth, single)
    with pytest.raises(AssertionError, match="expected shape"):
        assert_calibrated(single[:3], truth, single)
    with pytest.raises(AssertionError, match="expected dtype"):
        assert_calibrated(single.double(), truth, single)


def test_relative_error_of_a_zero_truth_is_absolute() -> None:
    assert relative_error(torch.tensor([3.0, 4.0]), torch.zeros(2)) == 5.0


def test_poisoned_memory_fills_and_restores() -> None:
    with poisoned_memory():
        assert bool(torch.empty(64).isnan().all())
        assert bool(torch.ones(3).new_empty(64).isnan().all())
    assert not torch.are_deterministic_algorithms_enabled()


def test_expert_choice_distributions() -> None:
    assert set(expert_choice("all_to_one", 50, 4)[:, 0].tolist()) == {3}
    assert set(expert_choice("some_idle", 200, 4)[:, 0].tolist()) == {0, 2}
    zipf = torch.bincount(expert_choice("zipf", 4000, 4)[:, 0])
    assert zipf[0] > zipf[3] * 2
    with pytest.raises(ValueError, match="kind must be"):
        expert_choice("normal", 3, 2)
