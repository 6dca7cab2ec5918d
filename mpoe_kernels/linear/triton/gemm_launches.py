"""Launches of the three GEMM families on named operands."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mpoe_kernels.indices import slots_by_token
from mpoe_kernels.linear.gpu.operands import IndexMap, Operand, index_map
from mpoe_kernels.linear.gpu.primitives import Rows, Sum
from mpoe_kernels.linear.gpu.products import Pass, walk
from mpoe_kernels.linear.triton.block_gemm import blocks_kernel
from mpoe_kernels.linear.triton.configs import MOST_SPLITS, launch_options, tile_and_splits, tiles_for
from mpoe_kernels.linear.triton.outer import outer_kernel
from mpoe_kernels.linear.triton.row_gemm import rows_kernel
from mpoe_kernels.routing.triton import collect_rows
from mpoe_kernels.triton import architecture
from mpoe_kernels.triton.pointwise import activation_backward, sum_parts, sum_rows
from mpoe_kernels.triton.start import cdiv, power_of_two, precision, start


def persistent_programs(device: torch.device, tiles: int) -> int:
    """A few programs per multiprocessor, no more than there are tiles."""
    return max(1, min(tiles, 2 * architecture.target_of(device).multiprocessors))


def axes_of(product: Rows) -> tuple[IndexMap, IndexMap, IndexMap, dict[str, Any]]:
    """Axes of the rows, the sum and the columns of a product, and the kernel's index maps of its operands."""
    a, b, out, dims = product.first, product.second, product.out, product.dims
    m, k, n = (
        index_map(product.first_alone, dims, a, out),
        index_map(product.summed, dims, a, b),
        index_map(product.second_alone, dims, out, b),
    )
    where = {"A_SLOT": a.outer, "B_EXPERT": b.outer, "OUT_SLOT": out.outer, "A_LIMIT": a.limit, "OUT_LIMIT": out.limit}
    rows = {"M": m.extent, "M_SIZES": m.sizes, "M_A": m.strides[0], "M_OUT": m.strides[1]}
    summed = {"K": k.extent, "K_SIZES": k.sizes, "K_A": k.strides[0], "K_B": k.strides[1]}
    columns = {"N": n.extent, "N_SIZES": n.sizes, "N_OUT": n.strides[0], "N_B": n.strides[1]}
    return m, k, n, {**where, **rows, **summed, **columns}


def rows(product: Rows) -> None:
    """See `mpoe_kernels.linear.gpu.primitives.Primitives`."""
    a, b, out, slots = product.first, product.second, product.out, product.slots
    if slots == 0:
        return
    m, k, n, operands = axes_of(product)
    experts, grouped, device = product.experts, b.outer != 0, a.data.device
    rows_of_one = slots * m.extent / (experts if grouped else 1)
    tile = next(tiles_for("rows", a.data, rows_of_one, n.extent, k.extent))
    segments = (experts if grouped else 1) + 1
    tiles = (cdiv(slots * m.extent, tile.m) + segments) * cdiv(n.extent, tile.n)
    dummy, bias, pre, row_index = out.data, product.bias, product.pre, product.row_index
    out_index, gates, options = product.out_index, product.gates, launch_options(tile)
    if out_index is not None and architecture.target_of(device).architecture.startswith("sm_"):
        options["maxnreg"] = 255  # or the compiler spills a few, to have one program more on a multiprocessor
    start(
        rows_kernel,
        (persistent_programs(device, tiles),),
        a=a.data,
        b=b.data,
        out=out.data,
        bias=dummy if bias is None else bias,
        pre=dummy if pre is None else pre,
        row_index=dummy if row_index is None else row_index,
        out_index=dummy if out_index is None else out_index,
        gates=dummy if gates is None else gates,
        offsets=product.offsets,
        slots=slots,
        **operands,
        EXPERTS=experts,
        GROUPED=grouped,
        SCAN=power_of_two(segments),
        TAIL=product.tail,
        HAS_INDEX=row_index is not None,
        HAS_BIAS=bias is not None,
        ACTIVATION=product.activation,
        SAVE_PRE=pre is not None,
        PLACED=out_index is not None,
        PRECISION=precision(a.data.dtype),
        **options,
    )


