"""Launches of the Triton kernels of `hidden_experts`: one forward, at most three backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mpoe_kernels.checks import check_range
from mpoe_kernels.hidden_experts.op import HiddenBackwardCall, HiddenCall
from mpoe_kernels.hidden_experts.triton.block_gradients import hidden_blocks_kernel, hidden_sums_kernel
from mpoe_kernels.hidden_experts.triton.forward import hidden_forward_kernel
from mpoe_kernels.hidden_experts.triton.row_gradients import hidden_rows_kernel
from mpoe_kernels.hidden_experts.triton.tiles import Tile, best_row_tile, compiler_options, fitted, shipped_tiles
from mpoe_kernels.triton import architecture
from mpoe_kernels.triton.start import cdiv, power_of_two, precision, start

SORT_BLOCK = 1024  # pairs that a sorting program processes at once
SUM_BLOCK = 1024  # results per program that adds parts
# Products with a block for every row of an expert, by kernel and whether the network is gated.
PRODUCTS = {("forward", False): 2, ("forward", True): 3, ("rows", False): 3, ("rows", True): 5}
NEEDS = ("NEED_U", "NEED_GATES", "NEED_RIGHT", "NEED_LEFT", "NEED_BIAS", "NEED_U_GATE", "NEED_RIGHT_GATE")


def _common(call: HiddenCall) -> dict[str, Any]:
    """Arguments of every kernel. Missing tensors get placeholders that are never read."""
    u, gates, right, left, bias, u_gate, right_gate = call.u, call.gates, call.right, *call.differentiable[3:]
    assert left is not None
    experts, own, block, _ = right.shape
    right = right.contiguous()
    return {
        "u": u.contiguous(),
        "u_gate": u if u_gate is None else u_gate.contiguous(),
        "gates": gates.contiguous(),
        "right": right,
        "right_gate": right if right_gate is None else right_gate.contiguous(),
        "left": left.contiguous(),
        "bias": right if bias is None else bias.contiguous(),
        "F": u.shape[1],
        "EXPERTS": experts,
        "OWN": own,
        "TOP_K": gates.shape[1],
        "B": block,
        "ACTIVATION": call.kernel_activation,
        "GATED": u_gate is not None,
        "HAS_BIAS": bias is not None,
        "PRECISION": precision(u.dtype),
    }


def units_of(device: torch.device) -> int:
    """Multiprocessors of the GPU."""
    return architecture.target_of(device).multiprocessors


def _row_tile(kernel: str, common: dict[str, Any]) -> Tile:
    """Tile of the kernel ``forward`` or ``rows``."""
    u = common["u"]
    return best_row_tile(
        shipped_tiles(kernel, architecture.target_of(u.device).architecture, u.dtype, common["B"]),
        units_of(u.device),
        tokens=u.shape[0],
        groups=u.shape[1] // common["B"],
        experts=common["EXPERTS"],
        top_k=common["TOP_K"],
        block=common["B"],
        products=PRODUCTS[kernel, common["GATED"]],
    )


def _row_options(tile: Tile, common: dict[str, Any]) -> dict[str, Any]:
    return {
        "BT": tile.tokens,
        "BM": tile.rows,
        **fitted(tile, common["B"]),
        **compiler_options(tile),
        "KP": power_of_two(common["TOP_K"]),
    }


def forward(call: HiddenCall) -> Tensor:
    """See `hidden_experts`."""
    u, index = call.u, call.top_k_index
    if index.numel() == 0:
        return torch.zeros_like(u, memory_format=torch.contiguous_format)
    check_range("top_k_index", index, -1, call.num_experts - 1)  # for the interpreter: it checks only the CPU
    common = _common(call)
    out = u.new_empty(u.shape)
    options = _row_options(_row_tile("forward", common), common)
    groups = u.shape[1] // common["B"]
    start(
        hidden_forward_kernel,
        (cdiv(u.shape[0], options["BT"]), groups, cdiv(common["B"], options["BN"])),
        index=index.contiguous(),
        out=out,
        tokens=u.shape[0],
        **common,
        **options,
    )
    return out


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
    needs = dict(zip(NEEDS, wanted, strict=True))
    common = {**_common(call), "grad": call.grad.contiguous()}
    _Backward(common, index.contiguous(), needs, results).run()
    return tuple(results)


class _Backward:
    """One call: sizes that its launches share.

    Args:
        common: arguments of every kernel.
        index: ``[T, K]``.
        needs: by `NEEDS`.
        results: gradients in that order; empty where not needed.
    """

    def __init__(self, common: dict[str, Any], index: Tensor, needs: dict[str, bool], results: list[Tensor]) -> None:
        self.common, self.index, self.needs, self.results = common, index, needs, results
        (self.tokens, features), self.pairs = common["u"].shape, index.numel()
        self.groups = features // common["B"]
        self.gate_parts = self._scratch(self.groups if needs["NEED_GATES"] else 0, self.pairs)
        self.pair_of_slot, self.offsets = (
            index.new_empty(n, dtype=torch.int32) for n in (self.pairs, common["EXPERTS"] + 1)
        )

    def _scratch(self, *size: int) -> Tensor:
        return self.index.new_empty(size, dtype=torch.float32)

    def run(self) -> None:
        du, dgates, dright, dleft, dbias, du_gate, dright_gate = self.results
        blocks = any(self.needs[name] for name in ("NEED_RIGHT", "NEED_LEFT", "NEED_BIAS", "NEED_RIGHT_GATE"))
        self._rows(du, du_gate, blocks)
        parts, shares = (dright, dright_gate, dleft), 1
        if blocks:
            parts, shares = self._blocks(dright, dright_gate, dleft, dbias)
        self._sums(parts, shares, dgates, (dright, dright_gate, dleft))

    def _rows(self, du: Tensor, du_gate: Tensor, sort: bool) -> None:
        common, needs = self.common, {n: self.needs[n] for n in ("NEED_U", "NEED_GATES", "NEED_U_GATE")}
        options = _row_options(_row_tile("rows", common), common)
        tiles = cdiv(self.tokens, options["BT"]) if any(needs.values()) else 0
        programs = tiles * self.groups * cdiv(common["B"], options["BN"])
        start(
            hidden_rows_kernel,
            (programs + (common["EXPERTS"] if sort else 0),),
            index=self.index,
            du=du,
            du_gate=du_gate,
            gate_parts=self.gate_parts,
            pair_of_slot=self.pair_of_slot,
            offsets=self.offsets,
            tokens=self.tokens,
            tiles=tiles,
            BLOCK=SORT_BLOCK,
            **common,
            **needs,
            **options,
        )

    def _blocks(
        self, dright: Tensor, dright_gate: Tensor, dleft: Tensor, dbias: Tensor
    ) -> tuple[tuple[Tensor, Tensor, Tensor], int]:
        """Gradients (for shared blocks, one for every share of the groups), and the number of shares."""
        common = self.common
        u = common["u"]
        (tile,) = shipped_tiles("blocks", architecture.target_of(u.device).architecture, u.dtype, common["B"])
        blocks, experts, size = fitted(tile, common["B"]), common["EXPERTS"], common["B"]
        parts = cdiv(size, blocks["BN"]) ** 2
        share = 1
        if common["OWN"] == 1:
            programs = 4 * units_of(u.device)
            share = cdiv(self.groups, min(self.groups, cdiv(programs, experts * parts)))
        shares = cdiv(self.groups, share)
        partial = common["OWN"] == 1 and shares > 1
        kept = (dright, dright_gate, dleft)
        if partial:
            kept = tuple(self._scratch(shares if t.numel() else 0, experts, size, size) for t in kept)  # type: ignore[assignment]
        start(
            hidden_blocks_kernel,
            (experts, shares, parts),
            dright=kept[0],
            dright_gate=kept[1],
            dleft=kept[2],
            dbias=dbias,
            pair_of_slot=self.pair_of_slot,
            offsets=self.offsets,
            share=share,
            BM=tile.rows,
            **compiler_options(tile),
            **blocks,
            **common,
            **{n: self.needs[n] for n in ("NEED_RIGHT", "NEED_RIGHT_GATE", "NEED_LEFT", "NEED_BIAS")},
        )
        return kept, shares if partial else 1

    def _sums(
        self, parts: tuple[Tensor, ...], shares: int, dgates: Tensor, results: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        sizes = [result.numel() if shares > 1 else 0 for result in results]
        start(
            hidden_sums_kernel,
            (cdiv(max(dgates.numel(), *sizes), SUM_BLOCK), 4),
            gate_parts=self.gate_parts,
            right_parts=parts[0],
            right_gate_parts=parts[1],
            left_parts=parts[2],
            dgates=dgates,
            dright=results[0],
            dright_gate=results[1],
            dleft=results[2],
            groups=self.groups,
            shares=shares,
            gate_size=dgates.numel(),
            right_size=sizes[0],
            right_gate_size=sizes[1],
            left_size=sizes[2],
            BLOCK=SUM_BLOCK,
            num_warps=4,
        )
