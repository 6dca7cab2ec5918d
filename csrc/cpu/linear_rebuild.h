// Rebuilding an expert's weight block by block. A block is a range of iC times a range of jC with all of iL, jL, iR, jR:
//   LC[(iC jC), (iL jL), b] = left_e central            (`build_half`)
//   W[(iC jC), (iL jL), (iR jR)] = LC right_e           (`build_slab`, stored as the packed operand that meets rows)
// Rows meet W with the index that they are contracted over, k, first: (iL, iC, iR) in x W and (jL, jC, jR) in dz W^T; n is
// the other. Inside a block k runs as (kC, kL, kR), kR in whole units; columns run as (nC, nL, nR), nR in whole granules.
#pragma once

#include "cpu/linear_common.h"

namespace mpoe {

// One side of the weight.
struct Side {
  std::int64_t L, C, R;
  std::int64_t features;  // true size, <= L C R

  std::int64_t offset(std::int64_t l, std::int64_t c, std::int64_t r) const { return (l * C + c) * R + r; }
};

inline Side in_side(const BlockDims& d) { return {d.iL, d.iC, d.iR, d.in_features}; }
inline Side out_side(const BlockDims& d) { return {d.jL, d.jC, d.jR, d.out_features}; }

// Rows of a packed operand far enough apart that they do not share one set of a cache.
template <class T>
inline std::int64_t row_stride(std::int64_t elements) {
  constexpr std::int64_t kLine = 64 / sizeof(T);
  const std::int64_t whole = round_up(elements, kLine);
  return whole % (16 * kLine) == 0 ? whole + kLine : whole;
}

// sums[p][row][32] (+)= A B for every panel p of B, where A's rows lie in memory.
template <class T>
void rows_times_panels(
    const GemmKernels& gemm, std::int64_t rows, std::int64_t units, const T* a, std::int64_t stride, const T* panels,
    std::int64_t panel_units, std::int64_t count, float* sums, std::int64_t sum_rows, bool accumulate) {
  for_each_tile(rows, gemm.best_rows, [&](std::int64_t first, std::int64_t tile_rows) {
    for (std::int64_t p = 0; p < count; ++p)
      multiply_rows(
          gemm, tile_rows, units, a + first * stride, stride, panels + p * panel_units * kPanel * gemm.unit,
          sums + (p * sum_rows + first) * kPanel, accumulate);
  });
}

// f(columns, first, count, p) for every tile of A's rows, which are the columns of panels, and every panel p of B.
template <class T, class F>
void for_column_tiles(
    const GemmKernels& gemm, std::int64_t rows, std::int64_t units, const T* a, std::int64_t panels, const F& f) {
  for (std::int64_t q = 0; q * kPanel < rows; ++q)
    for_each_tile(std::min(kPanel, rows - q * kPanel), gemm.best_rows, [&](std::int64_t first, std::int64_t tile_rows) {
      const T* columns = a + (q * units * kPanel + first) * gemm.unit;
      for (std::int64_t p = 0; p < panels; ++p) f(columns, q * kPanel + first, tile_rows, p);
    });
}

// Panels of a B whose columns are pairs (inner, column): their products become units of a packed operand, in which
// `inner` is contracted next (gemm.h, store_units).
struct UnitColumns {
  std::int64_t per_panel;                 // granules of units
  std::int64_t panels;
  std::vector<ColumnMap> map;             // of a panel: where its columns lie in a row of B
  std::vector<std::int32_t> which;        // per granule of units: granule of the column
  std::vector<std::int32_t> unit_offset;  // per granule of units: of the inner index

  // Element (inner, column) of a row of B lies at inner * inner_stride + column.
  UnitColumns(std::int64_t unit, std::int64_t inner, std::int64_t inner_stride, std::int64_t columns);
};

// Sizes of blocks, their layout, and the tables that place the granules of rebuilt tiles.
struct RebuildPlan {
  Side k, n;
  bool transposed;              // k is the output side
  std::int64_t unit;            // of k
  std::int64_t left_rows;       // iL jL
  std::int64_t right_columns;   // iR jR
  std::int64_t k_block, n_block;    // kC and nC of a block, at most
  std::int64_t k_units;         // of one kC: kL times kR in units
  std::int64_t granules;        // of one nL: nR in granules
  UnitColumns right;            // columns [kR, nR] of right_e
  std::vector<std::int32_t> row_unit;  // [n_block, iL jL, granules]: where a row's granules start in the slab

  RebuildPlan(const GemmKernels& gemm, const BlockDims& dims, bool transposed, std::int64_t element_bytes);