def gradient(product: Sum) -> None:
    """See `mpoe_kernels.linear.gpu.primitives.Primitives`; an ``out`` that experts share is dense."""
    a, g, out, dims, row_index = product.first, product.second, product.out, product.dims, product.row_index
    experts, grouped = product.experts, not product.shared
    m, n, s = (
        index_map(out.axes & a.axes, dims, a, out),
        index_map(out.axes & g.axes, dims, g, out),
        index_map(product.summed, dims, g, a),
    )
    groups, inner = experts if grouped else 1, g.data.shape[0] * s.extent
    sizes = m.extent, n.extent, inner / groups, groups
    tile, splits = tile_and_splits("outer", a.data, *sizes, most_parts(product))
    mn_tiles = cdiv(m.extent, tile.m) * cdiv(n.extent, tile.n)
    whole = splits == 1 and (grouped or not product.add)
    found = out.data if whole else _partial(out, splits)
    start(
        outer_kernel,
        (mn_tiles, groups * splits),
        a=a.data,
        g=g.data,
        out=found,
        row_index=found if row_index is None else row_index,
        offsets=product.offsets,
        A_SLOT=a.outer,
        G_SLOT=g.outer,
        OUT_EXPERT=out.outer or out.data.numel(),
        S=s.extent,
        M=m.extent,
        N=n.extent,
        S_SIZES=s.sizes,
        S_G=s.strides[0],
        S_A=s.strides[1],
        M_SIZES=m.sizes,
        M_A=m.strides[0],
        M_OUT=m.strides[1],
        N_SIZES=n.sizes,
        N_G=n.strides[0],
        N_OUT=n.strides[1],
        A_LIMIT=a.limit,
        G_LIMIT=g.limit,
        EXPERTS=experts,
        GROUPED=grouped,
        SPLITS=splits,
        HAS_INDEX=row_index is not None,
        PRECISION=precision(a.data.dtype),
        **launch_options(tile),
    )
    if not whole:
        sum_parts(found, out.data, product.add and not grouped)


def most_parts(product: Sum) -> int:
    """Parts of an inner size: partial sums stay within the product's room, and their sum is contiguous."""
    out = product.out.data
    if not out.is_contiguous():
        return 1
    return MOST_SPLITS if product.room is None else product.room // (4 * max(out.numel(), 1))


def _partial(out: Operand, splits: int) -> Tensor:
    """Memory for results of every part."""
    return torch.empty(splits, *out.data.shape, dtype=torch.float32, device=out.data.device)


def merge(product: Sum) -> None:
    """See `mpoe_kernels.linear.gpu.primitives.Primitives`."""
    p, q, out, dims = product.first, product.second, product.out, product.dims
    m, n, k = (
        index_map(product.first_alone, dims, out, p),
        index_map(product.second_alone, dims, out, q),
        index_map(product.summed, dims, q, p),
    )
    experts, shared = product.experts, product.shared
    groups, inner = (1, k.extent * experts) if shared else (experts, k.extent)
    # In float32 a split sum would spill registers on sm_80.
    most = 1 if shared and p.data.dtype == torch.float32 else most_parts(product)
    tile, splits = tile_and_splits("blocks", p.data, m.extent, n.extent, inner, groups, most)
    mn_tiles = cdiv(m.extent, tile.m) * cdiv(n.extent, tile.n)
    if shared:  # no part without an expert
        splits = cdiv(experts, cdiv(experts, splits))
    found = out.data if splits == 1 else _partial(out, splits)
    start(
        blocks_kernel,
        (mn_tiles, groups * splits),
        p=p.data,
        q=q.data,
        out=found,
        offsets=product.offsets,
        experts=experts,
        P_EXPERT=p.outer,
        Q_EXPERT=q.outer,
        OUT_EXPERT=out.outer or out.data.numel(),
        M=m.extent,
        K=k.extent,
        N=n.extent,
        M_SIZES=m.sizes,
        M_OUT=m.strides[0],
        M_P=m.strides[1],
        K_SIZES=k.sizes,
        K_Q=k.strides[0],
        K_P=k.strides[1],
        N_SIZES=n.sizes,
        N_OUT=n.strides[0],
        N_Q=n.strides[1],
        SUM=shared,
        SPLITS=splits,
        CLEAR=splits > 1 or (not product.add if shared else product.clear),
        PRECISION=precision(p.data.dtype),
        **launch_options(tile),
    )
    if splits > 1:
        sum_parts(found, out.data, shared and product.add)


class TritonLaunches:
    """See `mpoe_kernels.linear.gpu.primitives`: both the primitives and the operations around them."""

    rows = staticmethod(rows)
    gradient = staticmethod(gradient)
    merge = staticmethod(merge)
    activation_backward = staticmethod(activation_backward)
    collect_rows = staticmethod(collect_rows)

    def sum_rows_by_token(self, rows: Tensor, row_index: Tensor, tokens: int) -> Tensor:
        """See `mpoe_kernels.linear.gpu.primitives.Surrounding`."""
        return sum_rows(rows, *slots_by_token(row_index, tokens))

    def compute(self, whole: Pass) -> None:
        """Product after product."""
        walk(whole, self)

    def empty(self, rows: int, columns: int, like: Tensor) -> Tensor:
        """Memory from PyTorch."""
        return like.new_empty(rows, columns)

    def begin_sum(self, block: Tensor, grows: bool) -> Tensor:
        """The first product writes, the others add."""
        return torch.empty(block.shape, dtype=torch.float32 if grows else block.dtype, device=block.device)

    def end_sum(self, total: Tensor, dtype: torch.dtype) -> Tensor:
        return total if total.dtype == dtype else sum_parts(total.unsqueeze(0), torch.empty_like(total, dtype=dtype))


LAUNCHES = TritonLaunches()
