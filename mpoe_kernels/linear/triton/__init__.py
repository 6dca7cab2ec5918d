"""Triton kernels. Importing this package does not import Triton: a kernel's module is imported when
it first runs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from mpoe_kernels.backends import Candidate, lazily
from mpoe_kernels.contract.plan import Contraction
from mpoe_kernels.linear.gradients import prepared
from mpoe_kernels.linear.grouped import ON_CHIP, backward, counting_reasons, forward
from mpoe_kernels.linear.triton.fused_tiles import fused_reasons
from mpoe_kernels.triton import architecture

MOST_EXPERTS = 4096  # every program of Triton's scans the offsets at once
_FUSED = lazily("mpoe_kernels.linear.triton.fused_launch", "forward", "backward")
_TRITON: Any = lazily("mpoe_kernels.linear.triton.grouped", "rows", "blocks")
_TRITON.fuses = True
# Every strategy, product by product, with Triton's grouped products.
BY_PRODUCTS = SimpleNamespace(
    forward=lambda call: forward(prepared(call), _TRITON),
    backward=lambda call: backward(prepared(call), _TRITON),
)


def candidates(plan: Contraction) -> list[Candidate]:
    """Triton's: with weights that stay on chip where their bonds allow, and product by product."""
    offered = [Candidate("triton", plan.strategy, plan.strategy, getattr(BY_PRODUCTS, plan.phase))]
    target = architecture.target_of(torch.device(plan.device))
    if plan.strategy == "rebuild" and not fused_reasons(plan.dims, plan.dtype, target):
        offered.insert(0, Candidate("triton", ON_CHIP, plan.strategy, getattr(_FUSED, plan.phase)))
    return offered


def contraction_reasons(plan: Contraction) -> list[str]:
    """Why the Triton kernels cannot compute a contraction."""
    reasons = []
    if plan.num_experts > MOST_EXPERTS:
        reasons.append(f"it takes at most {MOST_EXPERTS} experts; got {plan.num_experts}")
    return [*reasons, *counting_reasons(plan)]
