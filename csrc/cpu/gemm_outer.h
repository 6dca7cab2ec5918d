// Products A^T B summed over rows of both: gradients of weights. A [rows, m] and B [rows, n] are packed, some rows at a
// time, into panels whose inner axis is the rows; sums are float32.
#pragma once

#include <algorithm>

#include "cpu/linear_common.h"

namespace mpoe {

// sum[i][j] = (accumulate: +) sum_r A(r, i) B(r, j) for i < m and the columns j of the panels `columns` of B.
// `sum` has rows `stride` floats apart and whole panels of columns.
inline void multiply_outer(
    const GemmKernels& gemm, std::int64_t units, std::int64_t m, const void* a_panels, Span columns,
    const void* b_panels, float* sum, std::int64_t stride, bool accumulate) {
  const std::int64_t panel_bytes = units * kPanel * 4;
  // Panels of A that stay in the second-level cache while those of B pass.
  const std::int64_t group = std::max<std::int64_t>(1, 512 * 1024 / panel_bytes) * kPanel;
  for (std::int64_t start = 0; start < m; start += group)
    for (std::int64_t p = columns.first; p < columns.last; ++p)
      for (std::int64_t i = start; i < std::min(m, start + group); i += kPanel) {
        const char* a = static_cast<const char*>(a_panels) + i / kPanel * panel_bytes;
        for_each_tile(std::min(kPanel, m - i), gemm.best_rows, [&](std::int64_t first, std::int64_t rows) {
          multiply_columns(
              gemm, rows, units, a + first * 4, static_cast<const char*>(b_panels) + p * panel_bytes,
              sum + (i + first) * stride + p * kPanel, stride, accumulate);
        });
      }
}

// Small products A^T B by one thread, with its scratch memory.
template <class T>
class OuterSum {
 public:
  OuterSum(const GemmKernels& gemm, std::int64_t m, std::int64_t n)
      : gemm_(gemm), m_(m), n_(n), stride_(round_up(n, kPanel)),
        most_units_(std::clamp<std::int64_t>(512 * 1024 / (4 * (m + n)), 64, 1024)),
        a_(most_units_ * gemm.unit * round_up(m, kPanel)), b_(most_units_ * gemm.unit * stride_) {}

  // Floats from row to row of a sum.
  std::int64_t stride() const { return stride_; }

  // sum [m, stride] (+)= the product over `rows` rows of a [rows, m] and b [rows, n].
  void operator()(
      std::int64_t rows, const T* a, std::int64_t a_stride, const T* b, std::int64_t b_stride, float* sum,
      bool accumulate) {
    const std::int64_t most = most_units_ * gemm_.unit;
    for (std::int64_t first = 0; first < rows; first += most) {
      const std::int64_t count = std::min(most, rows - first), units = ceil_divide(count, gemm_.unit);
      gemm_.pack(a_.get(), units, a + first * a_stride, a_stride, count, m_);
      gemm_.pack(b_.get(), units, b + first * b_stride, b_stride, count, n_);
      multiply_outer(
          gemm_, units, m_, a_.get(), {0, stride_ / kPanel}, b_.get(), sum, stride_, accumulate || first > 0);
    }
  }

 private:
  const GemmKernels& gemm_;
  const std::int64_t m_, n_, stride_, most_units_;
  Buffer<T> a_, b_;
};

// The same, rounded once.
template <class T>
class OuterProduct {
 public:
  OuterProduct(const GemmKernels& gemm, std::int64_t m, std::int64_t n)
      : gemm_(gemm), m_(m), n_(n), product_(gemm, m, n), sum_(m * product_.stride()) {}

  // out [m, n]
  void operator()(
      std::int64_t rows, const T* a, std::int64_t a_stride, const T* b, std::int64_t b_stride, T* out) {
    product_(rows, a, a_stride, b, b_stride, sum_.get(), false);
    for (std::int64_t i = 0; i < m_; ++i) gemm_.round_row(sum_.get() + i * product_.stride(), out + i * n_, n_);
  }

 private:
  const GemmKernels& gemm_;
  const std::int64_t m_, n_;
  OuterSum<T> product_;
  Buffer<float> sum_;
};

}  // namespace mpoe
