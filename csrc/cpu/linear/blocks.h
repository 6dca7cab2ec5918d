// Shared by the strategies that work on the sides (L, C, R) of the weight: positions of columns,
// reordering of rows, and the products of gemm.h over whole operands.
#pragma once

#include "cpu/linear/common.h"

namespace mpoe {

// One side of the weight.
struct Side {
  int64_t L, C, R;
  int64_t features;  // true size, <= L C R

  int64_t offset(int64_t l, int64_t c, int64_t r) const { return (l * C + c) * R + r; }
};

inline Side in_side(const BlockDims& d) {
  return {d.iL, d.iC, d.iR, d.in_features};
}
inline Side out_side(const BlockDims& d) {
  return {d.jL, d.jC, d.jR, d.out_features};
}

// Where the 32 columns of a panel are in a row of `side`. The panel's granules run as (C in `c`, L
// in `l`, R in granules); columns past the true size do not exist.
inline ColumnMap side_columns(const Side& side, Span c_range, Span l_range, int64_t panel) {
  const int64_t granules = ceil_divide(side.R, kGranule), height = l_range.size();
  ColumnMap map{};
  for (int64_t g = 0; g < kGranules; ++g) {
    const int64_t q = panel * kGranules + g;
    const int64_t c = c_range.first + q / (height * granules),
                  l = l_range.first + q / granules % height;
    if (c >= c_range.last)
      continue;
    const int64_t r = q % granules * kGranule, offset = side.offset(l, c, r);
    map.offset[g] = offset;
    map.valid[g] = static_cast<int32_t>(
        std::clamp<int64_t>(std::min(side.R - r, side.features - offset), 0, kGranule));
  }
  return map;
}
inline ColumnMap side_columns(const Side& side, Span c, int64_t panel) {
  return side_columns(side, c, {0, side.L}, panel);
}

// sums[p][row][32] (+)= A B for every panel p of B; A's rows are read in place.
template <class T>
void rows_times_panels(const GemmKernels& gemm,
                       int64_t rows,
                       int64_t units,
                       const T* a,
                       int64_t stride,
                       const T* panels,
                       int64_t panel_units,
                       int64_t count,
                       float* sums,
                       int64_t sum_rows,
                       bool accumulate) {
  for_each_tile(rows, kStripRows, [&](int64_t first, int64_t strip_rows) {
    for (int64_t p = 0; p < count; ++p)
      multiply_rows(gemm,
                    strip_rows,
                    units,
                    a + first * stride,
                    stride,
                    panels + p * panel_units * kPanel * gemm.unit,
                    sums + (p * sum_rows + first) * kPanel,
                    accumulate);
  });
}

// Panels of a B whose columns are pairs (inner, column): their products become units of a packed
// operand, in which `inner` is contracted next (gemm.h, store_units).
struct UnitColumns {
  int64_t per_panel;  // granules of units
  int64_t panels;
  std::vector<ColumnMap> map;        // per panel: where its columns are in a row of B
  std::vector<int32_t> which;        // per granule of units: granule of the column
  std::vector<int32_t> unit_offset;  // per granule of units: offset of the inner index

  // Element (inner, column) of a row of B is at inner * inner_stride + column.
  UnitColumns(int64_t unit, int64_t inner, int64_t inner_stride, int64_t columns)
      : per_panel(kGranules / unit) {
    const int64_t granules = ceil_divide(columns, kGranule),
                  count = ceil_divide(inner, unit) * granules;
    panels = ceil_divide(count, per_panel);
    for (int64_t p = 0; p < panels; ++p) {
      ColumnMap columns_of_panel{};
      for (int64_t s = 0; s < per_panel; ++s) {
        // Past the end: the last one again
        const int64_t q = std::min(p * per_panel + s, count - 1);
        const int64_t first = q / granules * unit, column = q % granules * kGranule;
        which.push_back(static_cast<int32_t>(q % granules));
        unit_offset.push_back(static_cast<int32_t>(q / granules * kPanel));
        for (int64_t i = 0; i < unit && first + i < inner; ++i) {
          columns_of_panel.offset[i * per_panel + s] = (first + i) * inner_stride + column;
          columns_of_panel.valid[i * per_panel + s] =
              static_cast<int32_t>(std::min(kGranule, columns - column));
        }
      }
      map.push_back(columns_of_panel);
    }
  }

  // Panels of a B of k rows.
  template <class T>
  void pack(const GemmKernels& gemm, const T* b, int64_t stride, int64_t k, T* to) const {
    for (int64_t p = 0; p < panels; ++p)
      gemm.pack_granules(to + p * padded_k(gemm, k) * kPanel, b, stride, k, map[p]);
  }
  // Stores a tile of products with the panel of `column`; `row_unit`: of the tile's rows, as many
  // each as there are granules of columns.
  template <class T>
  void store(const GemmKernels& gemm,
             const float* tile,
             int64_t rows,
             int64_t column,
             T* out,
             const int32_t* row_unit,
             int64_t granules) const {
    const int64_t granule = column / kPanel * per_panel;
    gemm.store_units(
        tile, rows, out, row_unit, granules, which.data() + granule, unit_offset.data() + granule);
  }
};

// Copies a run of elements, usually a few granules: too short for a memcpy call each.
template <class T>
inline void copy_run(const T* from, int64_t count, T* to) {
  for (; count >= kGranule; count -= kGranule, from += kGranule, to += kGranule)
    std::memcpy(to, from, kGranule * sizeof(T));
  for (int64_t k = 0; k < count; ++k)
    to[k] = from[k];
}

// rows[t, (kC kL kR)] for a block of kC from the rows of `source(t)`, zero where padded.
template <class T, class Source>
void arrange_rows(const Side& side,
                  int64_t unit,
                  Span range,
                  int64_t count,
                  const Source& source,
                  T* rows,
                  int64_t stride) {
  const int64_t width = round_up(side.R, unit);
  for (int64_t t = 0; t < count; ++t) {
    const T* row = source(t);
    T* out = rows + t * stride;
    for (int64_t c = range.first; c < range.last; ++c)
      for (int64_t l = 0; l < side.L; ++l, out += width) {
        const int64_t from = side.offset(l, c, 0);
        const int64_t valid = std::clamp<int64_t>(side.features - from, 0, side.R);
        copy_run(row + from, valid, out);
        std::fill(out + valid, out + width, T{});
      }
  }
}

}  // namespace mpoe
