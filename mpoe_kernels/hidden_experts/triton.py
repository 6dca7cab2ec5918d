"""Launches of the Triton kernels of `hidden_experts`, over slots sorted by expert (`routing.triton.sort_slots`).

Forward: sort and `hidden_rows_kernel`, whose programs add to a token's row in the order of its choices. Backward: sort,
`hidden_rows_kernel` for du, du_gate and parts of the gates' gradients, `hidden_blocks_kernel` for the blocks and
biases; parts are added last. No rows of slots are stored.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mpoe_kernels.checks import check_range
from mpoe_kernels.hidden_experts.op import HiddenBackwardCall, HiddenCall
from mpoe_kernels.hidden_experts.triton_kernels import hidden_blocks_kernel, hidden_rows_kernel
from mpoe_kernels.routing.triton import SortedSlots, sort_slots
from mpoe_kernels.triton import architecture
from mpoe_kernels.triton.start import Tile, cdiv, precision, start, start_best

MOST_SHARE = 4  # groups that a program of rows computes one after the other, if programs abound
LARGEST_BLOCK = 64  # of the first table; products with larger ones run in loops of their own
# kernel -> bytes of an element -> tiles, the first of them where nothing is timed; for few slots the last alone.
TILES: dict[str, dict[int, tuple[Tile, ...]]] = {
    "forward": {2: (Tile(64, 64, 64, 4), Tile(32, 64, 64, 4), Tile(16, 64, 64, 4)), 4: (Tile(16, 64, 16, 8),)},
    "rows": {2: (Tile(32, 64, 64, 4), Tile(16, 64, 64, 4, 1)), 4: (Tile(16, 32, 32, 8),)},
    "blocks": {2: (Tile(32, 64, 64, 8),), 4: (Tile(16, 32, 16, 8),)},
}
LARGE_TILES = TILES | {
    "forward": {2: (Tile(64, 64, 32, 8), Tile(16, 64, 64, 4)), 4: TILES["forward"][4]},
    "rows": {2: (Tile(32, 64, 32, 8),), 4: TILES["rows"][4]},
    "blocks": {2: (Tile(16, 32, 32, 8, 1),), 4: TILES["blocks"][4]},
}
# Where operands of products are in registers, with the three blocks that gradients of blocks read for every slot.
IN_REGISTERS = ("sm_80", "gfx942")
SMALL_TILE = Tile(32, 32, 32, 4, 1)


def _tiles(kernel: str, u: Tensor, block: int) -> list[Tile]:
    found = (TILES if block <= LARGEST_BLOCK else LARGE_TILES)[kernel][u.element_size()]
    if kernel == "blocks" and u.element_size() == 2 and architecture.target_of(u.device).architecture in IN_REGISTERS:
        found = (SMALL_TILE,)
    return [tile.within(block, block) for tile in found]


def _common(call: HiddenCall, sorted_slots: SortedSlots) -> dict[str, Any]:
    """Arguments of every kernel. Missing tensors get placeholders that are never read."""
    u, right, left, bias, u_gate, right_gate = call.u, call.right, call.left, call.bias, call.u_gate, call.right_gate
    right = right.contiguous()
    return {
        "u": u.contiguous(),
        "u_gate": u if u_gate is None else u_gate.contiguous(),
        "gates": call.gates.contiguous(),
        "pair_of_slot": sorted_slots.pair_of_slot,
        "offsets": sorted_slots.offsets,
        "right": right,
        "right_gate": right if right_gate is None else right_gate.contiguous(),
        "left": left.contiguous(),
        "bias": right if bias is None else bias.contiguous(),
        "F": u.shape[1],
        "EXPERTS": call.num_experts,
        "TOP_K": sorted_slots.top_k,
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


def _rows(call: HiddenCall, sorted_slots: SortedSlots, kernel: str, **others: Any) -> Tensor:
    """Launch `hidden_rows_kernel` for the ``NEED_`` results among ``others``; returns the shares ``[shares, T, K]`` of
    the gates' gradients."""
    u, groups = call.u, call.u.shape[1] // call.block
    tiles = sorted_slots.among(_tiles(kernel, u, call.block))
    share = _share(groups, sorted_slots.tiles(tiles[0].rows) * groups, u.device)
    size = call.gates.shape if others["NEED_GATES"] else (0, 0)
    gate_parts = u.new_empty(cdiv(groups, share), *size, dtype=torch.float32)
    start_best(
        hidden_rows_kernel,
        lambda tile: (sorted_slots.tiles(tile["BM"]), cdiv(groups, share), cdiv(call.block, tile["BN"])),
        [tile.options for tile in tiles],
        gate_parts=gate_parts,
        tokens=u.shape[0],
        share=share,
        SCAN=sorted_slots.scan,
        **sorted_slots.turns(cdiv(groups, share) * cdiv(call.block, 16)),
        **others,
    )
    return gate_parts


