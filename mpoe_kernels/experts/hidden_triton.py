"""Launches of the Triton kernels of `hidden_experts`.

Forward: sort pairs by expert (`routing.triton.sort_slots`; few pairs are not sorted), rows of pairs
(`hidden_rows_kernel`) and their sum. Backward: sort, `hidden_rows_kernel` for du, du_gate and parts
of the gates' gradients, sums, `hidden_blocks_kernel` for the blocks and biases; parts are added
last. No program waits for another. The largest temporaries are rows of pairs, ``[T K, F]`` in the
tokens' dtype or as many groups of them as `MOST_ROWS` holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mpoe_kernels.checks import check_range
from mpoe_kernels.define import new_gradients
from mpoe_kernels.experts.hidden_triton_kernels import hidden_blocks_kernel, hidden_rows_kernel
from mpoe_kernels.experts.op import HiddenBackwardCall, HiddenCall
from mpoe_kernels.routing.triton import PairsAlone, Slots, SortedSlots, sort_slots, sum_choices
from mpoe_kernels.triton import architecture
from mpoe_kernels.triton.start import (
    Tile,
    cdiv,
    dense,
    fitted,
    power_of_two,
    precision,
    start,
    start_best,
)

FEW = 64  # pairs that are not sorted, as in `neurons_triton`
MOST_SHARE = 4  # groups that a program of rows computes one after the other, if programs abound
LARGEST_BLOCK = 64  # of the first table; products with larger ones run in loops of their own
# kernel -> bytes of an element -> tiles, the first of them where nothing is timed; for few slots
# the last alone. Those of a kernel have the same columns, which decide over partial results, and
# the same inner size, the order of sums.
TILES: dict[str, dict[int, tuple[Tile, ...]]] = {
    "forward": {
        2: (Tile(64, 64, 64, 4), Tile(32, 64, 64, 4), Tile(16, 64, 64, 4)),
        4: (Tile(16, 64, 16, 8),),
    },
    "rows": {
        2: (Tile(32, 64, 64, 4), Tile(16, 64, 64, 4, 1)),
        4: (Tile(16, 32, 32, 8),),
    },
    "blocks": {
        2: (Tile(32, 64, 64, 8),),
        4: (Tile(16, 32, 16, 8),),
    },
}
LARGE_TILES = TILES | {
    "forward": {
        2: (Tile(64, 64, 32, 8), Tile(16, 64, 32, 4)),
        4: TILES["forward"][4],
    },
    "rows": {
        2: (Tile(32, 64, 32, 8),),
        4: TILES["rows"][4],
    },
    "blocks": {
        2: (Tile(16, 32, 32, 8, 1),),
        4: TILES["blocks"][4],
    },
}
# Where operands of products are in registers, with the three blocks that gradients of blocks read
# for every slot.
IN_REGISTERS = ("sm_80", "gfx942")
SMALL_TILE = Tile(32, 32, 32, 4, 1)
SM_100_TILE = Tile(
    16, 64, 64, 8
)  # for "blocks" of the first table; 32 rows of gated ones spill there


def _tiles(kernel: str, u: Tensor, block: int) -> tuple[Tile, ...]:
    is_large = block > LARGEST_BLOCK
    if kernel == "blocks" and u.element_size() == 2:
        name = architecture.target_of(u.device).architecture
        if name in IN_REGISTERS:
            return (SMALL_TILE,)
        if name == "sm_100" and not is_large:
            return (SM_100_TILE,)
    table = LARGE_TILES if is_large else TILES
    return table[kernel][u.element_size()]


def _common(call: HiddenCall) -> dict[str, Any]:
    """Arguments of every kernel; without ``u_gate`` a placeholder that is never read."""
    u = call.u.contiguous()
    right = call.right.contiguous()
    return {
        "u": u,
        "u_gate": u if call.u_gate is None else call.u_gate.contiguous(),
        "gates": call.gates.contiguous(),
        "right": right,
        "right_gate": dense(call.right_gate),
        "left": call.left.contiguous(),
        "bias": dense(call.bias),
        "F": u.shape[1],
        "EXPERTS": call.num_experts,
        "TOP_K": call.top_k_index.shape[1],
        "OWN": right.shape[1],
        "B": call.block,
        "ACTIVATION": call.kernel_activation,
        "PRECISION": precision(u.dtype),
    }


def _share(groups: int, programs: int, device: torch.device) -> int:
    """Groups of one program, where ``programs`` of one group each would run."""
    return max(1, min(groups, MOST_SHARE, programs // _enough(device)))


def _enough(device: torch.device) -> int:
    """Programs that fill a card."""
    return 4 * architecture.target_of(device).multiprocessors


def _rows(
    call: HiddenCall,
    slots: Slots,
    kernel: str,
    outs: Mapping[str, Tensor],
    grad: Tensor | None = None,
    need_gates: bool = False,
) -> Tensor | None:
    """Writes `hidden_rows_kernel`'s results ``outs [T, F]``, by their names; returns the shares
    ``[shares, T, K]`` of the gates' gradients."""
    u = call.u
    tokens, top_k = call.gates.shape
    block = call.block
    groups = u.shape[1] // block
    ways = fitted(slots.among(_tiles(kernel, u, block)), block, block)
    share = _share(groups, slots.tiles(ways[0]["BM"]) * groups, u.device)
    gate_parts = None
    if need_gates:
        gate_parts = u.new_empty(cdiv(groups, share), tokens, top_k, dtype=torch.float32)
    common = _common(call)

    def write(rows: Mapping[str, Tensor], first: int, last: int) -> None:
        shares = cdiv((last - first) // block, share)
        start_best(
            hidden_rows_kernel,
            lambda way: (slots.tiles(way["BM"]), shares, cdiv(block, way["BN"])),
            ways,
            grad=grad,
            order=slots.order,
            index=slots.pair_experts,
            out=rows.get("out"),
            out_gate=rows.get("out_gate"),
            gate_parts=gate_parts,
            tokens=tokens,
            first=first // block,
            last=last // block,
            share=share,
            SCAN=power_of_two(max(2, call.num_experts)),
            **common,
        )

    sum_choices(outs, u.shape[1], top_k, share * block, write)
    return gate_parts


def forward(call: HiddenCall) -> Tensor:
    """See `hidden_experts`."""
    index = call.top_k_index
    if index.numel() == 0:
        return torch.zeros_like(call.u, memory_format=torch.contiguous_format)
    # For the interpreter: it checks only the CPU.
    check_range("top_k_index", index, -1, call.num_experts - 1)
    slots: Slots = PairsAlone(index.contiguous())
    if index.numel() > FEW:
        slots = call.kept = sort_slots(index, call.num_experts)
    out = torch.empty_like(call.u, memory_format=torch.contiguous_format)
    _rows(call, slots, "forward", {"out": out})
    return out


def backward(call: HiddenBackwardCall) -> tuple[Tensor, ...]:
    """See `HiddenBackwardCall`."""
    index = call.top_k_index
    wanted = call.wanted
    results = new_gradients(call, wanted)
    if index.numel() == 0:
        return tuple(results)
    slots = call.kept
    if call.kept is None:
        slots = sort_slots(index, call.num_experts)
    grad = call.grad.contiguous()
    outs = {}
    if wanted[0]:
        outs["out"] = results[0]
    if wanted[5]:
        outs["out_gate"] = results[5]
    if outs or wanted[1]:
        gate_parts = _rows(call, slots, "rows", outs, grad, wanted[1])
        if gate_parts is not None:
            results[1] = gate_parts.sum(0).to(call.gates.dtype)
    _blocks(call, grad, slots, results)
    return tuple(results)


def _blocks(
    call: HiddenBackwardCall, grad: Tensor, slots: SortedSlots, results: list[Tensor]
) -> None:
    """The gradients of blocks and biases; those of blocks that groups share are sums over shares of
    the groups."""
    names = {"dright": 2, "dleft": 3, "dbias": 4, "dright_gate": 6}
    outs = {}
    for name, place in names.items():
        if results[place].numel():
            outs[name] = results[place]
    if not outs:
        return
    u = call.u
    experts = call.num_experts
    (way,) = fitted(_tiles("blocks", u, call.block), call.block, call.block)
    parts = cdiv(call.block, way["BN"]) ** 2
    groups = u.shape[1] // call.block
    share = 1
    in_parts = {}
    if call.right.shape[1] == 1:
        shares = cdiv(_enough(u.device), experts * parts)
        share = cdiv(groups, min(groups, shares))
        for name, out in outs.items():
            if name != "dbias" and share < groups:
                size = (cdiv(groups, share), *out.shape)
                in_parts[name] = u.new_empty(size, dtype=torch.float32)
    start(
        hidden_blocks_kernel,
        (experts, cdiv(groups, share), parts),
        grad=grad,
        order=slots.order,
        share=share,
        **_common(call),
        **dict.fromkeys(names) | outs | in_parts,
        **way,
    )
    for name, part in in_parts.items():
        results[names[name]] = part.sum(0).to(u.dtype)
