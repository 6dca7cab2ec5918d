"""Both projections of a gated network on the device, with all gradients, against the float64 reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mpoe_kernels import MPOBlocks, MPOShape, grouped_mpo_linear
from mpoe_kernels.reference import grouped_mpo_linear_reference
from tests.assertions import assert_calibrated
from tests.cases import SMALL_SHAPES

from .test_device_ops import LARGE, dtypes, make_blocks, make_routing

NAMES = ("y", "dx", "dbias", "dleft", "dcentral", "dright", "dgate_left", "dgate_central", "dgate_right")


def check_gated(backend: str, shape: MPOShape, dtype: torch.dtype, device: torch.device) -> None:
    """Forward and backward with bias and SiLU; some experts are idle, some slots empty."""
    tokens, experts = 37 if shape in SMALL_SHAPES.values() else 300, 5
    routing = make_routing(tokens, experts, "some_idle", device, capacity=tokens // 4)
    blocks = [make_blocks(shape, experts, dtype, device) for _ in range(2)]
    x = torch.randn(tokens, shape.in_features, device=device).to(dtype)
    bias = torch.randn(shape.out_features, device=device).to(dtype)
    inputs = [x, bias, *(t for each in blocks for t in (each.left, each.central, each.right))]
    sizes = shape.in_features, shape.out_features
    offsets, rows = routing.expert_offsets, routing.token_of_slot
    grad = torch.randn(rows.shape[0], shape.out_features, device=device).to(dtype)

    def ours(x: Tensor, bias: Tensor, *parts: Tensor) -> Tensor:
        up, gate = MPOBlocks(*parts[:3], *sizes), MPOBlocks(*parts[3:], *sizes)
        where = {"row_index": rows, "slot_of_token": routing.slot_of_token, "backend": backend}
        factor = grouped_mpo_linear(x, gate, offsets, activation="silu", **where)
        return factor * grouped_mpo_linear(x, up, offsets, bias, **where)

    def reference(x: Tensor, bias: Tensor, *parts: Tensor) -> Tensor:
        up, gate = MPOBlocks(*parts[:3], *sizes), MPOBlocks(*parts[3:], *sizes)
        factor = grouped_mpo_linear_reference(x, gate, offsets, row_index=rows, activation="silu")
        return factor * grouped_mpo_linear_reference(x, up, offsets, bias, row_index=rows)

    def run(function: Callable[..., Tensor], kind: torch.dtype) -> list[Tensor]:
        leaves = [t.detach().to(kind).requires_grad_() for t in inputs]
        y = function(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(kind))]

    truth, same = run(reference, torch.float64), run(reference, dtype)
    for name, found, exact, plain in zip(NAMES, run(ours, dtype), truth, same, strict=True):
        assert_calibrated(found, exact, plain, name, 3)


@dtypes
@pytest.mark.parametrize("name", ["light", "padded", "separable"])
def test_gated_networks(able: str, name: str, dtype: torch.dtype, device: torch.device) -> None:
    check_gated(able, SMALL_SHAPES[name], dtype, device)


@dtypes
@pytest.mark.parametrize("name", LARGE)
def test_large_gated_networks(able: str, name: str, dtype: torch.dtype, device: torch.device) -> None:
    if device.type == "cpu":
        pytest.skip("tiles are full on a GPU alone; the other tests have the CPU's sizes")
    check_gated(able, LARGE[name], dtype, device)
