"""Launches of the Triton kernels of `hidden_experts`, over slots sorted by expert (`routing.triton.sort_slots`).

Forward: sort, `hidden_forward_kernel`, `collect_rows`, which adds the rows of a token's slots in the order of its
choices, times their gates. Backward: sort, `hidden_rows_kernel` and `collect_rows` for du and du_gate,
`hidden_blocks_kernel` for the blocks and biases, `sums_kernel` for the gates and shared blocks. The rows of all slots
``[T K, F]`` are the largest temporary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mpoe_kernels.checks import check_range
from mpoe_kernels.hidden_experts.op import HiddenBackwardCall, HiddenCall
from mpoe_kernels.hidden_experts.triton_kernels import hidden_blocks_kernel, hidden_forward_kernel, hidden_rows_kernel
from mpoe_kernels.routing.triton import SortedSlots, collect_rows, sort_slots
from mpoe_kernels.triton import architecture
from mpoe_kernels.triton.start import Tile, cdiv, precision, start, start_best
from mpoe_kernels.triton.sums import sums_kernel

MOST_SHARE = 4  # groups that a program of rows computes one after the other, if programs abound
SUM_BLOCK = 128  # results of a program that adds parts
LARGEST_BLOCK = 64  # of the first table; products with larger ones run in loops of their own
# kernel -> bytes of an element -> tiles, the first of them where nothing is timed; for few slots the last alone.
TILES: dict[str, dict[int, tuple[Tile, ...]]] = {
    "forward": {2: (Tile(64, 64, 64, 4), Tile(32, 64, 64, 4), Tile(16, 64, 64, 4)), 4: (Tile(32, 64, 16, 8),)},
    "rows": {2: (Tile(32, 64, 64, 4), Tile(16, 64, 64, 4)), 4: (Tile(32, 32, 16, 8),)},
    "blocks": {2: (Tile(32, 64, 64, 8),), 4: (Tile(16, 32, 16, 8),)},
}
LARGE_TILES = TILES | {
    "forward": {2: (Tile(64, 64, 32, 8), Tile(16, 64, 64, 4)), 4: TILES["forward"][4]},
    "rows": {2: (Tile(32, 64, 32, 8), Tile(16, 64, 64, 4)), 4: TILES["rows"][4]},
    "blocks": {2: (Tile(32, 32, 32, 8, 1),), 4: TILES["blocks"][4]},
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
        "pair_of_slot": sorted_slots.pair_of_slot,
        "offsets": sorted_slots.offsets,
        "right": right,
        "right_gate": right if right_gate is None else right_gate.contiguous(),
        "left": left.contiguous(),
        "bias": right if bias is None else bias.contiguous(),
        "F": u.shape[1],
        "EXPERTS": call.num_experts,
        "OWN": right.shape[1],
        "TOP_K": call.gates.shape[1],
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


def forward(call: HiddenCall) -> Tensor:
    """See `hidden_experts`."""
    u, index = call.u, call.top_k_index
    if index.numel() == 0:
        return torch.zeros_like(u, memory_format=torch.contiguous_format)
    check_range("top_k_index", index, -1, call.num_experts - 1)  # for the interpreter: it checks only the CPU
    sorted_slots = sort_slots(index, call.num_experts)
    common, groups = _common(call, sorted_slots), u.shape[1] // call.block
    tiles = sorted_slots.among(_tiles("forward", u, call.block))
    share = _share(groups, sorted_slots.tiles(tiles[0].rows) * groups, u.device)
    out = u.new_empty(index.numel(), u.shape[1])
    start_best(
        hidden_forward_kernel,
        lambda rows, columns: (sorted_slots.tiles(rows), cdiv(groups, share), cdiv(call.block, columns)),
        tiles,
        out=out,
        share=share,
        SCAN=sorted_slots.scan,
        **common,
    )
    return collect_rows(out, sorted_slots.slot_of_pair, call.gates)


def backward(call: HiddenBackwardCall) -> tuple[Tensor, ...]:
    """See `HiddenBackwardCall`."""
    u, index, wanted = call.u, call.top_k_index, call.wanted
    empty = torch.zeros if index.numel() == 0 else torch.empty
    results = [
        empty(value.shape, dtype=value.dtype, device=value.device) if wants and value is not None else u.new_empty(0)
        for value, wants in zip(call.differentiable, wanted, strict=True)
    ]
    if index.numel() == 0:
        return tuple(results)
    sorted_slots = sort_slots(index, call.num_experts)
    common = {**_common(call, sorted_slots), "grad": call.grad.contiguous(), "gates": call.gates.contiguous()}
    results[0], results[5], gate_parts = _rows(call, common, sorted_slots)
    parts = _blocks(call, common, results)
    _sums(call, sorted_slots, gate_parts, parts, results)
    return tuple(results)


def _rows(call: HiddenBackwardCall, common: dict[str, Any], sorted_slots: SortedSlots) -> tuple[Tensor, Tensor, Tensor]:
    """du, du_gate and the shares ``[shares, T K]`` of the gates' gradients; what is not needed is empty."""
    u, (need_u, need_gates, *_, need_u_gate, _) = call.u, call.wanted
    groups, pairs, none = u.shape[1] // call.block, call.gates.numel(), u.new_empty(0)
    if not (need_u or need_gates or need_u_gate):
        return none, none, none
    tiles = sorted_slots.among(_tiles("rows", u, call.block))
    share = _share(groups, sorted_slots.tiles(tiles[0].rows) * groups, u.device)
    du, du_gate = (u.new_empty(pairs, u.shape[1]) if wanted else none for wanted in (need_u, need_u_gate))
    gate_parts = u.new_empty(cdiv(groups, share), pairs if need_gates else 0, dtype=torch.float32)
    start_best(
        hidden_rows_kernel,
        lambda rows, columns: (sorted_slots.tiles(rows), cdiv(groups, share), cdiv(call.block, columns)),
        tiles,
        du=du,
        du_gate=du_gate,
        gate_parts=gate_parts,
        slots=pairs,
        share=share,
        NEED_U=need_u,
        NEED_U_GATE=need_u_gate,
        NEED_GATES=need_gates,
        SCAN=sorted_slots.scan,
        **common,
    )
    slots = sorted_slots.slot_of_pair
    du, du_gate = (collect_rows(rows, slots) if rows.numel() else none for rows in (du, du_gate))
    return du, du_gate, gate_parts


