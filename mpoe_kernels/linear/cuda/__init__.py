"""Grouped MPO linear by the kernels of csrc/cuda: step by step, or with weights rebuilt in shared memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mpoe_kernels.backends import Candidate
from mpoe_kernels.contract import Contraction, may_round_to_tf32
from mpoe_kernels.linear.cuda.contractions import CudaLaunches
from mpoe_kernels.linear.cuda.panels import Panel, best_panel
from mpoe_kernels.linear.gpu import steps

if TYPE_CHECKING:
    from mpoe_kernels.linear.op import BackwardCall, ForwardCall

READ = ("x", "left", "central", "right", *steps.DENSE)
IN_PANELS = "rebuild in panels"  # name of the candidate whose weights stay on chip


def _prepared(call: steps.Call) -> steps.Call:
    """The kernels read dense tensors and count slots in 32 bits."""
    if call.expert_offsets.dtype != torch.int32:
        call = replace(call, expert_offsets=call.expert_offsets.to(torch.int32))
    return steps.prepared(call, READ)


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

    @property
    def launches(self) -> CudaLaunches:
        """The launches of a program's products."""
        return CudaLaunches(self.ops)

    def panel_of(self, plan: Contraction) -> Panel | None:
        """The panel with which a contraction keeps its weights on chip; None if none fits, or nothing would use one."""
        backward = plan.phase == "backward"
        if plan.strategy != "rebuild" or plan.slots == 0 or (backward and not plan.need[0]):
            return None
        return best_panel(plan.dims, backward, plan.dtype.itemsize, self.shared_memory(plan.device))

    def candidates(self, plan: Contraction) -> list[Candidate]:
        """The candidates of a contraction: in panels where they fit, and step by step."""
        run = self.forward if plan.phase == "forward" else self.backward
        ways: dict[str, Panel | None] = {plan.strategy: None}
        if (panel := self.panel_of(plan)) is not None:
            ways = {IN_PANELS: panel, **ways}
        return [Candidate(self.name, way, plan.strategy, partial(run, panel=cut)) for way, cut in ways.items()]

    def forward(self, call: ForwardCall, panel: Panel | None) -> tuple[Tensor, Tensor, Tensor]:
        """``(y, h, z)``, see `ForwardCall`; without a panel step by step."""
        call = _prepared(call)
        if panel is None:
            return steps.forward_by_steps(call, self.launches)
        x = call.x
        y = x.new_empty(call.slots, call.out_features)
        pre = torch.empty_like(y) if call.saves_z else None
        around = call.row_index, call.bias, call.activation, pre
        self._panels(call, x, y, panel, False, around, (call.out_index, call.gates))
        return y, x.new_empty(0), x.new_empty(0) if pre is None else pre

    def backward(self, call: BackwardCall, panel: Panel | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """``(dx, dleft, dcentral, dright, dbias)``, see `BackwardCall`. ``panel``: of the kernel that computes dx."""
        return steps.backward(_prepared(call), self.launches, partial(self._gradients, panel=panel))

    def _gradients(self, call: BackwardCall, dz: Tensor, dx: Tensor | None, panel: Panel | None) -> steps.Gradients:
        need = call.need_of_plan
        if panel is not None and dx is not None:
            self._panels(call, dz, dx, panel, True, (None, None, "none", None), (None, None))
            need = (False, *need[1:])
        if not any(need):
            return steps.NO_GRADIENTS
        return steps.gradients_by_steps(call, self.launches, dz, dx, need)

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
