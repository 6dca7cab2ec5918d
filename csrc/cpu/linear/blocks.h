// Shared by the strategies that work on the sides (L, C, R) of the weight: positions of columns,
// reordering of rows, and the products of gemm.h over whole operands.
#pragma once

#include "cpu/linear/common.h"

namespace mpoe {

// One side of the weight, its rows or its columns, whose numbers have three digits: (l, c, r), of
// the left, the central and the right block.
struct Side {
  int64_t L, C, R;   // how many of each
  int64_t features;  // true size, <= L C R

  // The number with these digits.
  int64_t offset(int64_t l, int64_t c, int64_t r) const { return (l * C + c) * R + r; }
};

inline Side in_side(const BlockDims& d) {
  return {d.iL, d.iC, d.iR, d.in_features};
}
inline Side out_side(const BlockDims& d) {
  return {d.jL, d.jC, d.jR, d.out_features};
}

// Where the 32 columns of a panel are in a row of `side`. Granules run as (c in `central`, l in
// `left`, r in granules), four to a panel; columns past the true size do not exist.
inline ColumnMap side_columns(const Side& side, Span central, Span left, int64_t panel) {
  const int64_t right_granules = ceil_divide(side.R, kGranule);
  ColumnMap map{};
  for (int64_t g = 0; g < kGranules; ++g) {
    const int64_t granule = panel * kGranules + g;
    const int64_t l = left.first + granule / right_granules % left.size();
    const int64_t c = central.first + granule / right_granules / left.size();
    const int64_t r = granule % right_granules * kGranule;
    if (c >= central.last)
      continue;
    const int64_t offset = side.offset(l, c, r);
    map.offset[g] = offset;
    map.valid[g] = static_cast<int32_t>(
        std::clamp<int64_t>(std::min(side.R - r, side.features - offset), 0, kGranule));
  }
  return map;
}
// Of all l.
inline ColumnMap side_columns(const Side& side, Span central, int64_t panel) {
  return side_columns(side, central, {0, side.L}, panel);
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
      multiply_rows_any_length(gemm,
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
// operand, in which `inner` is contracted next. A granule of units is a unit of inner by eight
// columns; granules run as (inner in units, columns in granules), as many to a panel as fit. For
// example, 3 of inner and 16 columns with units of two elements, two granules to a panel:
//
//   granule           0       1      2       3
//   inner           0, 1    0, 1     2       2
//   columns          0-7    8-15    0-7    8-15
//   of B's panel      0       0      1       1
//
// A panel has the first elements of all its units, then the second ones (gemm.h, store_units): here
// the first is (0, columns 0-15) and (1, columns 0-15), and the second's columns 16-31 are zero.
struct UnitColumns {
  int64_t per_panel;  // granules of units
  int64_t panels;
  std::vector<ColumnMap> panel_columns;  // per panel: where its columns are in a row of B
  // Per granule of units, up to whole panels:
  std::vector<int32_t> column_granule;  // which of the columns'
  std::vector<int32_t> unit_offset;     // of its unit of inner, in units of the packed operand

  // Element (inner, column) of a row of B is at inner * inner_stride + column.
  UnitColumns(int64_t unit, int64_t inner, int64_t inner_stride, int64_t columns)
      : per_panel(kGranules / unit) {
    const int64_t column_granules = ceil_divide(columns, kGranule);
    const int64_t count = ceil_divide(inner, unit) * column_granules;
    panels = ceil_divide(count, per_panel);
    for (int64_t p = 0; p < panels; ++p) {
      ColumnMap map{};
      for (int64_t s = 0; s < per_panel; ++s) {
        // Past the end: the last one again
        const int64_t granule = std::min(p * per_panel + s, count - 1);
        const int64_t first = granule / column_granules * unit;
        const int64_t column = granule % column_granules * kGranule;
        column_granule.push_back(static_cast<int32_t>(granule % column_granules));
        unit_offset.push_back(static_cast<int32_t>(granule / column_granules * kPanel));
        for (int64_t i = 0; i < unit && first + i < inner; ++i) {
          map.offset[i * per_panel + s] = (first + i) * inner_stride + column;
          map.valid[i * per_panel + s] = static_cast<int32_t>(std::min(kGranule, columns - column));
        }
      }
      panel_columns.push_back(map);
    }
  }

  // Panels of a B of k rows.
  template <class T>
  void pack(const GemmKernels& gemm, const T* b, int64_t stride, int64_t k, T* to) const {
    for (int64_t p = 0; p < panels; ++p)
      gemm.pack_granules(to + p * padded_k(gemm, k) * kPanel, b, stride, k, panel_columns[p]);
  }
  // Stores a tile of products with the panel of `column`. row_unit [rows, granules of columns]:
  // where the units of each begin in the packed operand, at `out`.
  template <class T>
  void store(const GemmKernels& gemm,
             const float* tile,
             int64_t rows,
             int64_t column,
             T* out,
             const int32_t* row_unit,
             int64_t column_granules) const {
    const int64_t granule = column / kPanel * per_panel;
    gemm.store_units(tile,
                     rows,
                     out,
                     row_unit,
                     column_granules,
                     column_granule.data() + granule,
                     unit_offset.data() + granule);
  }
};

// Copies a run of elements, usually a few granules: too short for a memcpy call each.
template <class T>
inline void copy_run(const T* from, int64_t count, T* to) {
  int64_t k = 0;
  for (; k + kGranule <= count; k += kGranule)
    std::memcpy(to + k, from + k, kGranule * sizeof(T));
  for (; k < count; ++k)
    to[k] = from[k];
}

// rows[t, (c, l, r)] for c in `central`, r up to whole units, from the rows of `source(t)` in the
// order of `side`; zero where there is none.
template <class T, class Source>
void arrange_rows(const Side& side,
                  int64_t unit,
                  Span central,
                  int64_t count,
                  const Source& source,
                  T* rows,
                  int64_t stride) {
  const int64_t width = round_up(side.R, unit);
  for (int64_t t = 0; t < count; ++t) {
    const T* row = source(t);
    T* out = rows + t * stride;
    for (int64_t c = central.first; c < central.last; ++c)
      for (int64_t l = 0; l < side.L; ++l) {
        const int64_t from = side.offset(l, c, 0);
        const int64_t valid = std::clamp<int64_t>(side.features - from, 0, side.R);
        copy_run(row + from, valid, out);
        std::fill(out + valid, out + width, T{});
        out += width;
      }
  }
}

}  // namespace mpoe
