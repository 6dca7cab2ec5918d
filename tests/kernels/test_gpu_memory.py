"""The memory that built weights may take."""

from __future__ import annotations

import pytest

from mpoe_kernels import MPOShape
from mpoe_kernels.contract.orders import INDICES, BlockDims
from mpoe_kernels.linear import grouped


@pytest.mark.parametrize("experts", [2, 8, 64])
@pytest.mark.parametrize("built", [("LC", "W"), ("CR", "W"), ("LC",), ("CR",)])
def test_what_is_built_and_its_copy_fit_two_weights_or_a_quarter(built: tuple[str, ...], experts: int) -> None:
    for bond in (16, 64, None):
        dims = BlockDims.of_shape(MPOShape.paper(768, 3072, max_bond=bond))
        at_once = grouped.experts_at_once(dims, built, experts)
        taken = 2 * at_once * max(dims.elements(INDICES[name]) for name in built)
        assert at_once == 1 or taken <= max(2, experts // 4) * dims.weight_elements
    assert grouped.experts_at_once(dims, (), experts) == experts