  std::int64_t panel_units() const { return k_block * k_units; }
  std::int64_t panels(std::int64_t n_count) const { return ceil_divide(n_count * n.L * granules * kGranule, kPanel); }
  std::int64_t slab_units() const { return panels(n_block) * panel_units() * kPanel; }
  std::int64_t k_blocks() const { return ceil_divide(k.C, k_block); }
  std::int64_t n_blocks() const { return ceil_divide(n.C, n_block); }
  Span k_span(std::int64_t block) const { return {block * k_block, std::min(k.C, (block + 1) * k_block)}; }
  Span n_span(std::int64_t block) const { return {block * n_block, std::min(n.C, (block + 1) * n_block)}; }
  // Columns of one panel of the block of nC that starts at `first`: where they lie in a row of the result.
  ColumnMap columns(Span n_range, std::int64_t panel) const;
};

// Where 32 columns of a panel whose granules run as (c in `range`, L, R in granules) lie in a row of `side`; columns past
// the true size do not exist.
ColumnMap side_columns(const Side& side, Span range, std::int64_t panel);

// One expert's left and right blocks in the forms that the products want.
template <class T>
struct ExpertBlocks {
  Buffer<T> left;          // [iL jL, left_stride]
  Buffer<T> right;         // panels of the plan
  Buffer<T> right_turned;  // right with jR before iR, for a transposed plan
  std::int64_t left_stride = 0;

  ExpertBlocks(const GemmKernels& gemm, const BlockDims& d, const RebuildPlan& plan);
  void load(const GemmKernels& gemm, const LinearInputs& in, const RebuildPlan& plan, std::int64_t expert);
};

// Elements of a row of LC.
template <class T>
inline std::int64_t half_stride(const BlockDims& d) {
  return row_stride<T>(round_up(d.b, kPanel));
}

// half [(iC jC), (iL jL), half_stride] of a block; columns b.. up to whole panels are zero. `panels` holds a packed
// [a, b] of central.
template <class T>
void build_half(
    const GemmKernels& gemm, const LinearInputs& in, const T* left, std::int64_t left_stride, Span i_range, Span j_range,
    T* panels, T* half);

// The slab of a block: panels [k units][32], `panel_units` apart.
template <class T>
void build_slab(
    const GemmKernels& gemm, const BlockDims& d, const RebuildPlan& plan, Span k_range, Span n_range, const T* half,
    const T* right_panels, T* slab);

// rows[t, (kC kL kR)] of a block of kC from the rows of `source(t)`, zero where padded.
template <class T, class Source>
void arrange_rows(
    const Side& side, std::int64_t unit, Span range, std::int64_t count, const Source& source, T* rows,
    std::int64_t stride) {
  const std::int64_t width = round_up(side.R, unit);
  for (std::int64_t t = 0; t < count; ++t) {
    const T* row = source(t);
    T* out = rows + t * stride;
    for (std::int64_t c = range.first; c < range.last; ++c)
      for (std::int64_t l = 0; l < side.L; ++l, out += width) {
        const std::int64_t from = side.offset(l, c, 0);
        const std::int64_t valid = std::clamp<std::int64_t>(side.features - from, 0, side.R);
        if (valid == width) {
          std::memcpy(out, row + from, width * sizeof(T));
        } else {
          std::memcpy(out, row + from, valid * sizeof(T));
          std::memset(static_cast<void*>(out + valid), 0, (width - valid) * sizeof(T));
        }
      }
  }
}

// sums[panel][row][32] (+)= rows x slab for `count` rows; `rows` as arrange_rows leaves them.
template <class T>
void multiply_slab(
    const GemmKernels& gemm, const RebuildPlan& plan, Span k_range, Span n_range, const T* rows, std::int64_t stride,
    std::int64_t count, const T* slab, float* sums, bool accumulate) {
  const std::int64_t units = (k_range.last - k_range.first) * plan.k_units;
  const std::int64_t panels = plan.panels(n_range.last - n_range.first);
  for_each_tile(count, gemm.best_rows, [&](std::int64_t first, std::int64_t tile_rows) {
    for (std::int64_t p = 0; p < panels; ++p)
      multiply_rows(
          gemm, tile_rows, units, rows + first * stride, stride, slab + p * plan.panel_units() * kPanel * plan.unit,
          sums + (p * count + first) * kPanel, accumulate);
  });
}

// dx[row_index[s]] = sum of the slots' gradients, in the order of the slots.
template <class T>
void gather_gradient(const GemmKernels& gemm, const LinearBackward& in, const T* slot_gradient) {
  const std::int64_t width = in.dims.in_features;
  std::vector<std::int64_t> next(in.filled(), -1), head(in.tokens, -1);  // lists of a row's slots, ascending
  for (std::int64_t s = in.filled() - 1; s >= 0; --s) {
    next[s] = head[in.row_index[s]];
    head[in.row_index[s]] = s;
  }
  parallel_for(0, in.tokens, 16, [&](std::int64_t begin, std::int64_t end) {
    std::vector<float> sum(width);
    for (std::int64_t t = begin; t < end; ++t) {
      T* out = static_cast<T*>(in.dx) + t * width;
      const std::int64_t s = head[t];
      if (s < 0) {
        std::memset(static_cast<void*>(out), 0, width * sizeof(T));
      } else if (next[s] < 0) {
        std::memcpy(out, slot_gradient + s * width, width * sizeof(T));
      } else {
        std::fill(sum.begin(), sum.end(), 0.0f);
        for (std::int64_t k = s; k >= 0; k = next[k]) gemm.add_row(slot_gradient + k * width, sum.data(), width);
        gemm.round_row(sum.data(), out, width);
      }
    }
  });
}

}  // namespace mpoe
