"""What only the compiled routing kernels guarantee: exact conversions, strided rows."""

from __future__ import annotations

import pytest
import torch

from mpoe_kernels import Routing, backend_reasons, combine, dispatch, route


@pytest.fixture(autouse=True)
def _native(native_library: None) -> None:
    assert not backend_reasons()["native"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_value_of_two_bytes_survives(dtype: torch.dtype) -> None:
    values = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(-1, 1)
    routing = route(torch.zeros(values.shape[0], 1, dtype=torch.int64), 1)
    got = combine(values, routing, torch.ones(values.shape[0], 1), backend="native")
    nan = values.isnan()
    assert torch.equal(got[~nan], values[~nan])
    assert bool(got[nan].isnan().all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_that_of_torch(dtype: torch.dtype) -> None:
    """A gate times one is rounded as torch rounds that float32: also ties, overflow, subnormals and NaN."""
    rows = 200_000
    bits = torch.randint(-(2**31), 2**31, (rows, 1), dtype=torch.int64)
    near_limits = torch.tensor([65504.0, 65519.99, 65520.0, 65536.0, 2**-14, 2**-24, 2**-25, 2**-25 * 1.01, 0.0, -0.0])
    ties = (torch.randint(-(2**15), 2**15, (rows, 1), dtype=torch.int32).short().view(dtype)).float() * (1 + 2**-9)
    gates = torch.cat([bits.int().view(torch.float32), ties, near_limits.view(-1, 1), -near_limits.view(-1, 1)])
    routing = route(torch.zeros(gates.shape[0], 1, dtype=torch.int64), 1)
    got = combine(torch.ones(gates.shape[0], 1, dtype=dtype), routing, gates, backend="native")
    want = gates.to(dtype)
    nan = gates.isnan()
    assert torch.equal(got[~nan], want[~nan])
    assert bool(got[nan].isnan().all())


def test_rows_may_lie_apart_or_overlap() -> None:
    routing = route(torch.tensor([[1], [0], [1]]), 2)
    apart = torch.randn(3, 10)[:, 2:6]
    expanded = torch.randn(1, 4).expand(3, 4)
    for x in (apart, expanded, torch.randn(4, 3).T):
        assert torch.equal(dispatch(x, routing, backend="native"), x[routing.token_of_slot])


def test_offsets_may_be_int64() -> None:
    routing = route(torch.tensor([[1], [0], [1]]), 2)
    wide = Routing(routing.expert_offsets.long(), routing.token_of_slot, routing.slot_of_token)
    x = torch.randn(3, 4)
    assert torch.equal(dispatch(x, wide, backend="native"), dispatch(x, routing, backend="native"))