def forward(call: HiddenCall) -> Tensor:
    """See `hidden_experts`."""
    u, index = call.u, call.top_k_index
    if index.numel() == 0:
        return torch.zeros_like(u, memory_format=torch.contiguous_format)
    check_range("top_k_index", index, -1, call.num_experts - 1)  # for the interpreter: it checks only the CPU
    sorted_slots = sort_slots(index, call.num_experts)
    out = sorted_slots.sums(torch.empty_like(u, memory_format=torch.contiguous_format))
    needs = {"BACKWARD": False, "NEED_OUT": True, "NEED_OUT_GATE": False, "NEED_GATES": False}
    _rows(call, sorted_slots, "forward", grad=u, out=out, out_gate=out, **needs, **_common(call, sorted_slots))
    return out.to(u.dtype)


def backward(call: HiddenBackwardCall) -> tuple[Tensor, ...]:
    """See `HiddenBackwardCall`."""
    u, index, (need_u, need_gates, *_, need_u_gate, _) = call.u, call.top_k_index, call.wanted
    empty = torch.zeros if index.numel() == 0 else torch.empty
    results = [
        empty(value.shape, dtype=value.dtype, device=value.device) if wants and value is not None else u.new_empty(0)
        for value, wants in zip(call.differentiable, call.wanted, strict=True)
    ]
    if index.numel() == 0:
        return tuple(results)
    sorted_slots = sort_slots(index, call.num_experts)
    common = {**_common(call, sorted_slots), "grad": call.grad.contiguous()}
    if need_u or need_gates or need_u_gate:
        needs = {"BACKWARD": True, "NEED_OUT": need_u, "NEED_OUT_GATE": need_u_gate, "NEED_GATES": need_gates}
        du, du_gate = sorted_slots.sums(results[0]), sorted_slots.sums(results[5])
        gate_parts = _rows(call, sorted_slots, "rows", out=du, out_gate=du_gate, **needs, **common)
        results[0], results[5] = du.to(u.dtype), du_gate.to(u.dtype)
        results[1] = gate_parts.sum(0).to(call.gates.dtype) if need_gates else results[1]
    _blocks(call, common, results)
    return tuple(results)


def _blocks(call: HiddenBackwardCall, common: dict[str, Any], results: list[Tensor]) -> None:
    """The gradients of blocks and biases; those of blocks that groups share are sums over shares of the groups."""
    _, _, dright, dleft, dbias, _, dright_gate = results
    kept = [dright, dright_gate, dleft]
    if not any(each.numel() for each in (*kept, dbias)):
        return
    (tile,) = _tiles("blocks", call.u, call.block)
    experts, parts = call.num_experts, cdiv(call.block, tile.columns) ** 2
    groups, share = call.u.shape[1] // call.block, 1
    if common["OWN"] == 1:
        enough = 4 * architecture.target_of(call.u.device).multiprocessors
        share = cdiv(groups, min(groups, cdiv(enough, experts * parts)))
        if share < groups:
            sizes = [(cdiv(groups, share), *each.shape) if each.numel() else (0,) for each in kept]
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
        **tile.options,
    )
    for place, part in zip((2, 6, 3), kept, strict=True):
        if part.numel() and part is not results[place]:
            results[place] = part.sum(0).to(call.u.dtype)
