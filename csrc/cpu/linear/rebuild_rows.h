// Backward of the rebuild strategy: sizes, and what all blocks of one expert read.
#pragma once

#include "cpu/linear/gradient.h"
#include "cpu/linear/rebuild.h"

namespace mpoe {

// Sizes of what the gradients of the blocks are computed from, beside those of RebuildPlan. A pair
// is an (iC, jC) of a block; panels are of 32 columns, units of the inner axis.
struct GradientSizes {
  int64_t a_panels;         // of a, as columns
  int64_t left_units;       // of (iL jL), as the inner axis
  int64_t right_panels;     // of (iR jR), as columns
  int64_t right_units;      // of (iR jR), as the inner axis
  int64_t b;                // in whole units
  int64_t x_panels;         // of (iL iR), the columns of one iC of x
  int64_t dz_panels;        // of (jL jR in granules), the columns of one jC of dz
  int64_t pairs;            // most per block
  int64_t dhalf_panels;     // of (pairs b), the columns of dLC
  int64_t weight_row;       // row stride, in elements, of dW [(iL jL), (iR jR)]
  int64_t dhalf_row;        // of dLC [(iL jL), (pairs b)]
  int64_t left_turned_row;  // of left^T [a, (iL jL)]
  int64_t left_sums;        // floats per block, as in GradientSums
  int64_t central_sums;
  int64_t right_sums;

  GradientSizes(const GemmKernels& gemm, const BlockDims& d, const RebuildPlan& plan)
      : a_panels(ceil_divide(d.a, kPanel)),
        left_units(ceil_divide(plan.left_rows, gemm.unit)),
        right_panels(ceil_divide(plan.right_columns, kPanel)),
        right_units(ceil_divide(plan.right_columns, gemm.unit)),
        b(padded_k(gemm, d.b)),
        x_panels(ceil_divide(d.iL * d.iR, kPanel)),
        dz_panels(ceil_divide(d.jL * round_up(d.jR, kGranule), kPanel)),
        pairs(plan.k_block * plan.n_block),
        dhalf_panels(ceil_divide(pairs * b, kPanel)),
        weight_row(row_stride(gemm, right_panels * kPanel)),
        dhalf_row(row_stride(gemm, pairs * b)),
        left_turned_row(row_stride(gemm, plan.left_rows)),
        left_sums(a_panels * plan.left_rows * kPanel),
        central_sums(dhalf_panels * d.a * kPanel),
        right_sums(right_panels * plan.b_panels * kPanel * kPanel) {}
};

// What all blocks of one expert read: its own blocks, and its slots' rows of x and dz, in the forms
// that the products need. Only what the wanted gradients need is allocated.
template <class T>
struct ExpertRows {
  const GemmKernels& gemm;
  const LinearBackward& in;
  const RebuildPlan& plan;
  const GradientSizes& sizes;
  const Wanted wanted;
  ExpertBlocks<T> blocks;
  Buffer<T> right_turned;                   // panels of right^T [(iR jR), b]
  Buffer<T> left_turned;                    // [a, left_turned_row]
  Buffer<T> dz_rows;                        // [blocks of jC, count, x_row]
  Buffer<T> dz_panels;                      // [jC, dz_panels, slots in units, 32]
  Buffer<T> x_panels;                       // [iC, x_panels, slots in units, 32]
  Buffer<T> x_rows;                         // [iC, count, iL iR]
  std::vector<int64_t> dx_rows;             // offsets of the slots' rows of dx from the first one
  int64_t first = 0, count = 0, units = 0;  // slots, and as an inner size

  ExpertRows(const GemmKernels& gemm,
             const LinearBackward& in,
             const RebuildPlan& plan,
             const GradientSizes& sizes,
             int64_t most_slots)
      : gemm(gemm), in(in), plan(plan), sizes(sizes), wanted(in), blocks(gemm, in.dims, plan) {
    const BlockDims& d = in.dims;
    const int64_t column = ceil_divide(most_slots, gemm.unit) * kPanel * gemm.unit;
    if (wanted.x)
      dz_rows = Buffer<T>(plan.k_blocks() * most_slots * plan.x_row);
    if (!wanted.weight())
      return;
    dz_panels = Buffer<T>(d.jC * sizes.dz_panels * column);
    x_panels = Buffer<T>(d.iC * sizes.x_panels * column);
    x_rows = Buffer<T>(d.iC * most_slots * d.iL * d.iR);
    right_turned = Buffer<T>(plan.b_panels * sizes.right_units * kPanel * gemm.unit);
    left_turned = zeros<T>(d.a * sizes.left_turned_row);
  }

  // `dz`: of all slots.
  void load(int64_t expert, const T* dz, RowGradients<T>& gradients) {
    first = in.offsets[expert];
    count = in.count(expert);
    units = ceil_divide(count, gemm.unit);
    blocks.load(gemm, in, plan, expert);
    dz += first * in.dims.out_features;
    if (wanted.x)
      load_rows(dz, gradients);
    if (!wanted.weight())
      return;

    gemm.pack_transposed(right_turned.get(),
                         sizes.right_units,
                         right_of<T>(in, expert),
                         plan.right_columns,
                         plan.right_columns,
                         in.dims.b);

    gemm.transpose(left_of<T>(in, expert),
                   in.dims.a,
                   plan.left_rows,
                   in.dims.a,
                   left_turned.get(),
                   sizes.left_turned_row);
    load_panels(dz);
  }

 private:
  void load_rows(const T* dz, RowGradients<T>& gradients) {
    dx_rows.resize(count);
    for (int64_t t = 0; t < count; ++t)
      dx_rows[t] = gradients.row(first + t) - gradients.row(first);
    parallel_for(count, 16, [&](int64_t begin, int64_t end) {
      for (int64_t kb = 0; kb < plan.k_blocks(); ++kb)
        arrange_rows<T>(
            plan.k,
            gemm.unit,
            plan.k_span(kb),
            end - begin,
            [&](int64_t t) { return dz + (begin + t) * in.dims.out_features; },
            dz_rows.get() + (kb * count + begin) * plan.x_row,
            plan.x_row);
    });
  }

  void load_panels(const T* dz) {
    const BlockDims& d = in.dims;
    const int64_t panel = units * kPanel * gemm.unit;
    parallel_for_each(d.jC * sizes.dz_panels, 4, [&](int64_t k) {
      const int64_t j = k / sizes.dz_panels;
      const ColumnMap columns = side_columns(out_side(d), {j, j + 1}, k % sizes.dz_panels);
      gemm.pack_granules(dz_panels.get() + k * panel, dz, d.out_features, count, columns);
    });
    parallel_for_each(d.iC, 1, [&](int64_t i) {
      T* rows = x_rows.get() + i * count * d.iL * d.iR;
      arrange_rows<T>(
          in_side(d),
          1,
          {i, i + 1},
          count,
          [&](int64_t t) { return row_of<T>(in, first + t); },
          rows,
          d.iL * d.iR);
      gemm.pack(x_panels.get() + i * sizes.x_panels * panel,
                units,
                rows,
                d.iL * d.iR,
                count,
                d.iL * d.iR);
    });
  }
};

}  // namespace mpoe
