"""Both projections of a gated network step by step, each product of the two in one launch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mpoe_kernels.engine.driver import run
from mpoe_kernels.linear.call import ForwardCall, GatedCall
from mpoe_kernels.linear.gpu import steps
from mpoe_kernels.linear.gpu.operands import Operand
from mpoe_kernels.linear.gpu.primitives import Rows
from mpoe_kernels.linear.gpu.products import GpuChunk, Pass, blocks_of
from mpoe_kernels.linear.triton.configs import Tile, launch_options, tile_for
from mpoe_kernels.linear.triton.launch import LAUNCHES, axes_of, persistent_programs
from mpoe_kernels.linear.triton.pairs import pairs_kernel
from mpoe_kernels.linear.triton.plan import planned
from mpoe_kernels.planner import program_of
from mpoe_kernels.planner.program import KEPT, Product
from mpoe_kernels.triton.card import precision
from mpoe_kernels.triton.start import architecture_of, cdiv, device_of, power_of_two, start

Both = tuple[Operand, Operand]  # for the gate and for the other projection
# The kernel reads both projections' blocks by the same strides.
DENSE = (*steps.DENSE, "left", "central", "right", "gate_left", "gate_central", "gate_right")


def forward(call: GatedCall) -> tuple[Tensor, ...]:
    """``(y, z, value, h, gate_h)``, see `GatedCall`."""
    return planned(_forward, call, dense=DENSE)


def _forward(call: GatedCall) -> tuple[Tensor, ...]:
    x, slots, dims = call.x, call.slots, call.dims
    y = x.new_empty(slots, call.out_features)
    z, value = (torch.empty_like(y) if call.save else None for _ in range(2))
    program = program_of(dims, call.strategy, "forward")
    kept = [x.new_empty(slots * dims.jC, dims.b) if part.saves_h else None for part in (call.up, call.gate)]

    def whole(part: ForwardCall, out: Tensor, h: Tensor | None, pre: Tensor | None) -> Pass:
        values = {"x": x, "y": out, **blocks_of(*part.blocks)}
        if h is not None:
            values[KEPT] = h.view(slots, dims.jC * dims.b)
        sizes = (program, dims, call.expert_offsets, slots)
        return Pass(*sizes, values, call.row_index, part.bias, part.activation, pre)

    up, gate = whole(call.up, y if value is None else value, kept[0], None), whole(call.gate, y, kept[1], z)
    run(program, map(_Twins, gate.chunks(LAUNCHES), up.chunks(LAUNCHES)))
    return y, *(x.new_empty(0) if found is None else found for found in (z, value, *kept))


@dataclass
class _Twins:
    """The products of both projections for the same experts; see `mpoe_kernels.engine.driver.Chunk`."""

    gate: GpuChunk
    up: GpuChunk

    def given(self, name: str) -> Both:
        return self.gate.given(name), self.up.given(name)

    def rows(self, product: Product, rows: Both, operand: Both) -> Both:
        gate, up = (
            chunk.rows_of(product, *each) for chunk, *each in zip((self.gate, self.up), rows, operand, strict=True)
        )
        launch(gate, up, product.result == "y")
        return gate.out, up.out

    def merge(self, product: Product, first: Both, second: Both) -> Both:
        return self.gate.merge(product, first[0], second[0]), self.up.merge(product, first[1], second[1])

    def gradient(self, product: Product, rows: Both, grads: Both) -> Both:
        raise TypeError(f"two projections have no gradient {product.result} together")


def launch(gate: Rows, up: Rows, final: bool, tile: Tile | None = None) -> None:
    """One launch for two products of the same sizes, whose operands have the same layout.

    Args:
        gate, up: the two; if ``gate.pre`` receives the pre-activation, ``up.out`` also gets the other factor.
        final: ``gate.out`` gets the product of both factors instead of the first.
        tile: use this one; its columns are those of both.
    """
    a, b, out, slots = gate.first, gate.second, gate.out, gate.slots
    if slots == 0:
        return
    m, k, n, operands = axes_of(gate)
    experts, grouped = gate.experts, b.outer != 0
    rows_of_one, device = slots * m.extent / (experts if grouped else 1), device_of(a.data)

    def again(tile: Tile) -> None:
        launch(gate, up, final, tile)

    tile = tile or tile_for("pairs", a.data, rows_of_one, 2 * n.extent, k.extent, again)
    options = launch_options(tile) | {"BN": max(16, tile.n // 2)}
    segments = (experts if grouped else 1) + 1
    architecture, itemsize = architecture_of(device), a.data.itemsize
    # Otherwise the compiler would rather spill a few registers; every program holds the offsets of all experts.
    if (architecture, itemsize) == ("sm_100", 2) or ((architecture, itemsize) == ("sm_90", 4) and segments > 256):
        options["maxnreg"] = 255
    tiles = (cdiv(slots * m.extent, tile.m) + segments) * cdiv(n.extent, options["BN"])
    pre, bias, row_index = gate.pre, up.bias, gate.row_index
    start(
        pairs_kernel,
        (persistent_programs(device, tiles),),
        a=a.data,
        a_second=up.first.data,
        b=b.data,
        b_second=up.second.data,
        out=out.data,
        out_second=up.out.data,
        bias=out.data if bias is None else bias,
        pre=out.data if pre is None else pre,
        row_index=out.data if row_index is None else row_index,
        offsets=gate.offsets,
        slots=slots,
        **operands,
        EXPERTS=experts,
        GROUPED=grouped,
        SCAN=power_of_two(segments),
        TAIL=gate.tail,
        SHARED=up.first.data is a.data,
        HAS_INDEX=row_index is not None,
        HAS_BIAS=bias is not None,
        FINAL=final,
        ACTIVATION=gate.activation,
        SAVE=pre is not None,
        PRECISION=precision(a.data.dtype),
        **options,
    )
