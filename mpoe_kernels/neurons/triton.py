"""Launches of the Triton kernels of `neuron_experts`, over slots sorted by expert (`routing.triton.sort_slots`).

Forward: sort, both products with the hidden neurons on chip (`neurons_fused_kernel`; more neurons than fit:
`neurons_hidden_kernel` and `neurons_rows_kernel`), `collect_rows`, which adds the rows of a token's slots in the order
of its choices, times their gates. Backward: sort, hidden activations and their gradients (`neurons_hidden_kernel`), dx
(`neurons_rows_kernel` and `collect_rows`), all weights (`neurons_weights_kernel`), gates (`sums_kernel`). The largest
temporaries are rows of all slots, ``[T K, m]`` and ``[T K, O]`` or ``[T K, I]``.

`torch.nn.functional.grouped_mm` is not used: below sm_90 it waits for the device, and rows would be copied for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mpoe_kernels.checks import check_range
from mpoe_kernels.neurons.op import NeuronBackwardCall, NeuronCall
from mpoe_kernels.neurons.triton_kernels import (
    neurons_fused_kernel,
    neurons_hidden_kernel,
    neurons_rows_kernel,
    neurons_weights_kernel,
)
from mpoe_kernels.routing.triton import SortedSlots, collect_rows, sort_slots
from mpoe_kernels.triton import architecture
from mpoe_kernels.triton.start import Tile, cdiv, precision, start, start_best
from mpoe_kernels.triton.sums import sums_kernel

SUM_BLOCK = 128  # results of a program that adds parts
ON_CHIP = {2: 128, 4: 64}  # bytes of an element -> most neurons of an expert that stay on chip
# kernel -> bytes of an element -> tiles, the first of them where nothing is timed; for few slots the last alone.
TILES: dict[str, dict[int, tuple[Tile, ...]]] = {
    "fused": {2: (Tile(64, 128, 64, 8), Tile(32, 128, 64, 8), Tile(16, 128, 64, 4)), 4: (Tile(32, 64, 16, 8),)},
    "hidden": {2: (Tile(64, 64, 32, 8), Tile(32, 64, 64, 8), Tile(16, 64, 64, 4)), 4: (Tile(32, 32, 16, 8),)},
    "rows": {2: (Tile(64, 64, 64, 4), Tile(128, 64, 32, 8), Tile(16, 64, 64, 4)), 4: (Tile(32, 32, 16, 4),)},
    "weights": {2: (Tile(64, 64, 64, 4), Tile(64, 128, 32, 8)), 4: (Tile(32, 32, 16, 4),)},
}


def _tiles(kernel: str, like: Tensor, sorted_slots: SortedSlots, columns: int, inner: int) -> Sequence[Tile]:
    return sorted_slots.among([tile.within(columns, inner) for tile in TILES[kernel][like.element_size()]])


class _Call:
    """A call of either pass: arguments that its launches share. Missing tensors get placeholders that are never read.

    Args:
        call: the op's.
    """

    def __init__(self, call: NeuronCall) -> None:
        self.call, self.index = call, call.top_k_index
        self.experts, self.neurons, self.width = call.up.shape
        self.out_width, self.pairs, self.like = call.down.shape[2], call.gates.numel(), call.x
        check_range("top_k_index", self.index, -1, self.experts - 1)  # for the interpreter: it checks only the CPU
        self.sorted = sort_slots(self.index, self.experts)
        self.up, self.down = call.up.contiguous(), call.down.contiguous()
        self.gate_up = self.up if call.gate_up is None else call.gate_up.contiguous()
        self.constants: dict[str, Any] = {
            "EXPERTS": self.experts,
            "GATED": call.gate_up is not None,
            "PRECISION": precision(call.x.dtype),
        }
        self.slots = {"offsets": self.sorted.offsets, "pair_of_slot": self.sorted.pair_of_slot}
        self.common: dict[str, Any] = {
            **self.constants,
            **self.slots,
            "x": call.x.contiguous(),
            "up": self.up,
            "gate_up": self.gate_up,
            "down": self.down,
            "bias": self.up if call.bias is None else call.bias.contiguous(),
            "width": self.width,
            "out_width": self.out_width,
            "neurons": self.neurons,
            "TOP_K": call.gates.shape[1],
            "ACTIVATION": call.activation,
            "HAS_BIAS": call.bias is not None,
            "SCAN": self.sorted.scan,
        }

    def fused(self) -> Tensor:
        """``[T K, O]`` by slot."""
        tiles = _tiles("fused", self.like, self.sorted, self.neurons, max(self.width, self.out_width))
        # Every part of the columns computes the hidden activations again, so parts only fill an idle device.
        idle = architecture.target_of(self.like.device).multiprocessors // self.sorted.tiles(tiles[0].rows)
        steps = cdiv(self.out_width, tiles[0].inner)
        columns = cdiv(steps, max(1, min(idle, steps))) * tiles[0].inner
        out = self.like.new_empty(self.pairs, self.out_width)
        start_best(
            neurons_fused_kernel,
            lambda rows, _: (self.sorted.tiles(rows), cdiv(self.out_width, columns)),
            tiles,
            out=out,
            columns=columns,
            **self.common,
        )
        return out

    def hidden(self, grad: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """h, or for the backward h times the gate, and the gradients of ``x up`` and ``x gate_up [T K, m]``, by slot;
        the gates' gradients in parts ``[parts, T K]``."""
        tiles = _tiles("hidden", self.like, self.sorted, self.neurons, max(self.width, self.out_width))
        h = self.like.new_empty(self.pairs, self.neurons)
        dz = h if grad is None else torch.empty_like(h)
        dvalue = torch.empty_like(h) if grad is not None and self.constants["GATED"] else dz
        parts = cdiv(self.neurons, tiles[0].columns) if grad is not None else 0
        gate_parts = h.new_empty(parts, self.pairs, dtype=torch.float32)
        start_best(
            neurons_hidden_kernel,
            lambda rows, columns: (self.sorted.tiles(rows), cdiv(self.neurons, columns)),
            tiles,
            grad=h if grad is None else grad,
            gates=self.call.gates.contiguous(),
            h_rows=h,
            dvalue_rows=dvalue,
            dz_rows=dz,
            gate_parts=gate_parts,
            slots=self.pairs,
            BACKWARD=grad is not None,
            **self.common,
        )
        return h, dvalue, dz, gate_parts

    def rows(self, rows: Tensor, weights: Tensor, more_rows: Tensor, more_weights: Tensor, two: bool) -> Tensor:
        """``[T K, columns]``: rows ``[T K, m]`` times ``[E, m, columns]``; ``two``: plus the other product."""
        columns = weights.shape[2]
        out = rows.new_empty(self.pairs, columns)
        start_best(
            neurons_rows_kernel,
            lambda tile_rows, tile_columns: (self.sorted.tiles(tile_rows), cdiv(columns, tile_columns)),
            _tiles("rows", rows, self.sorted, columns, self.neurons),
            rows=rows,
            more_rows=more_rows,
            offsets=self.sorted.offsets,
            weights=weights,
            more_weights=more_weights,
            out=out,
            columns=columns,
            neurons=self.neurons,
            SCAN=self.sorted.scan,
            **{**self.constants, "GATED": two},
        )
        return out


