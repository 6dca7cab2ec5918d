"""The contractions of csrc/cuda/linear/steps.h, and the operations around them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mpoe_kernels.contract import may_round_to_tf32
from mpoe_kernels.indices import slots_by_token
from mpoe_kernels.linear.cuda.plan import launch_plan
from mpoe_kernels.linear.gpu.products import Pass


@dataclass(frozen=True)
class CudaLaunches:
    """The operations around the contractions, and the contractions as launch plans; see
    `mpoe_kernels.linear.gpu.primitives.Surrounding`.

    Attributes:
        ops: namespace of the compiled ops.
    """

    ops: Any

    def compute(self, whole: Pass) -> None:
        """All tensors are dense; x is the first."""
        values = whole.values
        x = values["x"]
        plan = launch_plan(whole.program, whole.dims, whole.experts, whole.slots, x.dtype, tuple(values))
        self.ops.contract_steps(
            *(list(values.values()), x.new_empty(plan.scratch), plan.steps, whole.dims[:8], whole.offsets, whole.slots),
            *(whole.row_index, whole.bias, whole.activation, whole.pre, may_round_to_tf32(x.dtype)),
            *(whole.out_index, whole.gates),
        )

    def activation_backward(
        self, grad: Tensor, saved: Tensor, offsets: Tensor, activation: str, need_bias: bool
    ) -> tuple[Tensor, Tensor | None]:
        if activation == "none" and not need_bias:
            return grad, None
        dz, dbias = self.ops.activation_backward(grad, saved, offsets, activation, need_bias)
        return grad if activation == "none" else dz, dbias if need_bias else None

    def sum_rows_by_token(self, rows: Tensor, row_index: Tensor, tokens: int) -> Tensor:
        return self.ops.sum_rows(rows, *slots_by_token(row_index, tokens))

    def collect_rows(self, rows: Tensor, slot_of_token: Tensor) -> Tensor:
        return self.ops.combine(rows, slot_of_token, None)

    def begin_sum(self, block: Tensor, grows: bool) -> Tensor:
        """All products add in float32."""
        return torch.zeros(block.shape, dtype=torch.float32, device=block.device)

    def end_sum(self, total: Tensor, dtype: torch.dtype) -> Tensor:
        return total.to(dtype)
