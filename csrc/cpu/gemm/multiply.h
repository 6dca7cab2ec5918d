// Products of any number of rows, units and columns, by the kernels of gemm.h.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/gemm/gemm.h"

namespace mpoe {

// k padded to whole units.
inline int64_t padded_k(const GemmKernels& gemm, int64_t k) {
  return round_up(k, gemm.unit);
}

// Sums are nested three deep, which rounds less than one long sum: its error grows with the square
// root of its length, theirs with that of the three lengths added up. The innermost have
// gemm.longest_sum units of k, the next this many of those.
constexpr int64_t kSumsOfSums = 8;

// tile [rows, columns] (accumulate: +)= the sum of pieces of `units`, at least 1, each computed by
// piece(first, count, tile, stride, accumulate).
template <int64_t most_rows = kMaxRows, class F>
inline void sum_of_sums(const GemmKernels& gemm,
                        int64_t rows,
                        int64_t columns,
                        int64_t units,
                        float* tile,
                        int64_t tile_stride,
                        bool accumulate,
                        const F& piece) {
  const int64_t longest = gemm.longest_sum;
  for_each_tile(units, longest * kSumsOfSums, [&](int64_t first, int64_t count) {
    const bool adds = accumulate || first > 0;
    if (!adds || count <= longest) {
      for_each_tile(count, longest, [&](int64_t start, int64_t length) {
        piece(first + start, length, tile, tile_stride, adds || start > 0);
      });
      return;
    }
    alignas(64) float part[most_rows * kPanel];
    for_each_tile(count, longest, [&](int64_t start, int64_t length) {
      piece(first + start, length, part, kPanel, start > 0);
    });
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < columns; ++c)
        tile[r * tile_stride + c] += part[r * kPanel + c];
  });
}

// Rows that a piece of a panel is multiplied with before the next piece is: their sums stay in
// cache.
constexpr int64_t kStripRows = 112;

// gemm.multiply_rows for any positive number of units and at most kStripRows rows of A, which are
// `stride` elements apart, a multiple of gemm.unit. The tile's rows are kPanel apart; if half a
// panel holds `columns`, the other half of the tile is unspecified.
template <class T>
inline void multiply_rows_any_length(const GemmKernels& gemm,
                                     int64_t rows,
                                     int64_t units,
                                     const T* a,
                                     int64_t stride,
                                     const T* panel,
                                     float* tile,
                                     bool accumulate,
                                     int64_t columns = kPanel) {
  constexpr int64_t kHalf = kPanel / 2;
  const bool half = columns <= kHalf;
  const auto multiply = half ? gemm.multiply_half_panel : gemm.multiply_rows;
  sum_of_sums<kStripRows>(
      gemm,
      rows,
      half ? kHalf : kPanel,
      units,
      tile,
      kPanel,
      accumulate,
      [&](int64_t first, int64_t count, float* sum, int64_t sum_stride, bool adds) {
        multiply(rows,
                 count,
                 a + first * gemm.unit,
                 stride / gemm.unit,
                 panel + first * kPanel * gemm.unit,
                 sum,
                 sum_stride,
                 adds);
      });
}

// gemm.multiply_columns for any positive number of units.
template <class T>
inline void multiply_columns_any_length(const GemmKernels& gemm,
                                        int64_t rows,
                                        int64_t units,
                                        const T* a,
                                        const T* panel,
                                        float* tile,
                                        int64_t tile_stride,
                                        bool accumulate) {
  sum_of_sums(gemm,
              rows,
              kPanel,
              units,
              tile,
              tile_stride,
              accumulate,
              [&](int64_t first, int64_t count, float* sum, int64_t sum_stride, bool adds) {
                const int64_t offset = first * kPanel * gemm.unit;
                gemm.multiply_columns(
                    rows, count, a + offset, panel + offset, sum, sum_stride, adds);
              });
}

// Calls f(first_row, rows, first_column, tile) for every tile of A's `count` rows times the panels
// that hold `columns`. k is in whole units, and so is `stride`, the elements from one row of A to
// the next. A piece of a panel, as long as an innermost sum, is multiplied with a strip of rows
// before the next piece is: it is read anew from cache for each of their tiles, and the rows are
// read once. Columns of the last tile past `columns` are unspecified.
template <class T, class F>
void multiply_all(const GemmKernels& gemm,
                  int64_t count,
                  int64_t k,
                  const T* a,
                  int64_t stride,
                  const T* panels,
                  int64_t columns,
                  const F& f) {
  alignas(64) float sums[kStripRows * kPanel];
  const int64_t units = k / gemm.unit;
  for (int64_t c = 0; c < columns; c += kPanel)
    for_each_tile(count, kStripRows, [&](int64_t strip, int64_t strip_rows) {
      multiply_rows_any_length(gemm,
                               strip_rows,
                               units,
                               a + strip * stride,
                               stride,
                               panels + c * k,
                               sums,
                               false,
                               columns - c);
      for_each_tile(strip_rows, gemm.best_rows, [&](int64_t row, int64_t rows) {
        f(strip + row, rows, c, sums + row * kPanel);
      });
    });
}

// Calls f(columns, first, count, p) for every tile of A's rows, which are columns of panels, and
// every panel p of B.
template <class T, class F>
void for_column_tiles(
    const GemmKernels& gemm, int64_t rows, int64_t units, const T* a, int64_t panels, const F& f) {
  for (int64_t q = 0; q * kPanel < rows; ++q)
    for_each_tile(
        std::min(kPanel, rows - q * kPanel), gemm.best_rows, [&](int64_t first, int64_t tile_rows) {
          const T* columns = a + (q * units * kPanel + first) * gemm.unit;
          for (int64_t p = 0; p < panels; ++p)
            f(columns, q * kPanel + first, tile_rows, p);
        });
}

// sums (accumulate: +)= A B of panels; element (r, c) of a panel's sums is at r * stride + c, and
// those of the next one start `panel_step` later.
template <class T>
void add_column_products(const GemmKernels& gemm,
                         int64_t rows,
                         int64_t units,
                         const T* a,
                         const T* b,
                         int64_t panels,
                         float* sums,
                         int64_t stride,
                         int64_t panel_step,
                         bool accumulate) {
  for_column_tiles(
      gemm, rows, units, a, panels, [&](const T* columns, int64_t first, int64_t count, int64_t p) {
        multiply_columns_any_length(gemm,
                                    count,
                                    units,
                                    columns,
                                    b + p * units * kPanel * gemm.unit,
                                    sums + p * panel_step + first * stride,
                                    stride,
                                    accumulate);
      });
}

}  // namespace mpoe
