// Products A^T B, summed over the rows of both: weight gradients. A batch of rows at a time, A is
// transposed and B is packed into panels; the rows are the inner axis. Sums are float32.
#pragma once

#include <algorithm>

#include "common/buffer.h"
#include "common/parallel.h"
#include "cpu/gemm/multiply.h"

namespace mpoe {

// out[c] = column c of `rows` rows, padded with zeros to whole units.
template <class T>
void turn_rows(const GemmKernels& gemm,
               const T* in,
               int64_t stride,
               int64_t rows,
               int64_t columns,
               T* out,
               int64_t out_stride) {
  gemm.transpose(in, stride, rows, columns, out, out_stride);
  for (int64_t k = rows; k < padded_k(gemm, rows); ++k)
    for (int64_t c = 0; c < columns; ++c)
      out[c * out_stride + k] = T{};
}

// sum[i][j] = (accumulate: +) sum_r A(r, i) B(r, j) for i < m and the columns j of the panels
// `columns` of B. `k`: rows, in whole units. `a` holds A^T with rows `a_stride` apart; `sum` has
// rows `stride` floats apart, in whole panels.
template <class T>
void multiply_outer(const GemmKernels& gemm,
                    int64_t k,
                    int64_t m,
                    const T* a,
                    int64_t a_stride,
                    Span columns,
                    const T* b_panels,
                    float* sum,
                    int64_t stride,
                    bool accumulate) {
  // Rows of A^T that stay in the L2 cache while panels of B stream past.
  const int64_t row_bytes = k * int64_t{sizeof(T)};
  const int64_t group = std::max<int64_t>(1, 512 * 1024 / row_bytes / kStripRows) * kStripRows;
  for (int64_t start = 0; start < m; start += group)
    multiply_all(gemm,
                 std::min(group, m - start),
                 k,
                 a + start * a_stride,
                 a_stride,
                 b_panels + columns.first * kPanel * k,
                 columns.size() * kPanel,
                 [&](int64_t first, int64_t rows, int64_t c, const float* tile) {
                   for (int64_t r = 0; r < rows; ++r) {
                     float* to = sum + (start + first + r) * stride + columns.first * kPanel + c;
                     const float* from = tile + r * kPanel;
                     for (int64_t i = 0; i < kPanel; ++i)
                       to[i] = accumulate ? to[i] + from[i] : from[i];
                   }
                 });
}

// out [m, n] = A^T B of few rows, rounded. A tile goes straight to its place, one row of tiles
// after the other: `out` is written nearly in memory order, and there are no sums in memory.
template <class T>
void outer_of_few(const GemmKernels& gemm,
                  int64_t rows,
                  const T* a,
                  int64_t a_stride,
                  int64_t m,
                  const T* b,
                  int64_t b_stride,
                  int64_t n,
                  T* out) {
  const int64_t units = ceil_divide(rows, gemm.unit), panel = units * gemm.unit * kPanel;
  const int64_t panels = ceil_divide(n, kPanel);
  Buffer<T> a_panels(ceil_divide(m, kPanel) * panel), b_panels(panels * panel);
  gemm.pack(a_panels.get(), units, a, a_stride, rows, m);
  gemm.pack(b_panels.get(), units, b, b_stride, rows, n);
  parallel_for(ceil_divide(m, kPanel), 1, [&](int64_t begin, int64_t end) {
    alignas(64) float tile[kMaxRows * kPanel];
    for_column_tiles(
        gemm,
        std::min(m, end * kPanel) - begin * kPanel,
        units,
        a_panels.get() + begin * panel,
        panels,
        [&](const T* columns, int64_t first, int64_t count, int64_t p) {
          multiply_columns_any_length(
              gemm, count, units, columns, b_panels.get() + p * panel, tile, kPanel, false);
          gemm.store(tile,
                     count,
                     std::min(kPanel, n - p * kPanel),
                     out + (begin * kPanel + first) * n + p * kPanel,
                     n);
        });
  });
}

// Small products A^T B on one thread, with its scratch memory.
template <class T>
class OuterSum {
 public:
  OuterSum(const GemmKernels& gemm, int64_t m, int64_t n)
      : gemm_(gemm),
        m_(m),
        n_(n),
        stride_(round_up(n, kPanel)),
        most_units_(std::clamp<int64_t>(512 * 1024 / (4 * (m + n)), 64, 1024)),
        a_stride_(row_stride(gemm, most_units_ * gemm.unit)),
        a_(m * a_stride_),
        b_(most_units_ * gemm.unit * stride_) {}

  // Row stride of a sum, in floats.
  int64_t stride() const { return stride_; }

  // sum [m, stride] (+)= the product over `rows` rows of a [rows, m] and b [rows, n].
  void operator()(int64_t rows,
                  const T* a,
                  int64_t a_stride,
                  const T* b,
                  int64_t b_stride,
                  float* sum,
                  bool accumulate) {
    const int64_t most = most_units_ * gemm_.unit;
    for (int64_t first = 0; first < rows; first += most) {
      const int64_t count = std::min(most, rows - first), k = padded_k(gemm_, count);
      turn_rows(gemm_, a + first * a_stride, a_stride, count, m_, a_.get(), a_stride_);
      gemm_.pack(b_.get(), k / gemm_.unit, b + first * b_stride, b_stride, count, n_);
      multiply_outer(gemm_,
                     k,
                     m_,
                     a_.get(),
                     a_stride_,
                     {0, stride_ / kPanel},
                     b_.get(),
                     sum,
                     stride_,
                     accumulate || first > 0);
    }
  }

 private:
  const GemmKernels& gemm_;
  const int64_t m_, n_, stride_, most_units_, a_stride_;
  Buffer<T> a_, b_;
};

}  // namespace mpoe
