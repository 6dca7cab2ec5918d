"""Launches of the Triton kernels of `neuron_experts`.

Forward: sort pairs by expert (`routing.triton.sort_slots`), rows of pairs with the hidden neurons
on chip (`neurons_fused_kernel`; few slots of an expert, or more neurons than fit:
`neurons_hidden_kernel` and `neurons_rows_kernel`), and their sum. Few pairs are not sorted:
`neurons_hidden_kernel` and `neurons_few_kernel`. All have the same bits. Backward: sort, hidden
activations and their gradients (`neurons_hidden_kernel`), dx (`neurons_rows_kernel` and the sum),
all weights (`neurons_weights_kernel`). No program waits for another. The largest temporaries are
rows of pairs, ``[T K, O]`` in the tokens' dtype or as many columns of them as `MOST_ROWS` holds,
and hidden activations ``[T K, m]``.

`torch.nn.functional.grouped_mm` is not used: below sm_90 it waits for the device, and rows would be
copied for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mpoe_kernels.checks import check_range
from mpoe_kernels.define import new_gradients
from mpoe_kernels.experts.neurons_triton_kernels import (
    neurons_few_kernel,
    neurons_fused_kernel,
    neurons_hidden_kernel,
    neurons_rows_kernel,
    neurons_weights_kernel,
)
from mpoe_kernels.experts.op import NeuronBackwardCall, NeuronCall
from mpoe_kernels.routing.triton import PairsAlone, Slots, SortedSlots, sort_slots, sum_choices
from mpoe_kernels.triton import architecture
from mpoe_kernels.triton.start import (
    Options,
    Tile,
    cdiv,
    dense,
    fitted,
    power_of_two,
    precision,
    start,
    start_best,
)

# pairs that are not sorted: at most one tile of 16 rows for each, as sorted ones of 64 experts
# mostly have
FEW = 64
ON_CHIP = {2: 128, 4: 64}  # bytes of an element -> most neurons of an expert that stay on chip
# Slots of an expert up to which a tile's hidden neurons are not kept on chip: its program would do
# little but wait, first for an expert's up, then for its down.
FEW_SLOTS = 16
MOST_IN_FOUR_WARPS = 512  # experts, whose places a program scans: beside more, sm_80 spills
# kernel -> bytes of an element -> tiles, the first of them where nothing is timed; for few slots of
# an expert the last alone. Those of a kernel have the same columns, which decide over partial
# results, and the same inner size, the order of sums; so have "fused", "hidden" and "few hidden",
# and the two of the other product. 64 in 16 bits: a cache line of 128 bytes; 16 in 32 bits: without
# tensor cores operands are in registers. 64 rows of gated "hidden" spill on sm_80.
TILES: dict[str, dict[int, tuple[Tile, ...]]] = {
    "fused": {
        2: (Tile(64, 128, 64, 8), Tile(32, 128, 64, 4), Tile(32, 128, 64, 4)),
        4: (Tile(32, 64, 16, 8),),
    },
    "hidden": {
        2: (Tile(32, 64, 64, 4), Tile(16, 64, 64, 4, 4)),
        4: (Tile(32, 32, 16, 8),),
    },
    "rows": {
        2: (Tile(64, 64, 64, 4), Tile(128, 64, 64, 8), Tile(16, 64, 64, 4)),
        4: (Tile(32, 32, 16, 8),),
    },
    "weights": {
        2: (Tile(64, 64, 64, 4), Tile(64, 128, 32, 8)),
        4: (Tile(32, 32, 16, 4),),
    },
    # Narrow, so that one token's programs fill a card.
    "few hidden": {
        2: (Tile(16, 16, 64, 4),),
        4: (Tile(16, 16, 16, 4),),
    },
    "few rows": {
        2: (Tile(16, 32, 64, 4),),
        4: (Tile(16, 32, 16, 4),),
    },
}


class _Call:
    """A call of either pass: arguments that its launches share.

    Args:
        call: the op's.
    """

    def __init__(self, call: NeuronCall) -> None:
        self.width, self.out_width, self.neurons = call.sizes
        self.widest = max(self.width, self.out_width)
        self.index = call.top_k_index.contiguous()
        self.tokens, self.top_k = self.index.shape
        experts = call.num_experts
        # For the interpreter: it checks only CPUs.
        check_range("top_k_index", self.index, -1, experts - 1)
        self.x = call.x.contiguous()
        self.gates = call.gates.contiguous()
        self.up = call.up.contiguous()
        self.gate_up = dense(call.gate_up)
        self.down = call.down.contiguous()
        # Of every kernel, and of those that compute hidden activations.
        self.common: dict[str, Any] = {
            "neurons": self.neurons,
            "EXPERTS": experts,
            "PRECISION": precision(call.x.dtype),
        }
        self.inputs: dict[str, Any] = {
            "x": self.x,
            "gates": self.gates,
            "up": self.up,
            "gate_up": self.gate_up,
            "bias": dense(call.bias),
            "width": self.width,
            "out_width": self.out_width,
            "TOP_K": self.top_k,
            "ACTIVATION": call.activation,
            "SCAN": power_of_two(max(2, experts)),
            **self.common,
        }

    @property
    def on_chip(self) -> bool:
        """Whether all neurons of an expert are computed by one program."""
        return self.neurons <= ON_CHIP[self.x.element_size()]

    def _ways(
        self, kernel: str, columns: int, inner: int, slots: Slots | None = None
    ) -> Sequence[Options]:
        tiles = TILES[kernel][self.x.element_size()]
        if slots is not None:
            tiles = slots.among(tiles)
        return fitted(tiles, columns, inner)

    def _in_one_step(self, ways: Sequence[Options]) -> Sequence[Options]:
        """Ways of a product over neurons that add as `neurons_fused_kernel` does."""
        if not self.on_chip:
            return ways
        step = max(16, power_of_two(self.neurons))
        return [{**way, "BK": step} for way in ways]

    def few(self) -> Tensor:
        """``[T, O]``, of few pairs."""
        h, *_ = self.hidden(PairsAlone(self.index))
        out = self.x.new_empty(self.tokens, self.out_width)
        (way,) = self._in_one_step(self._ways("few rows", self.out_width, self.neurons))
        start(
            neurons_few_kernel,
            (self.tokens, cdiv(self.out_width, way["BN"])),
            h_rows=h,
            gates=self.gates,
            index=self.index,
            down=self.down,
            out=out,
            out_width=self.out_width,
            TOP_K=self.top_k,
            **self.common,
            **way,
        )
        return out

    def fused(self, slots: SortedSlots) -> Tensor:
        """``[T, O]``, of neurons that fit on chip."""
        ways = self._ways("fused", self.neurons, self.widest, slots)
        step = ways[0]["BK"]
        # Every part of the columns computes the hidden activations again, so parts only fill an
        # idle device.
        units = architecture.target_of(self.x.device).multiprocessors
        idle = units // slots.tiles(ways[0]["BM"])

        def write(rows: Mapping[str, Tensor], first: int, last: int) -> None:
            parts = max(1, min(idle, cdiv(last - first, step)))
            start_best(
                neurons_fused_kernel,
                lambda way: (slots.tiles(way["BM"]), parts),
                ways,
                order=slots.order,
                down=self.down,
                first=first,
                last=last,
                **rows,
                **self.inputs,
            )

        out = self.x.new_empty(self.tokens, self.out_width)
        sum_choices({"out": out}, self.out_width, self.top_k, step, write)
        return out

    def hidden(
        self, slots: Slots, grad: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """h by place, or by pair where they are not sorted; for a backward times the gate, and the
        gradients of ``x up`` and ``x gate_up [T K, m]``, and the gates' gradients in parts
        ``[parts, T, K]``."""
        kernel = "few hidden"
        if isinstance(slots, SortedSlots):
            kernel = "hidden"
        ways = self._ways(kernel, self.neurons, self.widest, slots)
        if isinstance(slots, SortedSlots) and slots.experts > MOST_IN_FOUR_WARPS:
            ways = [{**way, "num_warps": 8} for way in ways]
        parts = cdiv(self.neurons, ways[0]["BN"])
        h = self.x.new_empty(self.index.numel(), self.neurons)
        dz = dvalue = gate_parts = h
        if grad is not None:
            dz = torch.empty_like(h)
            dvalue = dz
            if self.gate_up is not None:
                dvalue = torch.empty_like(h)
            gate_parts = h.new_empty(parts, *self.gates.shape, dtype=torch.float32)
        start_best(
            neurons_hidden_kernel,
            lambda way: (slots.tiles(way["BM"]), parts),
            ways,
            order=slots.order,
            index=slots.pair_experts,
            grad=grad,
            down=None if grad is None else self.down,
            h_rows=h,
            dvalue_rows=dvalue,
            dz_rows=dz,
            gate_parts=gate_parts,
            tokens=self.tokens,
            **self.inputs,
        )
        return h, dvalue, dz, gate_parts

    def rows(
        self,
        slots: SortedSlots,
        pairs: Sequence[tuple[Tensor, Tensor]],
        gates: Tensor | None,
        out: Tensor,
    ) -> Tensor:
        """Writes the sum of one or two products: rows ``[T K, m]`` by place times ``[E, m,
        columns]``."""
        (rows_in, weights), *more = pairs
        more_rows = None
        more_weights = None
        if more:
            more_rows, more_weights = more[0]
        columns = weights.shape[2]
        ways = self._ways("rows", columns, self.neurons, slots)
        if gates is not None:
            ways = self._in_one_step(ways)
        step = ways[0]["BN"]

        def write(rows: Mapping[str, Tensor], first: int, last: int) -> None:
            start_best(
                neurons_rows_kernel,
                lambda way: (slots.tiles(way["BM"]), cdiv(last - first, step)),
                ways,
                rows=rows_in,
                more_rows=more_rows,
                gates=gates,
                order=slots.order,
                weights=weights,
                more_weights=more_weights,
                columns=columns,
                first=first,
                last=last,
                SCAN=slots.scan,
                **rows,
                **self.common,
            )

        sum_choices({"out": out}, columns, self.top_k, step, write)
        return out

    def weights(
        self,
        slots: SortedSlots,
        grad: Tensor,
        rows: tuple[Tensor, Tensor, Tensor],
        results: list[Tensor],
    ) -> None:
        """Writes the gradients of up, down, bias and gate_up that are not empty."""
        names = ("dup", "ddown", "dbias", "dgate_up")
        outs = {}
        for name, out in zip(names, results, strict=True):
            outs[name] = out if out.numel() else None
        h, dvalue, dz = rows

        def grid(way: Options) -> tuple[int, int, int]:
            parts = cdiv(self.neurons, way["BM"]) * cdiv(self.widest, way["BN"])
            return slots.experts, parts, 4

        start_best(
            neurons_weights_kernel,
            grid,
            self._ways("weights", self.widest, power_of_two(slots.pairs)),
            x=self.x,
            grad=grad,
            order=slots.order,
            h_rows=h,
            dvalue_rows=dvalue,
            dz_rows=dz,
            width=self.width,
            out_width=self.out_width,
            TOP_K=self.top_k,
            **outs,
            **self.common,
        )


def forward(call: NeuronCall) -> Tensor:
    """See `neuron_experts`."""
    index = call.top_k_index
    if index.numel() == 0:
        return call.x.new_zeros(call.x.shape[0], call.out_features)
    this = _Call(call)
    if index.numel() <= FEW:
        return this.few()
    slots = call.kept = sort_slots(index, call.num_experts)
    if this.on_chip and not slots.fit(FEW_SLOTS):
        return this.fused(slots)
    h, *_ = this.hidden(slots)
    out = call.x.new_empty(this.tokens, this.out_width)
    return this.rows(slots, [(h, this.down)], this.gates, out)


def backward(call: NeuronBackwardCall) -> tuple[Tensor, ...]:
    """See `NeuronBackwardCall`."""
    wanted = call.wanted
    results = new_gradients(call, wanted)
    if call.top_k_index.numel() == 0 or not any(wanted):
        return tuple(results)
    this = _Call(call)
    grad = call.grad.contiguous()
    slots = call.kept
    if call.kept is None:
        slots = sort_slots(this.index, call.num_experts)
    need_x, need_gates, *of_weights = wanted
    h, dvalue, dz, gate_parts = this.hidden(slots, grad)
    if need_x:
        products = [(dvalue, this.up)]
        if this.gate_up is not None:
            products.append((dz, this.gate_up))
        this.rows(slots, products, None, results[0])
    if need_gates:
        dgates = gate_parts[0] if len(gate_parts) == 1 else gate_parts.sum(0)
        results[1] = dgates.to(call.gates.dtype)
    if any(of_weights):
        this.weights(slots, grad, (h, dvalue, dz), results[2:])
    return tuple(results)
