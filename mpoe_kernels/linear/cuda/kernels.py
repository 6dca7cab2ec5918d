"""Grouped MPO linear by the kernels of csrc/cuda: step by step, in panels, or in one launch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mpoe_kernels.contract import Contraction, may_round_to_tf32
from mpoe_kernels.linear.call import BackwardCall, ForwardCall
from mpoe_kernels.linear.cuda.cost import ways
from mpoe_kernels.linear.cuda.few import Few
from mpoe_kernels.linear.cuda.launch import CudaLaunches
from mpoe_kernels.linear.cuda.panels import Panel
from mpoe_kernels.linear.gpu import steps
from mpoe_kernels.registry import Candidate
from mpoe_kernels.triton.hardware import Hardware

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

READ = ("x", "left", "central", "right", *steps.DENSE)


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
        hardware: returns the numbers of a device, which determine a candidate's variant.
    """

    ops: Any
    hardware: Callable[[str], Hardware]

    @property
    def launches(self) -> CudaLaunches:
        """The launches of a program's products."""
        return CudaLaunches(self.ops)

    def candidates(self, name: str, plan: Contraction) -> list[Candidate]:
        """The candidates for `ways`, each with the cut of its kernel. ``name``: name of the backend."""
        run = self.forward if plan.phase == "forward" else self.backward
        found = ways(plan, self.hardware(plan.device))
        return [Candidate(name, way.name, plan.strategy, partial(run, cut=way.cut)) for way in found]

    def forward(self, call: ForwardCall, cut: Panel | Few | None) -> tuple[Tensor, Tensor, Tensor]:
        """``(y, h, z)``, see `ForwardCall`. ``cut``: for the single-launch kernel; None: step by step."""
        call = _prepared(call)
        if cut is None:
            return steps.forward_by_steps(call, self.launches)
        x = call.x
        y = x.new_empty(call.slots, call.out_features)
        pre = torch.empty_like(y) if call.saves_z else None
        if isinstance(cut, Panel):
            around = call.row_index, call.bias, call.activation, pre
            self._panels(call, x, y, cut, False, around, (call.out_index, call.gates))
        else:
            self.ops.few_product(
                *(x, *call.blocks, y, call.expert_offsets, None, call.row_index, call.bias, call.activation, pre),
                *(call.in_features, call.out_features, cut.sizes, call.out_index, call.gates),
            )
        return y, x.new_empty(0), x.new_empty(0) if pre is None else pre

    def backward(self, call: BackwardCall, cut: Panel | Few | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """``(dx, dleft, dcentral, dright, dbias)``, see `BackwardCall`. ``cut``: for the kernel that computes dx."""
        return steps.backward(_prepared(call), self.launches, partial(self._gradients, cut=cut))

    def _gradients(self, call: BackwardCall, dz: Tensor, dx: Tensor | None, cut: Panel | Few | None) -> steps.Gradients:
        need = call.need_of_plan
        if isinstance(cut, Panel) and dx is not None:
            self._panels(call, dz, dx, cut, True, (None, None, "none", None), (None, None))
            need = (False, *need[1:])
        if not any(need):
            return steps.NO_GRADIENTS
        return steps.gradients_by_steps(call, self.launches, dz, dx, need)

    def _panels(
        self,
        call: ForwardCall | BackwardCall,
        rows: Tensor,
        out: Tensor,
        cut: Panel,
        transposed: bool,
        around: tuple[Tensor | None, Tensor | None, str, Tensor | None],
        placed: tuple[Tensor | None, Tensor | None],
    ) -> None:
        """Product of rows and W, or its transpose, which is rebuilt in shared memory some columns at a time.

        ``around``: row_index, bias, activation and pre-activation; ``placed``: out_index and gates of a `ForwardCall`.
        """
        self.ops.panel_product(
            *(rows, *call.blocks, out, call.expert_offsets, *around),
            *(
                call.in_features,
                call.out_features,
                transposed,
                cut.sizes,
                cut.left_first,
                may_round_to_tf32(rows.dtype),
                *placed,
            ),
        )
