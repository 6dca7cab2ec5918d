"""Launches of the Triton kernels of `hidden_experts` and `neuron_experts`.

Forward: pairs are sorted by expert (`routing.triton.sort_slots`; few are not), rows of pairs are
computed and summed over a token's choices. Backward: sort, gradients of rows and their sum, parts
of the gates' gradients, gradients of weights. No program waits for another. The largest temporaries
are rows of pairs, ``[T K, O]`` in the tokens' dtype or as many columns of them as `MOST_ROWS`
holds, and the hidden activations of neurons ``[T K, m]``.

`torch.nn.functional.grouped_mm` is not used: below sm_90 it waits for the device, and rows would be
copied for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mpoe_kernels.checks import check_range
from mpoe_kernels.experts.hidden_triton_kernels import hidden_blocks_kernel, hidden_rows_kernel
from mpoe_kernels.experts.neurons_triton_kernels import (
    neurons_fused_kernel,
    neurons_hidden_kernel,
    neurons_rows_kernel,
    neurons_weights_kernel,
)
from mpoe_kernels.experts.op import BackwardCall, ForwardCall, HiddenCall, NeuronCall
from mpoe_kernels.routing.triton import PairsAlone, Slots, rows_to_sum, sort_slots
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

# Pairs that are not sorted: at most one tile of 16 rows for each, as sorted ones of 64 experts
# mostly have.
FEW = 64


class TileChoice(NamedTuple):
    """The tiles of a kernel; those of sorted slots have the same columns, which decide over partial
    results, and all have the same inner size, the order of sums.

    Attributes:
        many: of experts with many slots; the first where nothing is timed.
        few: of experts whose slots fit one such tile; None: as ``many``.
        alone: of pairs that are not sorted; None: as ``few``.
    """

    many: tuple[Tile, ...]
    few: Tile | None = None
    alone: Tile | None = None

    def of(self, slots: Slots) -> tuple[Tile, ...]:
        """Those among which a launch chooses."""
        if self.alone is not None and slots.order is None:
            return (self.alone,)
        if self.few is not None and slots.fit(self.few.rows):
            return (self.few,)
        return self.many


Table = dict[str, dict[int, TileChoice]]  # kernel -> bytes of an element -> tiles


def _inputs(call: ForwardCall) -> dict[str, Any]:
    """Arguments of kernels that compute hidden activations: the op's tensors by their names there,
    contiguous, and sizes."""
    inputs: dict[str, Any] = {"TOP_K": call.top_k_index.shape[1], "ACTIVATION": call.activation}
    for name in call.OPERANDS:
        if name is not None and name != "top_k_index":
            inputs[name] = dense(getattr(call, name))
    sizes = ("width", "out_width", "neurons")
    if isinstance(call, HiddenCall):
        sizes = ("F", "B", "OWN")
    inputs.update(zip(sizes, call.sizes, strict=True))
    return inputs


def _constants(call: ForwardCall) -> dict[str, Any]:
    """Of every kernel."""
    return {"EXPERTS": call.num_experts, "PRECISION": precision(call.rows.dtype)}


def _start(
    kernel: Any,
    call: ForwardCall,
    slots: Slots,
    ways: Sequence[Options],
    axes: tuple[int, ...],
    **arguments: Any,
) -> None:
    """Launch programs for every tile of slots, and along other axes; of a kernel that sums over
    ``CHOICES``, for every token."""
    summed = arguments.get("CHOICES", 1)
    start_best(
        kernel,
        lambda way: (slots.tiles(way["BM"]) // summed, *axes),
        ways,
        order=slots.order,
        SCAN=power_of_two(call.num_experts + 1),
        **arguments,
        **_constants(call),
    )


def _new_parts(parts: int, like: Tensor) -> Tensor:
    """Memory for a gradient in parts."""
    return like.new_empty(parts, *like.shape, dtype=torch.float32)


def _added(parts: Tensor, like: Tensor) -> Tensor:
    """A gradient of its parts, in the dtype of what it belongs to."""
    total = parts[0]
    if len(parts) > 1:
        total = parts.sum(0)
    return total.to(like.dtype)


# ------------------------------------------------------------------ hidden-side experts

MOST_SHARE = 4  # groups that a program of rows computes one after the other, if programs abound
LARGEST_BLOCK = 64  # of the first table; products with larger ones run in loops of their own
HIDDEN_TILES: Table = {
    "forward": {
        2: TileChoice((Tile(64, 64, 64, 4), Tile(32, 64, 64, 4)), few=Tile(16, 64, 64, 4)),
        4: TileChoice((Tile(16, 64, 16, 8),)),
    },
    "rows": {
        2: TileChoice((Tile(32, 64, 64, 4),), few=Tile(16, 64, 64, 4, stages=1)),
        4: TileChoice((Tile(16, 32, 32, 8),)),
    },
    "blocks": {
        2: TileChoice((Tile(32, 64, 64, 8),)),
        4: TileChoice((Tile(16, 32, 16, 8),)),
    },
}
LARGE_BLOCK_TILES = {  # of two bytes
    "forward": TileChoice((Tile(64, 64, 32, 8),), few=Tile(16, 64, 32, 4)),
    "rows": TileChoice((Tile(32, 64, 32, 8),)),
    "blocks": TileChoice((Tile(16, 32, 32, 8, stages=1),)),
}
# Where operands of products are in registers, with the three blocks that gradients of blocks read
# for every slot.
IN_REGISTERS = ("sm_80", "gfx942")
SMALL_TILE = Tile(32, 32, 32, 4, stages=1)
# For "blocks" of the first table; 32 rows of gated ones spill there.
SM_100_TILE = Tile(16, 64, 64, 8)


def _hidden_ways(call: HiddenCall, slots: Slots, kernel: str) -> Sequence[Options]:
    size = call.u.element_size()
    is_large = call.block > LARGEST_BLOCK
    choice = HIDDEN_TILES[kernel][size]
    if is_large and size == 2:
        choice = LARGE_BLOCK_TILES[kernel]
    tiles = choice.of(slots)
    if kernel == "blocks" and size == 2:
        name = architecture.target_of(call.u.device).architecture
        if name in IN_REGISTERS:
            tiles = (SMALL_TILE,)
        elif name == "sm_100" and not is_large:
            tiles = (SM_100_TILE,)
    return fitted(tiles, call.block, call.block)


def _share(groups: int, programs: int, device: torch.device) -> int:
    """Groups of one program, where ``programs`` of one group each would run."""
    return max(1, min(groups, MOST_SHARE, programs // _enough(device)))


def _enough(device: torch.device) -> int:
    """Programs that fill a card."""
    return 4 * architecture.target_of(device).multiprocessors


def _write_rows(
    call: HiddenCall,
    slots: Slots,
    kernel: str,
    outs: dict[str, Tensor],
    grad: Tensor | None = None,
    need_gates: bool = False,
) -> Tensor | None:
    """Writes results of `hidden_rows_kernel`, ``outs [T, F]``, by their names; returns the gates'
    gradients in parts ``[parts, T, K]``."""
    features, block, _ = call.sizes
    tokens, top_k = call.gates.shape
    groups = features // block
    ways = _hidden_ways(call, slots, kernel)
    share = _share(groups, slots.tiles(ways[0]["BM"]) * groups, call.u.device)
    step = share * block
    gate_parts = None
    if need_gates:
        gate_parts = _new_parts(cdiv(groups, share), call.gates)
    for rows, first, last in rows_to_sum(outs, features, top_k, step):
        _start(
            hidden_rows_kernel,
            call,
            slots,
            ways,
            (cdiv(last - first, step), cdiv(block, ways[0]["BN"])),
            grad=grad,
            index=slots.pair_experts,
            out=rows.get("out"),
            out_gate=rows.get("out_gate"),
            gate_parts=gate_parts,
            tokens=tokens,
            first=first // block,
            last=last // block,
            share=share,
            **_inputs(call),
        )
    return gate_parts


def _hidden_backward(
    call: HiddenCall, slots: Slots, grad: Tensor, gradients: dict[str, Tensor]
) -> None:
    outs = {}
    if "u" in gradients:
        outs["out"] = gradients["u"]
    if "u_gate" in gradients:
        outs["out_gate"] = gradients["u_gate"]
    need_gates = "gates" in gradients
    if outs or need_gates:
        gate_parts = _write_rows(call, slots, "rows", outs, grad, need_gates)
        if gate_parts is not None:
            gradients["gates"] = _added(gate_parts, call.gates)
    if gradients.keys() & {"right", "left", "bias", "right_gate"}:
        _write_blocks(call, slots, grad, gradients)


def _write_blocks(
    call: HiddenCall, slots: Slots, grad: Tensor, gradients: dict[str, Tensor]
) -> None:
    """The gradients of blocks and biases; of blocks that groups share they are sums over shares of
    the groups."""
    features, block, owned = call.sizes
    groups = features // block
    (way,) = _hidden_ways(call, slots, "blocks")
    parts = cdiv(block, way["BN"]) ** 2
    share = 1
    in_parts = {}
    if owned == 1:
        most_shares = cdiv(_enough(grad.device), call.num_experts * parts)
        share = cdiv(groups, min(groups, most_shares))
    shares = cdiv(groups, share)
    if owned == 1 and shares > 1:
        for name in ("right", "right_gate", "left"):
            if name in gradients:
                in_parts[name] = _new_parts(shares, gradients[name])
    written = gradients | in_parts
    start(
        hidden_blocks_kernel,
        (call.num_experts, shares, parts),
        grad=grad,
        order=slots.order,
        dright=written.get("right"),
        dright_gate=written.get("right_gate"),
        dleft=written.get("left"),
        dbias=written.get("bias"),
        share=share,
        **_inputs(call),
        **_constants(call),
        **way,
    )
    for name, part in in_parts.items():
        gradients[name] = _added(part, call.u)


# ------------------------------------------------------------------ neurons

ON_CHIP = {2: 128, 4: 64}  # bytes of an element -> most neurons of an expert that stay on chip
# Slots of an expert up to which a tile's hidden neurons are not kept on chip: its program would do
# little but wait, first for an expert's up, then for its down.
FEW_SLOTS = 16
MOST_IN_FOUR_WARPS = 512  # experts, whose places a program scans: beside more, sm_80 spills
# "fused" and "hidden" have the same inner size. 64 in 16 bits: a cache line of 128 bytes; 16 in 32
# bits: without tensor cores operands are in registers. 64 rows of gated "hidden" spill on sm_80.
# Tiles of pairs alone are narrow, so that one token's programs fill a card.
NEURON_TILES: Table = {
    "fused": {
        2: TileChoice((Tile(64, 128, 64, 8), Tile(32, 128, 64, 4)), few=Tile(32, 128, 64, 4)),
        4: TileChoice((Tile(32, 64, 16, 8),)),
    },
    "hidden": {
        2: TileChoice(
            (Tile(32, 64, 64, 4),), few=Tile(16, 64, 64, 4, stages=4), alone=Tile(16, 16, 64, 4)
        ),
        4: TileChoice((Tile(32, 32, 16, 8),), alone=Tile(16, 16, 16, 4)),
    },
    "rows": {
        2: TileChoice(
            (Tile(64, 64, 64, 4), Tile(128, 64, 64, 8)),
            few=Tile(16, 64, 64, 4),
            alone=Tile(16, 32, 64, 4),
        ),
        4: TileChoice((Tile(32, 32, 16, 8),), alone=Tile(16, 32, 16, 4)),
    },
    # Sums over slots, whose order no token's bits depend on.
    "weights": {
        2: TileChoice((Tile(64, 64, 64, 4), Tile(64, 128, 32, 8))),
        4: TileChoice((Tile(32, 32, 16, 4),)),
    },
}


class HiddenActivations(NamedTuple):
    """Of slots: rows by place in the order or, where they are not sorted, by pair.

    Attributes:
        h: ``[T K, m]``; for a backward times the gate.
        dvalue, dz: gradients of ``x up`` and ``x gate_up``; without gated neurons the same.
        gate_parts: the gates' gradients in parts ``[parts, T, K]``.
    """

    h: Tensor
    dvalue: Tensor
    dz: Tensor
    gate_parts: Tensor


def _is_on_chip(call: NeuronCall) -> bool:
    """Whether all neurons of an expert are computed by one program."""
    return call.up.shape[1] <= ON_CHIP[call.x.element_size()]


def _neuron_ways(
    call: NeuronCall, slots: Slots, kernel: str, columns: int, inner: int
) -> Sequence[Options]:
    tiles = NEURON_TILES[kernel][call.x.element_size()].of(slots)
    return fitted(tiles, columns, inner)


def _neurons_forward(call: NeuronCall, slots: Slots, out: Tensor) -> None:
    if _is_on_chip(call) and not slots.fit(FEW_SLOTS):
        _write_on_chip(call, slots, out)
    else:
        hidden = _hidden_activations(call, slots)
        gates = call.gates.contiguous()
        _write_products(call, slots, out, hidden.h, call.down, gates=gates)


def _write_on_chip(call: NeuronCall, slots: Slots, out: Tensor) -> None:
    width, out_width, neurons = call.sizes
    ways = _neuron_ways(call, slots, "fused", neurons, max(width, out_width))
    step = ways[0]["BK"]
    # Every part of the columns computes the hidden activations again, so parts only fill an idle
    # device.
    units = architecture.target_of(out.device).multiprocessors
    idle = units // slots.tiles(ways[0]["BM"])
    for rows, first, last in rows_to_sum({"out": out}, out_width, call.gates.shape[1], step):
        parts = max(1, min(idle, cdiv(last - first, step)))
        _start(
            neurons_fused_kernel,
            call,
            slots,
            ways,
            (parts,),
            first=first,
            last=last,
            **rows,
            **_inputs(call),
        )


def _hidden_activations(
    call: NeuronCall, slots: Slots, grad: Tensor | None = None
) -> HiddenActivations:
    width, out_width, neurons = call.sizes
    ways = _neuron_ways(call, slots, "hidden", neurons, max(width, out_width))
    if slots.order is not None and call.num_experts > MOST_IN_FOUR_WARPS:
        ways = [{**way, "num_warps": 8} for way in ways]
    parts = cdiv(neurons, ways[0]["BN"])
    h = call.x.new_empty(call.gates.numel(), neurons)
    hidden = HiddenActivations(h, h, h, h)
    if grad is not None:
        dz = torch.empty_like(h)
        dvalue = dz
        if call.gate_up is not None:
            dvalue = torch.empty_like(h)
        hidden = HiddenActivations(h, dvalue, dz, _new_parts(parts, call.gates))
    inputs = _inputs(call)
    if grad is None:
        inputs["down"] = None
    _start(
        neurons_hidden_kernel,
        call,
        slots,
        ways,
        (parts,),
        grad=grad,
        index=slots.pair_experts,
        h_rows=h,
        dvalue_rows=hidden.dvalue,
        dz_rows=hidden.dz,
        gate_parts=hidden.gate_parts,
        tokens=len(call.x),
        **inputs,
    )
    return hidden


def _write_products(
    call: NeuronCall,
    slots: Slots,
    out: Tensor,
    rows: Tensor,
    weights: Tensor,
    more_rows: Tensor | None = None,
    more_weights: Tensor | None = None,
    gates: Tensor | None = None,
) -> None:
    """Sums over a token's choices of rows ``[T K, m]`` times weights ``[E, m, columns]``, and of
    more of them if there are more weights; of pairs that are not sorted in the same launch."""
    neurons, columns = weights.shape[1:]
    summed = 1
    top_k = call.gates.shape[1]
    if slots.order is None:
        summed = top_k
    ways = _neuron_ways(call, slots, "rows", columns, neurons)
    if gates is not None and _is_on_chip(call):  # added as `neurons_fused_kernel` does
        one_step = max(16, power_of_two(neurons))
        ways = [{**way, "BK": one_step} for way in ways]
    step = ways[0]["BN"]
    for sums, first, last in rows_to_sum({"out": out}, columns, top_k // summed, step):
        _start(
            neurons_rows_kernel,
            call,
            slots,
            ways,
            (cdiv(last - first, step),),
            rows=rows,
            more_rows=more_rows,
            gates=gates,
            index=slots.pair_experts,
            weights=weights.contiguous(),
            more_weights=dense(more_weights),
            columns=columns,
            first=first,
            last=last,
            neurons=neurons,
            CHOICES=summed,
            **sums,
        )


def _neurons_backward(
    call: NeuronCall, slots: Slots, grad: Tensor, gradients: dict[str, Tensor]
) -> None:
    hidden = _hidden_activations(call, slots, grad)
    if "x" in gradients:
        dx = gradients["x"]
        _write_products(call, slots, dx, hidden.dvalue, call.up, hidden.dz, call.gate_up)
    if "gates" in gradients:
        gradients["gates"] = _added(hidden.gate_parts, call.gates)
    if gradients.keys() & {"up", "down", "bias", "gate_up"}:
        _write_weights(call, slots, grad, hidden, gradients)


def _write_weights(
    call: NeuronCall,
    slots: Slots,
    grad: Tensor,
    hidden: HiddenActivations,
    gradients: dict[str, Tensor],
) -> None:
    width, out_width, neurons = call.sizes
    widest = max(width, out_width)

    def grid(way: Options) -> tuple[int, int, int]:
        parts = cdiv(neurons, way["BM"]) * cdiv(widest, way["BN"])
        return call.num_experts, parts, 4

    start_best(
        neurons_weights_kernel,
        grid,
        _neuron_ways(call, slots, "weights", widest, power_of_two(len(hidden.h))),
        x=call.x.contiguous(),
        grad=grad,
        order=slots.order,
        h_rows=hidden.h,
        dvalue_rows=hidden.dvalue,
        dz_rows=hidden.dz,
        dup=gradients.get("up"),
        ddown=gradients.get("down"),
        dgate_up=gradients.get("gate_up"),
        dbias=gradients.get("bias"),
        width=width,
        out_width=out_width,
        neurons=neurons,
        TOP_K=call.gates.shape[1],
        **_constants(call),
    )


# ------------------------------------------------------------------ both


def forward(call: ForwardCall) -> Tensor:
    """See `hidden_experts` and `neuron_experts`."""
    index = call.top_k_index.contiguous()
    out = call.rows.new_empty(len(index), call.out_features)
    if index.numel() == 0:
        return out.zero_()
    # For the interpreter: it checks only the CPU.
    check_range("top_k_index", index, -1, call.num_experts - 1)
    slots: Slots = PairsAlone(index)
    if index.numel() > FEW:
        slots = call.kept = sort_slots(index, call.num_experts)
    if isinstance(call, HiddenCall):
        _write_rows(call, slots, "forward", {"out": out})
    else:
        _neurons_forward(call, slots, out)
    return out


def backward(call: BackwardCall) -> tuple[Tensor, ...]:
    """See `HiddenBackwardCall` and `NeuronBackwardCall`."""
    gradients = {}
    arguments = zip(call.DIFFERENTIABLE, call.differentiable, call.need, strict=True)
    for name, value, is_needed in arguments:
        if is_needed and value is not None:
            gradients[name] = torch.empty_like(value, memory_format=torch.contiguous_format)
    if call.top_k_index.numel() == 0:
        for gradient in gradients.values():
            gradient.zero_()
    elif gradients:
        slots = call.kept
        if slots is None:
            slots = sort_slots(call.top_k_index, call.num_experts)
        grad = call.grad.contiguous()
        if isinstance(call, HiddenCall):
            _hidden_backward(call, slots, grad, gradients)
        else:
            _neurons_backward(call, slots, grad, gradients)
    return tuple([gradients.get(name, call.grad.new_empty(0)) for name in call.DIFFERENTIABLE])
