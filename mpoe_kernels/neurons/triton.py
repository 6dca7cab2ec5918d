"""Launches of the Triton kernels of `neuron_experts`, over slots sorted by expert (`routing.triton.sort_slots`).

Forward: sort, both products with the hidden neurons on chip (`neurons_fused_kernel`; more neurons than fit:
`neurons_hidden_kernel` and `neurons_rows_kernel`). Backward: sort, hidden activations and their gradients
(`neurons_hidden_kernel`), dx (`neurons_rows_kernel`), all weights (`neurons_weights_kernel`). Programs add to a token's
row in the order of its choices; the largest temporaries are hidden activations of all slots, ``[T K, m]``.

`torch.nn.functional.grouped_mm` is not used: below sm_90 it waits for the device, and rows would be copied for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
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
from mpoe_kernels.routing.triton import sort_slots
from mpoe_kernels.triton import architecture
from mpoe_kernels.triton.start import Tile, cdiv, precision, start_best

FEW = 64  # pairs that are computed as if they were tokens
ON_CHIP = {2: 128, 4: 64}  # bytes of an element -> most neurons of an expert that stay on chip
# kernel -> bytes of an element -> tiles, the first of them where nothing is timed; for few slots the last alone.
TILES: dict[str, dict[int, tuple[Tile, ...]]] = {
    "fused": {2: (Tile(64, 128, 64, 8), Tile(32, 128, 64, 4), Tile(16, 128, 64, 4)), 4: (Tile(32, 64, 16, 8),)},
    "hidden": {2: (Tile(64, 64, 32, 8), Tile(32, 64, 64, 8), Tile(16, 64, 64, 4)), 4: (Tile(32, 32, 16, 8),)},
    "rows": {2: (Tile(64, 64, 64, 4), Tile(128, 64, 32, 8), Tile(16, 64, 64, 4)), 4: (Tile(32, 32, 16, 8),)},
    "weights": {2: (Tile(64, 64, 64, 4), Tile(64, 128, 32, 8)), 4: (Tile(32, 32, 16, 4),)},
}


class _Call:
    """A call of either pass: arguments that its launches share. Missing tensors get placeholders that are never read.

    Args:
        call: the op's.
    """

    def __init__(self, call: NeuronCall) -> None:
        self.experts, self.neurons, self.width = call.up.shape
        self.out_width, self.like = call.down.shape[2], call.x
        check_range("top_k_index", call.top_k_index, -1, self.experts - 1)  # for the interpreter: it checks only CPUs
        self.sorted = sort_slots(call.top_k_index, self.experts)
        self.up, self.down = call.up.contiguous(), call.down.contiguous()
        self.gate_up = self.up if call.gate_up is None else call.gate_up.contiguous()
        self.slots: dict[str, Any] = {
            "offsets": self.sorted.offsets,
            "pair_of_slot": self.sorted.pair_of_slot,
            "neurons": self.neurons,
            "EXPERTS": self.experts,
            "TOP_K": self.sorted.top_k,
            "PRECISION": precision(call.x.dtype),
        }
        self.common: dict[str, Any] = {
            **self.slots,
            "x": call.x.contiguous(),
            "gates": call.gates.contiguous(),
            "up": self.up,
            "gate_up": self.gate_up,
            "down": self.down,
            "bias": self.up if call.bias is None else call.bias.contiguous(),
            "tokens": call.x.shape[0],
            "width": self.width,
            "out_width": self.out_width,
            "ACTIVATION": call.activation,
            "GATED": call.gate_up is not None,
            "HAS_BIAS": call.bias is not None,
            "SCAN": self.sorted.scan,
        }

    def _tiles(self, kernel: str, columns: int, inner: int) -> Sequence[Tile]:
        return self.sorted.among([tile.within(columns, inner) for tile in TILES[kernel][self.like.element_size()]])

    def fused(self) -> Tensor:
        """``[T, O]``."""
        tiles = self._tiles("fused", self.neurons, max(self.width, self.out_width))
        # Every part of the columns computes the hidden activations again, so parts only fill an idle device.
        idle = architecture.target_of(self.like.device).multiprocessors // self.sorted.tiles(tiles[0].rows)
        steps = cdiv(self.out_width, tiles[0].inner)
        columns = cdiv(steps, max(1, min(idle, steps))) * tiles[0].inner
        parts = cdiv(self.out_width, columns)
        out = self.sorted.sums(self.like.new_empty(self.sorted.tokens, self.out_width))
        start_best(
            neurons_fused_kernel,
            lambda tile: (self.sorted.tiles(tile["BM"]), parts),
            [tile.options for tile in tiles],
            out=out,
            columns=columns,
            **self.sorted.turns(parts),
            **self.common,
        )
        return out.to(self.like.dtype)

    def hidden(self, grad: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """h times the gate, and for a backward the gradients of ``x up`` and ``x gate_up [T K, m]``, by slot; the
        gates' gradients in parts ``[parts, T, K]``."""
        tiles = self._tiles("hidden", self.neurons, max(self.width, self.out_width))
        h = self.like.new_empty(self.sorted.pair_of_slot.shape[0], self.neurons)
        dz = h if grad is None else torch.empty_like(h)
        dvalue = torch.empty_like(h) if grad is not None and self.common["GATED"] else dz
        parts = cdiv(self.neurons, tiles[0].columns) if grad is not None else 0
        gate_parts = h.new_empty(parts, *self.common["gates"].shape, dtype=torch.float32)
        start_best(
            neurons_hidden_kernel,
            lambda tile: (self.sorted.tiles(tile["BM"]), cdiv(self.neurons, tile["BN"])),
            [tile.options for tile in tiles],
            grad=h if grad is None else grad,
            h_rows=h,
            dvalue_rows=dvalue,
            dz_rows=dz,
            gate_parts=gate_parts,
            BACKWARD=grad is not None,
            **self.common,
        )
        return h, dvalue, dz, gate_parts

    def rows(self, rows: Tensor, weights: Tensor, more_rows: Tensor, more_weights: Tensor, two: bool) -> Tensor:
        """``[T, columns]``: rows ``[T K, m]`` times ``[E, m, columns]``; ``two``: plus the other product."""
        columns = weights.shape[2]
        out = self.sorted.sums(rows.new_empty(self.sorted.tokens, columns))
        start_best(
            neurons_rows_kernel,
            lambda tile: (self.sorted.tiles(tile["BM"]), cdiv(columns, tile["BN"])),
            [tile.options for tile in self._tiles("rows", columns, self.neurons)],
            rows=rows,
            more_rows=more_rows,
            weights=weights,
            more_weights=more_weights,
            out=out,
            tokens=self.sorted.tokens,
            columns=columns,
            GATED=two,
            SCAN=self.sorted.scan,
            **self.sorted.turns(cdiv(columns, 16)),
            **self.slots,
        )
        return out.to(rows.dtype)

    def weights(self, grad: Tensor, rows: tuple[Tensor, Tensor, Tensor], results: list[Tensor]) -> None:
        """Writes the gradients of up, down, bias and gate_up that are not empty."""
        _, _, dup, ddown, dbias, dgate_up = results
        widest = max(self.width, self.out_width)
        start_best(
            neurons_weights_kernel,
            lambda tile: (self.experts, cdiv(self.neurons, tile["BM"]) * cdiv(widest, tile["BN"]), 4),
            [tile.within(widest, rows[0].shape[0]).options for tile in TILES["weights"][grad.element_size()]],
            x=self.common["x"],
            grad=grad,
            h_rows=rows[0],
            dvalue_rows=rows[1],
            dz_rows=rows[2],
            dup=dup,
            ddown=ddown,
            dgate_up=dgate_up,
            dbias=dbias,
            width=self.width,
            out_width=self.out_width,
            NEED_UP=dup.numel() > 0,
            NEED_DOWN=ddown.numel() > 0,
            NEED_GATE_UP=dgate_up.numel() > 0,
            NEED_BIAS=dbias.numel() > 0,
            **self.slots,
        )


