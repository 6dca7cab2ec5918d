"""Grouped MPO linear by the kernels of csrc/cuda/linear: the fused contraction, whose weights never leave the chip.

Forward: one launch of the panel kernel. Backward: one of it for x, one of the gradient kernel for left and central, one
for right, with a library product each. Other strategies are library products, which are backend eager's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mpoe_kernels.backends import Candidate
from mpoe_kernels.contract import Contraction, may_round_to_tf32
from mpoe_kernels.contract.orders import BlockDims
from mpoe_kernels.linear.cuda.panels import Panel, best_panel, gradient_tile
from mpoe_kernels.linear.grouped import (
    Backward,
    Forward,
    Gradients,
    Slots,
    around_gradients,
    block_gradients,
    counting_reasons,
    prepared,
)

if TYPE_CHECKING:
    from mpoe_kernels.linear.op import BackwardCall, ForwardCall

Call = TypeVar("Call", "ForwardCall", "BackwardCall")
IN_PANELS = "rebuild in panels"  # name of the candidate
BLOCKS_WANTED = 256  # of a launch whose sum can be divided, whatever the card


def _prepared(call: Call) -> Call:
    """The kernels read dense tensors and count slots in 32 bits."""
    if call.expert_offsets.dtype != torch.int32:
        call = replace(call, expert_offsets=call.expert_offsets.to(torch.int32))
    return prepared(call, "x", "left", "central", "right")


@dataclass(frozen=True)
class LinearKernels:
    """The two kernels of the op.

    Attributes:
        ops: namespace of the compiled ops.
        shared_memory: bytes of shared memory that a block may use on a device.
        name: of the backend.
    """

    ops: Any
    shared_memory: Callable[[str], int]
    name: str = "cuda"

    def _panel(self, dims: BlockDims, transposed: bool, like: Tensor) -> Panel:
        found = best_panel(dims, transposed, like.itemsize, self.shared_memory(str(like.device)))
        assert found is not None, "contraction_reasons says so beforehand"
        return found

    def contraction_reasons(self, plan: Contraction) -> list[str]:
        """Why the kernels cannot compute a contraction."""
        if plan.strategy != "rebuild":
            return [f"it has a kernel for the strategy 'rebuild' only, not for {plan.strategy!r}"]
        reasons, memory = counting_reasons(plan), self.shared_memory(plan.device)
        if best_panel(plan.dims, plan.phase == "backward", plan.dtype.itemsize, memory) is None:
            reasons.append(f"no panel of a weight with bonds {plan.dims.a} and {plan.dims.b} fits {memory} bytes")
        return reasons

    def candidates(self, plan: Contraction) -> list[Candidate]:
        """The only one."""
        return [Candidate(self.name, IN_PANELS, plan.strategy, getattr(self, plan.phase))]

    def forward(self, call: ForwardCall, panel: Panel | None = None) -> Forward:
        """``(y, h, z)``, see `ForwardCall`; ``panel``: instead of the best one."""
        call = _prepared(call)
        y = call.x.new_empty(call.slots, call.out_features)
        pre = torch.empty_like(y) if call.saves_z else None
        panel = panel or self._panel(call.dims, False, y)
        around = call.row_index, call.bias, call.activation, pre
        self._panels(call, call.x, y, panel, False, around, (call.out_index, call.gates))
        return y, y.new_empty(0), y.new_empty(0) if pre is None else pre

    def backward(self, call: BackwardCall, panel: Panel | None = None) -> Backward:
        """``(dx, dleft, dcentral, dright, dbias)``, see `BackwardCall`; ``panel``: instead of the best one."""
        call = _prepared(call)

        def gradients(dz: Tensor) -> Gradients:
            dx = dz.new_empty(call.slots, call.in_features) if call.need[0] else None
            if dx is not None:
                cut = panel or self._panel(call.dims, True, dx)
                self._panels(call, dz, dx, cut, True, (None, None, "none", None), (None, None))
            return dx, *block_gradients(call, dz, self._weight_gradient_times)

        return around_gradients(call, gradients)

    def _panels(
        self,
        call: ForwardCall | BackwardCall,
        rows: Tensor,
        out: Tensor,
        panel: Panel,
        transposed: bool,
        around: tuple[Tensor | None, Tensor | None, str, Tensor | None],
        placed: tuple[Tensor | None, Tensor | None],
    ) -> None:
        """Product of rows and W, or its transpose, which is rebuilt in shared memory some columns at a time.

        ``around``: row_index, bias, activation and pre-activation; ``placed``: out_index and gates of a `ForwardCall`.
        """
        sizes = call.in_features, call.out_features, transposed, panel.sizes, panel.left_first
        self.ops.panel_product(
            *(rows, *call.blocks, out, call.expert_offsets, *around),
            *(*sizes, may_round_to_tf32(rows.dtype), *placed),
        )

    def _weight_gradient_times(
        self, call: BackwardCall, dz: Tensor, other: Tensor, of_right: bool, slots: Slots
    ) -> Tensor:
        """See `mpoe_kernels.linear.grouped.block_gradients`. One launch."""
        d, experts = call.dims, other.shape[0]
        x, dz = (
            F.pad(rows, (0, columns - rows.shape[1])) if columns != rows.shape[1] else rows.contiguous()
            for rows, columns in ((call.x, d.iL * d.iC * d.iR), (dz, d.jL * d.jC * d.jR))
        )
        tile = gradient_tile(d)
        if of_right:
            blocks = experts * (d.iR // tile[2]) * (d.jR // tile[3])
            parts = max(1, min(d.iC * d.jC, BLOCKS_WANTED // blocks))
            out = torch.empty(parts, experts, d.b, d.iR, d.jR, dtype=torch.float32, device=dz.device)
        else:
            out = dz.new_empty(experts, d.iL, d.jL, d.iC, d.jC, d.b)
        self.ops.weight_gradient_product(
            *(x, dz, other.contiguous(), out, slots.offsets.contiguous(), call.row_index),
            *(d[:8], tile, of_right, may_round_to_tf32(dz.dtype)),
        )
        return out.sum(0) if of_right else out
