"""The memory that built weights and partial sums may take."""

from __future__ import annotations

import pytest

from mpoe_kernels import MPOShape
from mpoe_kernels.contract import program_of
from mpoe_kernels.contract.orders import INDICES, BlockDims
from mpoe_kernels.contract.program import COMPOSITES, value_of
from mpoe_kernels.linear.gpu.budget import budget, experts_at_once, room


@pytest.mark.parametrize("experts", [2, 8, 64])
@pytest.mark.parametrize("strategy", ["rebuild", "half_left", "half_right", "chain"])
def test_room_is_what_the_budget_leaves(strategy: str, experts: int) -> None:
    dims = BlockDims.of_shape(MPOShape.paper(768, 3072))
    program = program_of(dims, strategy, "backward")
    at_once = experts_at_once(dims, program.built, experts)
    for product in program.products:
        alive = {value_of(product.first), value_of(product.second), value_of(product.result)} & set(COMPOSITES)
        free = room(dims, product, program.built, at_once, experts)
        taken = at_once * sum(dims.elements(INDICES[name]) for name in alive)
        assert taken + free <= budget(dims, experts) + dims.weight_elements // 8
        assert free >= dims.weight_elements // 8