def _blocks(call: HiddenBackwardCall, common: dict[str, Any], results: list[Tensor]) -> list[Tensor]:
    """Writes the gradients of blocks and biases; for blocks that groups share, returns a part for each share of the
    groups, in float32: of right, right_gate and left ``[shares, E, b, b]``."""
    _, _, dright, dleft, dbias, _, dright_gate = results
    kept = [dright, dright_gate, dleft]
    if not any(each.numel() for each in (*kept, dbias)):
        return kept
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
    return kept


def _sums(
    call: HiddenBackwardCall,
    sorted_slots: SortedSlots,
    gate_parts: Tensor,
    parts: list[Tensor],
    results: list[Tensor],
) -> None:
    """The gates' gradients, and those of shared blocks, from their parts."""
    _, dgates, dright, dleft, _, _, dright_gate = results
    whole = (dright, dright_gate, dleft)
    sizes = [0 if part is result else result.numel() for part, result in zip(parts, whole, strict=True)]
    start(
        sums_kernel,
        (cdiv(max(dgates.numel(), *sizes), SUM_BLOCK), 4 if any(sizes) else 1),
        gate_parts=gate_parts,
        slot_of_pair=sorted_slots.slot_of_pair,
        right_parts=parts[0],
        right_gate_parts=parts[1],
        left_parts=parts[2],
        dgates=dgates,
        dright=dright,
        dright_gate=dright_gate,
        dleft=dleft,
        shares=gate_parts.shape[0],
        block_shares=max(part.shape[0] for part in parts),
        pairs=call.gates.numel(),
        gate_size=dgates.numel(),
        right_size=sizes[0],
        right_gate_size=sizes[1],
        left_size=sizes[2],
        BLOCK=SUM_BLOCK,
        num_warps=4,
    )