def forward(call: NeuronCall) -> Tensor:
    """See `neuron_experts`."""
    if call.top_k_index.numel() == 0:
        return call.x.new_zeros(call.x.shape[0], call.down.shape[2])
    own = _Call(call)
    if own.neurons <= ON_CHIP[call.x.element_size()]:
        rows = own.fused()
    else:
        h, *_ = own.hidden()
        rows = own.rows(h, own.down, h, own.down, two=False)
    return collect_rows(rows, own.sorted.slot_of_pair, call.gates)


def backward(call: NeuronBackwardCall) -> tuple[Tensor, ...]:
    """See `NeuronBackwardCall`."""
    empty = torch.zeros if call.top_k_index.numel() == 0 else torch.empty
    results = [
        empty(value.shape, dtype=value.dtype, device=value.device)
        if wants and value is not None
        else call.x.new_empty(0)
        for value, wants in zip(call.differentiable, call.wanted, strict=True)
    ]
    if call.top_k_index.numel() == 0 or not any(call.wanted):
        return tuple(results)
    own, grad = _Call(call), call.grad.contiguous()
    need_x, need_gates, need_up, need_down, need_bias, need_gate_up = call.wanted
    h, dvalue, dz, gate_parts = own.hidden(grad)
    gated = own.constants["GATED"]
    if need_x:
        rows = own.rows(dvalue, own.up, dz, own.gate_up, two=gated)
        results[0] = collect_rows(rows, own.sorted.slot_of_pair)
    if need_up or need_down or need_bias or need_gate_up:
        _weights(own, grad, (h, dvalue, dz), results)
    if need_gates:
        nothing = dict.fromkeys(("right_parts", "right_gate_parts", "left_parts"), gate_parts)
        nothing |= dict.fromkeys(("dright", "dright_gate", "dleft"), results[1])
        start(
            sums_kernel,
            (cdiv(own.pairs, SUM_BLOCK), 1),
            gate_parts=gate_parts,
            slot_of_pair=own.sorted.slot_of_pair,
            dgates=results[1],
            shares=gate_parts.shape[0],
            block_shares=0,
            pairs=own.pairs,
            gate_size=own.pairs,
            right_size=0,
            right_gate_size=0,
            left_size=0,
            BLOCK=SUM_BLOCK,
            num_warps=4,
            **nothing,
        )
    return tuple(results)


def _weights(own: _Call, grad: Tensor, rows: tuple[Tensor, Tensor, Tensor], results: list[Tensor]) -> None:
    """Writes the gradients of up, down, bias and gate_up that are not empty."""
    _, _, dup, ddown, dbias, dgate_up = results
    tiles = [tile.within(max(own.width, own.out_width), own.pairs) for tile in TILES["weights"][grad.element_size()]]
    start_best(
        neurons_weights_kernel,
        lambda n, c: (own.experts, cdiv(own.neurons, n) * cdiv(max(own.width, own.out_width), c), 4),
        tiles,
        x=own.common["x"],
        grad=grad,
        h_rows=rows[0],
        dvalue_rows=rows[1],
        dz_rows=rows[2],
        dup=dup,
        ddown=ddown,
        dgate_up=dgate_up,
        dbias=dbias,
        width=own.width,
        out_width=own.out_width,
        neurons=own.neurons,
        EXPERTS=own.experts,
        TOP_K=own.common["TOP_K"],
        NEED_UP=dup.numel() > 0,
        NEED_DOWN=ddown.numel() > 0,
        NEED_GATE_UP=dgate_up.numel() > 0,
        NEED_BIAS=dbias.numel() > 0,
        PRECISION=own.constants["PRECISION"],
        **own.slots,
    )
