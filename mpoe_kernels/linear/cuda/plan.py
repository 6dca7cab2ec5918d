"""Launch plans: the launches of a program for given sizes, recorded once and then replayed by one call into C++.

The driver runs the program on tensors without memory; the plan consists of the recorded launches and the offset of
every temporary in one scratch buffer.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from mpoe_kernels.contract.orders import BlockDims
from mpoe_kernels.contract.program import KEPT, Program, value_of
from mpoe_kernels.linear.gpu.operands import Operand
from mpoe_kernels.linear.gpu.plan import Memory, Piece
from mpoe_kernels.linear.gpu.primitives import Pair, Primitives, Rows, Sum
from mpoe_kernels.linear.gpu.products import Pass, walk

SIZES = BlockDims._fields[:8]


class StepOperand(ctypes.Structure):
    """``StepOperand`` of csrc/cuda/linear/bind.cpp."""

    _fields_ = [(name, ctypes.c_int64) for name in ("tensor", "offset", "outer", "limit", *SIZES)]


class Step(ctypes.Structure):
    """``Step`` of csrc/cuda/linear/bind.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("kind", "first", "experts", "gathers", "epilogue", "tail")),
        *((name, StepOperand) for name in ("a", "b", "out")),
    ]


ROWS, GRADIENT, MERGE = range(3)


@dataclass(frozen=True)
class LaunchPlan:
    """The recorded launches.

    Attributes: steps: bytes of the `Step` records, concatenated. scratch: size of the scratch buffer in elements.
        launches: number of steps.
    """

    steps: Tensor
    scratch: int
    launches: int


class _Recorder(Primitives):
    """Records launches instead of executing them."""

    def __init__(self) -> None:
        self.memory = Memory()
        self._steps: list[Step] = []
        self._uses: list[tuple[StepOperand, Piece]] = []

    def empty(self, rows: int, columns: int, like: Tensor) -> Tensor:
        return like.new_empty(rows, columns)

    def _operand(self, operand: Operand) -> StepOperand:
        data = operand.data
        # An axis of size 1 may have any stride, but a stride of 0 means that there is no axis.
        strides = [(operand.strides[axis] or 1) if axis in operand.strides else 0 for axis in SIZES]
        return StepOperand(0, data.storage_offset(), operand.outer, operand.limit, *strides)

    def _note(self, kind: int, product: Pair, epilogue: bool = False, tail: bool = False) -> None:
        operands, gathers = (product.first, product.second, product.out), product.row_index is not None
        numbers = kind, product.offsets.storage_offset(), product.experts, gathers, epilogue, tail
        step = Step(*numbers, *map(self._operand, operands))
        for found, operand in zip((step.a, step.b, step.out), operands, strict=True):
            self._uses.append((found, self.memory.use(operand.data, len(self._steps))))
        self._steps.append(step)

    def plan(self, itemsize: int) -> LaunchPlan:
        """The plan of the recorded launches; ``itemsize``: bytes of an element of the temporaries."""
        size = self.memory.lay_out()
        for operand, piece in self._uses:
            operand.tensor = piece.number
            operand.offset += piece.place // itemsize
        data = bytearray((Step * len(self._steps))(*self._steps))
        steps = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
        return LaunchPlan(steps, size // itemsize, len(self._steps))

    def rows(self, product: Rows) -> None:
        self._note(ROWS, product, product.bias is not None, product.tail)

    def gradient(self, product: Sum) -> None:
        self._note(GRADIENT, product)

    def merge(self, product: Sum) -> None:
        self._note(MERGE, product)

    def weight(self, half: Sum, whole: Sum) -> bool:
        return False


def _shape(name: str, dims: BlockDims, experts: int, slots: int) -> tuple[int, ...]:
    """Shape of one of the dense tensors of a pass."""
    shapes = {
        "L": (experts, dims.iL, dims.jL, dims.a),
        "C": (dims.a, dims.iC, dims.jC, dims.b),
        "R": (experts, dims.b, dims.iR, dims.jR),
        "x": (slots, dims.in_features),
        "y": (slots, dims.out_features),
        KEPT: (slots, dims.jC * dims.b),
    }
    return shapes[value_of(name)]


@lru_cache(maxsize=4096)
def launch_plan(
    program: Program, dims: BlockDims, experts: int, slots: int, dtype: torch.dtype, names: tuple[str, ...]
) -> LaunchPlan:
    """The launches of a program.

    Args:
        program: the program.
        dims: sizes of the blocks.
        experts: E.
        slots: N.
        dtype: of x and the blocks.
        names: names of the call's dense tensors, in order.
    """
    recorder = _Recorder()
    values = {}
    for name in names:
        values[name] = torch.empty(_shape(name, dims, experts, slots), dtype=dtype, device="meta")
        recorder.memory.give(values[name])
    offsets = torch.empty(experts + 1, dtype=torch.int32, device="meta")
    some = torch.empty(0, device="meta")  # placeholder for an optional index and bias
    walk(Pass(program, dims, offsets, slots, values, row_index=some, bias=some), recorder)
    return recorder.plan(dtype.itemsize)
