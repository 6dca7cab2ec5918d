"""Small shapes of every kind, and cases of tests that vary in several ways."""

from itertools import product
from pathlib import Path

import pytest
import torch

from mpoe_kernels import MPOShape

ROOT = Path(__file__).resolve().parents[1]
in_two_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
in_half_precision = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def either(name):
    """A parameter that is false and true."""
    return pytest.mark.parametrize(name, [False, True])


def named_cases(parameters, cases):
    """Values of a test's parameters, by the case's name."""
    return pytest.mark.parametrize(parameters, list(cases.values()), ids=list(cases))


def every_refusal(table):
    """Parameters ``kind, message, calls`` of a test, by ``{error: {message: call or calls}}``."""
    cases = [
        pytest.param(kind, message, calls if isinstance(calls, list) else [calls], id=message)
        for kind, named in table.items()
        for message, calls in named.items()
    ]
    return pytest.mark.parametrize("kind, message, calls", cases)


def pairwise(*axes):
    """Every combination of the axes' values; those beyond all pairs with another axis run only as
    ``exhaustive``.

    The first two axes meet in full, and the last one takes turns.
    """
    cases = []
    for places in product(*(range(len(axis)) for axis in axes)):
        extra = (sum(places[:-1]) - places[-1]) % len(axes[-1]) != 0
        values = [axis[place] for axis, place in zip(axes, places, strict=True)]
        cases.append(pytest.param(*values, marks=[pytest.mark.exhaustive] * extra))
    return cases


# Small relatives of every kind of shape: odd sizes, padding, edge positions of the centre,
# truncated bonds.
SMALL_SHAPES = {
    "paper": MPOShape((3, 2, 2, 2, 1), (2, 2, 2, 3, 2)),
    "paper_bond_4": MPOShape((3, 2, 2, 2, 1), (2, 2, 2, 3, 2), max_bond=4),
    "light": MPOShape((2, 3, 2), (2, 3, 2)),
    "separable": MPOShape((4, 3, 1), (1, 2, 5)),
    "separable_mirrored": MPOShape((4, 3, 1), (1, 2, 5)).mirrored(),
    "separable_bond_3": MPOShape((4, 3, 1), (1, 2, 5), max_bond=3),
    "padded": MPOShape((2, 3, 2), (3, 2, 2), in_features=11, out_features=10),
    "padded_separable": MPOShape((4, 3, 1), (1, 2, 5), in_features=10, out_features=9),
    "uneven_bonds": MPOShape((2, 3, 2, 2), (3, 1, 2, 2), max_bond=(2, None, 3)),
    "one_core": MPOShape((7,), (5,)),
    "centre_first": MPOShape((3, 2), (2, 4), central=0),
    "centre_last": MPOShape((3, 2, 2), (2, 1, 4), central=2),
    "seven_cores": MPOShape((2, 1, 2, 3, 1, 2, 1), (1, 2, 2, 1, 3, 1, 2)),
}


def resized(tensor, size):
    """A copy whose storage has ``size`` bytes, as FSDP leaves parameters between their uses."""
    copy = tensor.clone()
    copy.untyped_storage().resize_(size)
    return copy