def forward(call: NeuronCall) -> Tensor:
    """See `neuron_experts`."""
    if call.top_k_index.numel() == 0:
        return call.x.new_zeros(call.x.shape[0], call.down.shape[2])
    tokens, top_k = call.top_k_index.shape
    if top_k > 2 and tokens * top_k <= FEW:  # a chain of waits would take longer than what is computed
        gates, index = call.gates.reshape(-1, 1), call.top_k_index.reshape(-1, 1)
        rows = forward(replace(call, x=call.x.repeat_interleave(top_k, 0), gates=gates, top_k_index=index))
        return rows.view(tokens, top_k, -1).sum(1)
    own = _Call(call)
    if own.neurons <= ON_CHIP[call.x.element_size()]:
        return own.fused()
    h, *_ = own.hidden()
    return own.rows(h, own.down, h, own.down, two=False)


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
    need_x, need_gates, *of_weights = call.wanted
    h, dvalue, dz, gate_parts = own.hidden(grad)
    if need_x:
        results[0] = own.rows(dvalue, own.up, dz, own.gate_up, two=own.common["GATED"])
    if need_gates:
        results[1] = gate_parts.sum(0).to(call.gates.dtype)
    if any(of_weights):
        own.weights(grad, (h, dvalue, dz), results)
    return tuple(results)
