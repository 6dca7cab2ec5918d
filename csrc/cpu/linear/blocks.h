// Shared by the strategies that work on the sides (L, C, R) of the weight: positions of columns,
// reordering of rows, and the products of gemm.h over whole operands.
#pragma once

#include "cpu/linear/common.h"

namespace mpoe {

// One side of the weight.
struct Side {
  std::int64_t L, C, R;
  std::int64_t features;  // true size, <= L C R

  std::int64_t offset(std::int64_t l, std::int64_t c, std::int64_t r) const {
    return (l * C + c) * R + r;
  }
};

inline Side in_side(const BlockDims& d) {
  return {d.iL, d.iC, d.iR, d.in_features};
}
inline Side out_side(const BlockDims& d) {
  return {d.jL, d.jC, d.jR, d.out_features};
}

// Where the 32 columns of a panel are in a row of `side`. The panel's granules run as (C in `c`, L
// in `l`, R in granules); columns past the true size do not exist.
inline ColumnMap side_columns(const Side& side, Span c_range, Span l_range, std::int64_t panel) {
  const std::int64_t granules = ceil_divide(side.R, kGranule),
                     height = l_range.last - l_range.first;
  ColumnMap map{};
  for (std::int64_t g = 0; g < kPanel / kGranule; ++g) {
    const std::int64_t q = panel * (kPanel / kGranule) + g;
    const std::int64_t c = c_range.first + q / (height * granules),
                       l = l_range.first + q / granules % height;
    if (c >= c_range.last)
      continue;
    const std::int64_t r = q % granules * kGranule, offset = side.offset(l, c, r);
    map.offset[g] = offset;
    map.valid[g] = static_cast<std::int32_t>(
        std::clamp<std::int64_t>(std::min(side.R - r, side.features - offset), 0, kGranule));
  }
  return map;
}
inline ColumnMap side_columns(const Side& side, Span c, std::int64_t panel) {
  return side_columns(side, c, {0, side.L}, panel);
}

// sums[p][row][32] (+)= A B for every panel p of B; A's rows are read in place.
template <class T>
void rows_times_panels(const GemmKernels& gemm,
                       std::int64_t rows,
                       std::int64_t units,
                       const T* a,
                       std::int64_t stride,
                       const T* panels,
                       std::int64_t panel_units,
                       std::int64_t count,
                       float* sums,
                       std::int64_t sum_rows,
                       bool accumulate) {
  for_each_tile(rows, kStripRows, [&](std::int64_t first, std::int64_t strip_rows) {
    for (std::int64_t p = 0; p < count; ++p)
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
  std::int64_t per_panel;  // granules of units
  std::int64_t panels;
  std::vector<ColumnMap> map;             // per panel: where its columns are in a row of B
  std::vector<std::int32_t> which;        // per granule of units: granule of the column
  std::vector<std::int32_t> unit_offset;  // per granule of units: offset of the inner index

  // Element (inner, column) of a row of B is at inner * inner_stride + column.
  UnitColumns(std::int64_t unit,
              std::int64_t inner,
              std::int64_t inner_stride,
              std::int64_t columns)
      : per_panel(kPanel / kGranule / unit) {
    const std::int64_t granules = ceil_divide(columns, kGranule),
                       count = ceil_divide(inner, unit) * granules;
    panels = ceil_divide(count, per_panel);
    for (std::int64_t p = 0; p < panels; ++p) {
      ColumnMap columns_of_panel{};
      for (std::int64_t s = 0; s < per_panel; ++s) {
        // Past the end: the last one again
        const std::int64_t q = std::min(p * per_panel + s, count - 1);
        const std::int64_t first = q / granules * unit, column = q % granules * kGranule;
        which.push_back(static_cast<std::int32_t>(q % granules));
        unit_offset.push_back(static_cast<std::int32_t>(q / granules * kPanel));
        for (std::int64_t i = 0; i < unit && first + i < inner; ++i) {
          columns_of_panel.offset[i * per_panel + s] = (first + i) * inner_stride + column;
          columns_of_panel.valid[i * per_panel + s] =
              static_cast<std::int32_t>(std::min(kGranule, columns - column));
        }
      }
      map.push_back(columns_of_panel);
    }
  }
};

// Copies a run of elements, usually a few granules: too short for a memcpy call each.
template <class T>
inline void copy_run(const T* from, std::int64_t count, T* to) {
  for (; count >= kGranule; count -= kGranule, from += kGranule, to += kGranule)
    std::memcpy(to, from, kGranule * sizeof(T));
  for (std::int64_t k = 0; k < count; ++k)
    to[k] = from[k];
}

// rows[t, (kC kL kR)] for a block of kC from the rows of `source(t)`, zero where padded.
template <class T, class Source>
void arrange_rows(const Side& side,
                  std::int64_t unit,
                  Span range,
                  std::int64_t count,
                  const Source& source,
                  T* rows,
                  std::int64_t stride) {
  const std::int64_t width = round_up(side.R, unit);
  for (std::int64_t t = 0; t < count; ++t) {
    const T* row = source(t);
    T* out = rows + t * stride;
    for (std::int64_t c = range.first; c < range.last; ++c)
      for (std::int64_t l = 0; l < side.L; ++l, out += width) {
        const std::int64_t from = side.offset(l, c, 0);
        const std::int64_t valid = std::clamp<std::int64_t>(side.features - from, 0, side.R);
        copy_run(row + from, valid, out);
        std::fill(out + valid, out + width, T{});
      }
  }
}

}  // namespace mpoe
