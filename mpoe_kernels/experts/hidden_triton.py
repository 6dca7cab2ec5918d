"""Launches of the Triton kernels of `hidden_experts`.

Forward: sort pairs by expert (`routing.triton.sort_slots`; few pairs are not sorted), rows of pairs
(`hidden_rows_kernel`) and their sum. Backward: sort, `hidden_rows_kernel` for du, du_gate and parts
of the gates' gradients, sums, `hidden_blocks_kernel` for the blocks and biases; parts are added
last. No program waits for another. The largest temporaries are rows of pairs, ``[T K, F]`` in the
tokens' dtype or as many groups of them as `MOST_ROWS` holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mpoe_kernels.checks import check_range
from mpoe_kernels.define import new_gradients
from mpoe_kernels.experts.hidden_triton_kernels import hidden_blocks_kernel, hidden_rows_kernel
from mpoe_kernels.experts.op import HiddenBackwardCall, HiddenCall
from mpoe_kernels.routing.triton import SortedSlots, sort_slots, sum_choices
from mpoe_kernels.triton import architecture
from mpoe_kernels.triton.start import (
    Options,
    Tile,
    cdiv,
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
    "rows": {2: (Tile(32, 64, 64, 4), Tile(16, 64, 64, 4, 1)), 4: (Tile(16, 32, 32, 8),)},
    "blocks": {2: (Tile(32, 64, 64, 8),), 4: (Tile(16, 32, 16, 8),)},
}
LARGE_TILES = TILES | {
    "forward": {2: (Tile(64, 64, 32, 8), Tile(16, 64, 32, 4)), 4: TILES["forward"][4]},
    "rows": {2: (Tile(32, 64, 32, 8),), 4: TILES["rows"][4]},
    "blocks": {2: (Tile(16, 32, 32, 8, 1),), 4: TILES["blocks"][4]},
}
# Where operands of products are in registers, with the three blocks that gradients of blocks read
# for every slot.
IN_REGISTERS = ("sm_80", "gfx942")
SMALL_TILE = Tile(32, 32, 32, 4, 1)
SM_100_TILE = Tile(
    16, 64, 64, 8
)  # for "blocks" of the first table; 32 rows of gated ones spill there


def _tiles(kernel: str, u: Tensor, block: int) -> tuple[Tile, ...]:
    tiles = (TILES if block <= LARGEST_BLOCK else LARGE_TILES)[kernel][u.element_size()]
    if kernel == "blocks" and u.element_size() == 2:
        name = architecture.target_of(u.device).architecture
        if name in IN_REGISTERS:
            return (SMALL_TILE,)
        if name == "sm_100" and block <= LARGEST_BLOCK:
            return (SM_100_TILE,)
    return tiles


def _common(call: HiddenCall) -> dict[str, Any]:
    """Arguments of every kernel. Missing tensors get placeholders that are never read."""
    u = call.u
    right = call.right
    left = call.left
    bias = call.bias
    u_gate = call.u_gate
    right_gate = call.right_gate
    right = right.contiguous()
    return {
        "u": u.contiguous(),
        "u_gate": u if u_gate is None else u_gate.contiguous(),
        "gates": call.gates.contiguous(),
        "right": right,
        "right_gate": right if right_gate is None else right_gate.contiguous(),
        "left": left.contiguous(),
        "bias": right if bias is None else bias.contiguous(),
        "F": u.shape[1],
        "EXPERTS": call.num_experts,
        "TOP_K": call.top_k_index.shape[1],
        "OWN": right.shape[1],
        "B": call.block,
        "ACTIVATION": call.kernel_activation,
        "GATED": u_gate is not None,
        "HAS_BIAS": bias is not None,
        "PRECISION": precision(u.dtype),
    }


def _share(groups: int, programs: int, device: torch.device) -> int:
    """Groups of one program, where ``programs`` of one group each would run."""
    enough = 4 * architecture.target_of(device).multiprocessors
    return max(1, min(groups, MOST_SHARE, programs // enough))


def _rows(
    call: HiddenCall, slots: SortedSlots | None, kernel: str, outs: Sequence[Tensor], **others: Any
) -> Tensor:
    """Writes `hidden_rows_kernel`'s results ``outs [T, F]``, of a backward du and du_gate, those
    that are needed; returns the shares ``[shares, T, K]`` of the gates' gradients. Without
    ``slots`` a program has a pair."""
    u = call.u
    index = call.top_k_index.contiguous()
    block = call.block
    tiles = _tiles(kernel, u, block)
    groups = u.shape[1] // block
    pairs = index.numel()
    ways = fitted(tuple(tiles[-1:] if slots is None else slots.among(tiles)), block, block)

    def tiles_of(way: Options) -> int:
        return pairs if slots is None else slots.tiles(way["BM"])

    share = _share(groups, tiles_of(ways[0]) * groups, u.device)
    gates = call.gates.shape if others["NEED_GATES"] else (0, 0)
    gate_parts = u.new_empty(cdiv(groups, share), *gates, dtype=torch.float32)
    common = _common(call)

    def write(rows: Sequence[Tensor], first: int, last: int) -> None:
        start_best(
            hidden_rows_kernel,
            lambda way: (
                tiles_of(way),
                cdiv((last - first) // block, share),
                cdiv(block, way["BN"]),
            ),
            ways,
            order=None if slots is None else slots.order,
            index=index if slots is None else None,
            out=rows[0] if rows else u,
            out_gate=rows[-1] if rows else u,
            gate_parts=gate_parts,
            tokens=u.shape[0],
            first=first // block,
            last=last // block,
            share=share,
            SCAN=power_of_two(max(2, call.num_experts)),
            **common,
            **others,
        )

    if outs:
        sum_choices(outs, index.shape[1], share * block, write)
    else:
        write([], 0, u.shape[1])
    return gate_parts


def forward(call: HiddenCall) -> Tensor:
    """See `hidden_experts`."""
    u = call.u
    index = call.top_k_index
    if index.numel() == 0:
        return torch.zeros_like(u, memory_format=torch.contiguous_format)
    check_range(
        "top_k_index", index, -1, call.num_experts - 1
    )  # for the interpreter: it checks only the CPU
    slots = call.kept = None if index.numel() <= FEW else sort_slots(index, call.num_experts)
    out = torch.empty_like(u, memory_format=torch.contiguous_format)
    needs = {"BACKWARD": False, "NEED_OUT": True, "NEED_OUT_GATE": False, "NEED_GATES": False}
    _rows(call, slots, "forward", [out], grad=None, **needs)
    return out


def backward(call: HiddenBackwardCall) -> tuple[Tensor, ...]:
    """See `HiddenBackwardCall`."""
    index = call.top_k_index
    wanted = call.wanted
    need_u, need_gates, *_, need_u_gate, _ = wanted
    results = new_gradients(call, wanted)
    if index.numel() == 0:
        return tuple(results)
    slots = sort_slots(index, call.num_experts) if call.kept is None else call.kept
    grad = call.grad.contiguous()
    if need_u or need_gates or need_u_gate:
        needs = {
            "BACKWARD": True,
            "NEED_OUT": need_u,
            "NEED_OUT_GATE": need_u_gate,
            "NEED_GATES": need_gates,
        }
        outs = [results[place] for place, needed in ((0, need_u), (5, need_u_gate)) if needed]
        gate_parts = _rows(call, slots, "rows", outs, grad=grad, **needs)
        results[1] = gate_parts.sum(0).to(call.gates.dtype) if need_gates else results[1]
    _blocks(call, {**_common(call), "grad": grad, "order": slots.order}, results)
    return tuple(results)


def _blocks(call: HiddenBackwardCall, common: dict[str, Any], results: list[Tensor]) -> None:
    """The gradients of blocks and biases; those of blocks that groups share are sums over shares of
    the groups."""
    _, _, dright, dleft, dbias, _, dright_gate = results
    kept = [dright, dright_gate, dleft]
    if not any(block.numel() for block in (*kept, dbias)):
        return
    (way,) = fitted(_tiles("blocks", call.u, call.block), call.block, call.block)
    experts = call.num_experts
    parts = cdiv(call.block, way["BN"]) ** 2
    groups = call.u.shape[1] // call.block
    share = 1
    if common["OWN"] == 1:
        enough = 4 * architecture.target_of(call.u.device).multiprocessors
        share = cdiv(groups, min(groups, cdiv(enough, experts * parts)))
        if share < groups:
            sizes = [
                (cdiv(groups, share), *block.shape) if block.numel() else (0,) for block in kept
            ]
            kept = [call.u.new_empty(size, dtype=torch.float32) for size in sizes]
    start(
        hidden_blocks_kernel,
        (experts, cdiv(groups, share), parts),
        dright=kept[0],
        dright_gate=kept[1],
        dleft=kept[2],
        dbias=dbias,
        share=share,
        NEED_RIGHT=dright.numel() > 0,
        NEED_RIGHT_GATE=dright_gate.numel() > 0,
        NEED_LEFT=dleft.numel() > 0,
        NEED_BIAS=dbias.numel() > 0,
        **common,
        **way,
    )
    for place, part in zip((2, 6, 3), kept, strict=True):
        if part.numel() and part is not results[place]:
            results[place] = part.sum(0).to(call.u.dtype)
