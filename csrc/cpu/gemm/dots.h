// Products with the transpose of a matrix that is read in place, for rows too few to repay packing
// it.
#pragma once

#include "cpu/gemm/gemm.h"
#include "cpu/gemm/vector.h"

namespace mpoe {
namespace {

// Sums of a tile, and the vectors of one step, must fit the registers.
constexpr int kDotRows = kWidth == 16 ? 4 : 2, kDotColumns = 4;
constexpr int64_t kLongestDot = 384;  // vectors summed before their lanes are

// sum[r][c] += one step of a unit (vector.h) of rows `a` times rows `b`
template <class T, int step, int rows, int columns>
inline void dot_step(
    Floats (&sum)[rows][columns], const T* a, int64_t a_stride, const T* b, int64_t b_stride) {
  using Product = UnitProduct<T>;
  typename Product::Operand left[rows];
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r)
    left[r] = Product::template load<step>(reinterpret_cast<const char*>(a + r * a_stride));
#pragma GCC unroll 4
  for (int c = 0; c < columns; ++c) {
    auto right = Product::template load<step>(reinterpret_cast<const char*>(b + c * b_stride));
    if constexpr (rows > 1)
      keep(right);
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r)
      sum[r][c] = Product::multiply(sum[r][c], left[r], right);
  }
}

// Not inlined: tests/native/test_hot_loops.py finds it.
template <class T, int rows, int columns>
[[gnu::noinline]] void dot_tile(int64_t k,
                                const T* a,
                                int64_t a_stride,
                                const T* b,
                                int64_t b_stride,
                                float* out,
                                int64_t out_stride,
                                bool accumulate) {
  constexpr int64_t kVector = kWidth * 4 / sizeof(T);
  Floats sum[rows][columns] = {};
  const auto add = [&sum](
                       const T* left, int64_t left_stride, const T* right, int64_t right_stride) {
    dot_step<T, 0>(sum, left, left_stride, right, right_stride);
    if constexpr (UnitProduct<T>::kSteps == 2)
      dot_step<T, 1>(sum, left, left_stride, right, right_stride);
  };
  int64_t i = 0;
#pragma GCC unroll 1
  for (; i + kVector <= k; i += kVector)
    add(a + i, a_stride, b + i, b_stride);
  if (i < k) {
    alignas(64) T tail[rows + columns][kVector] = {};
    for (int r = 0; r < rows; ++r)
      std::memcpy(tail[r], a + r * a_stride + i, (k - i) * sizeof(T));
    for (int c = 0; c < columns; ++c)
      std::memcpy(tail[rows + c], b + c * b_stride + i, (k - i) * sizeof(T));
    add(tail[0], kVector, tail[rows], kVector);
  }
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < columns; ++c) {
      const float total = sum_of(sum[r][c]);
      out[r * out_stride + c] = accumulate ? out[r * out_stride + c] + total : total;
    }
}

template <class T, int columns>
void dot_rows(int64_t rows,
              int64_t k,
              const T* a,
              int64_t a_stride,
              const T* b,
              int64_t b_stride,
              float* out,
              int64_t out_stride) {
  constexpr int64_t kLongest = kLongestDot * kWidth * 4 / sizeof(T);
  for (int64_t first = 0; first < k; first += kLongest) {
    const int64_t length = k - first < kLongest ? k - first : kLongest;
    for (int64_t r = 0; r < rows;) {
      const bool whole = r + kDotRows <= rows;
      const auto tile = whole ? dot_tile<T, kDotRows, columns> : dot_tile<T, 1, columns>;
      tile(length,
           a + r * a_stride + first,
           a_stride,
           b + first,
           b_stride,
           out + r * out_stride,
           out_stride,
           first > 0);
      r += whole ? kDotRows : 1;
    }
  }
}

template <class T>
void multiply_dots(int64_t rows,
                   int64_t columns,
                   int64_t k,
                   const void* a,
                   int64_t a_stride,
                   const void* b,
                   int64_t b_stride,
                   float* out,
                   int64_t out_stride) {
  const T *left = static_cast<const T*>(a), *right = static_cast<const T*>(b);
  int64_t c = 0;
  for (; c + kDotColumns <= columns; c += kDotColumns)
    dot_rows<T, kDotColumns>(
        rows, k, left, a_stride, right + c * b_stride, b_stride, out + c, out_stride);
  for (; c < columns; ++c)
    dot_rows<T, 1>(rows, k, left, a_stride, right + c * b_stride, b_stride, out + c, out_stride);
}

}  // namespace
}  // namespace mpoe
