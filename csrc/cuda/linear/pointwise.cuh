// The activation's gradient with the bias gradient, and sums of rows by token.
#pragma once
#include "cuda/activation.cuh"

namespace mpoe::cuda {

constexpr int kRowsPerBlock = 32;  // rows whose bias gradients one block sums
constexpr int kColumns = 128;      // columns of one block, one per thread

// dz = grad * slope(saved); zero in rows that no expert owns. partial[row block, column] = sum of dz's rounded rows.
// saved, dz: null for no activation; partial: null if no bias gradient is needed. Grid: (row blocks, column blocks).
template <class T>
__global__ void __launch_bounds__(kColumns)
    activation_backward_kernel(const T* grad, const T* saved, T* dz, float* partial, const int* filled, int slots,
                               int columns, int activation) {
  const int column = blockIdx.y * kColumns + threadIdx.x;
  if (column >= columns) return;
  const int first = blockIdx.x * kRowsPerBlock;
  const int end = first + kRowsPerBlock < slots ? first + kRowsPerBlock : slots;
  const int busy = *filled;
  float sum = 0.f;
  for (int row = first; row < end; ++row) {
    const int64_t at = int64_t(row) * columns + column;
    float value = 0.f;
    if (row < busy) {
      value = dev::to_float(grad[at]);
      if (saved) value *= activation_slope(activation, dev::to_float(saved[at]));
    }
    const T rounded = dev::from_float<T>(value);
    if (dz) dz[at] = rounded;
    sum += dev::to_float(rounded);
  }
  if (partial) partial[int64_t(blockIdx.x) * columns + column] = sum;
}

// out[column] = sum over rows of in[row, column], in the order of rows. Grid: column blocks.
template <class T>
__global__ void __launch_bounds__(kColumns) sum_columns_kernel(const float* in, T* out, int rows, int columns) {
  const int column = blockIdx.x * kColumns + threadIdx.x;
  if (column >= columns) return;
  float sum = 0.f;
  for (int row = 0; row < rows; ++row) sum += in[int64_t(row) * columns + column];
  out[column] = dev::from_float<T>(sum);
}

// out[t] = sum of rows[order[i]] over i in [starts[t], starts[t + 1]). Grid: (tokens, column blocks).
template <class T>
__global__ void __launch_bounds__(kColumns)
    sum_rows_kernel(const T* rows, const int64_t* order, const int64_t* starts, T* out, int columns) {
  const int column = blockIdx.y * kColumns + threadIdx.x;
  if (column >= columns) return;
  float sum = 0.f;
  for (int64_t i = starts[blockIdx.x]; i < starts[blockIdx.x + 1]; ++i) {
    sum += dev::to_float(rows[order[i] * columns + column]);
  }
  out[int64_t(blockIdx.x) * columns + column] = dev::from_float<T>(sum);
}

}  // namespace mpoe::cuda
