"""E matrices around one centre: recovered if there is one, otherwise the error is reported."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from mpoe_kernels import MPOShape, decompose, decompose_shared, expert_weights, fold
from tests.cases import SMALL_SHAPES

EXPERTS = 3


def around_one_centre(shape, relative):
    """Matrices of experts whose auxiliary cores have diverged, in float64."""
    cores = decompose(torch.randn(shape.in_features, shape.out_features, dtype=torch.float64), shape)
    apart = [
        core if k == shape.central else core + relative * core.abs().mean() * torch.randn(EXPERTS, *core.shape)
        for k, core in enumerate(cores)
    ]
    return expert_weights(fold(apart, shape.central, shape, EXPERTS))


def errors(weights, result):
    found = expert_weights(fold(result.cores, result.shape.central, result.shape, len(weights)))
    return (found - weights).flatten(1).norm(dim=1)


@pytest.mark.parametrize(
    ("shape", "bound"), [(MPOShape.separable(16, 24), 1e-6), (MPOShape.paper(16, 24), 1e-4)], ids=["separable", "paper"]
)
def test_a_centre_that_is_there_is_found(shape, bound):
    torch.manual_seed(0)
    weights = around_one_centre(shape, 0.1)
    result = decompose_shared(weights, shape)
    assert result.relative_error_bound <= bound
    assert float(errors(weights, result).norm()) <= bound * float(weights.norm())
    assert result.cores[shape.central].shape == shape.core_shapes[shape.central]
    assert all(c.shape == (EXPERTS, *shape.core_shapes[k]) for k, c in enumerate(result.cores) if k != shape.central)


@pytest.mark.parametrize("name", SMALL_SHAPES)
def test_the_error_is_told_and_never_grows(name):
    shape = SMALL_SHAPES[name]
    weights = torch.randn(EXPERTS, shape.in_features, shape.out_features, dtype=torch.float64)
    told = []
    for sweeps in (1, 2, 4):
        result = decompose_shared(weights, shape, sweeps)
        own = errors(weights, result)
        torch.testing.assert_close(torch.tensor(result.expert_errors).double(), own / weights.flatten(1).norm(dim=1))
        assert result.error_bound == pytest.approx(float(own.norm()), rel=1e-6, abs=1e-9)
        assert result.sweeps <= sweeps
        told.append(result.relative_error_bound)
    # A matrix's padding counts in the search, but not in the reported error.
    assert all(after <= before * (1 if shape.is_full else 1.001) for before, after in pairwise(told))


def test_equal_matrices_need_no_search_and_zeros_are_no_division():
    shape = MPOShape.separable(8, 12)
    weights = torch.randn(1, 8, 12).expand(EXPERTS, -1, -1)
    result = decompose_shared(weights, shape)
    assert result.relative_error_bound <= 1e-6
    assert result.cores[0].dtype == torch.float32
    none = decompose_shared(torch.zeros(EXPERTS, 8, 12), shape)
    assert (none.relative_error_bound, none.expert_errors, none.sweeps) == (0.0, (0.0,) * EXPERTS, 0)
    opposed = torch.stack([weights[0], -weights[0]])  # their mean vanishes
    assert decompose_shared(opposed, shape).relative_error_bound <= 1e-6


@pytest.mark.parametrize(
    ("weights", "shape", "sweeps", "kind", "words"),
    [
        (
            torch.zeros(2, 8, 13),
            MPOShape.separable(8, 12),
            1,
            ValueError,
            r"= \[E, 8, 12\] with E >= 1; got \[2, 8, 13",
        ),
        (torch.zeros(0, 8, 12), MPOShape.separable(8, 12), 1, ValueError, r"with E >= 1; got \[0, 8, 12\]"),
        (torch.zeros(8, 12), MPOShape.separable(8, 12), 1, ValueError, "weights must be"),
        (torch.zeros(2, 8, 12).int(), MPOShape.separable(8, 12), 1, TypeError, "weights must have a floating dtype"),
        (torch.zeros(2, 8, 12), (8, 12), 1, TypeError, "shape must be an MPOShape; got tuple"),
        (torch.zeros(2, 8, 12), MPOShape.separable(8, 12), 0, ValueError, "sweeps must be at least 1; got 0"),
        (torch.full((2, 8, 12), torch.nan), MPOShape.separable(8, 12), 1, ValueError, "finite; they hold NaN or Inf"),
        (torch.zeros(2, 8, 12, device="meta"), MPOShape.separable(8, 12), 1, ValueError, "must have values"),
    ],
)
def test_what_cannot_be_decomposed_is_refused(weights, shape, sweeps, kind, words):
    with pytest.raises(kind, match=words):
        decompose_shared(weights, shape, sweeps)
