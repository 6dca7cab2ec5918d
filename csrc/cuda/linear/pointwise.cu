#include "cuda/linear/pointwise.h"

#include "cuda/linear/contract.h"
#include "cuda/dispatch.h"
#include "cuda/linear/pointwise.cuh"

namespace mpoe::cuda {
namespace {

unsigned blocks_of(int64_t extent, int block) { return static_cast<unsigned>((extent + block - 1) / block); }

}  // namespace

int64_t partial_elements(int slots, int columns) { return int64_t(blocks_of(slots, kRowsPerBlock)) * columns; }

void activation_backward(Dtype dtype, const void* grad, const void* saved, void* dz, void* dbias, float* partial,
                         const int* filled, int slots, int columns, int activation, cudaStream_t stream) {
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    const unsigned row_blocks = blocks_of(slots, kRowsPerBlock), column_blocks = blocks_of(columns, kColumns);
    if (row_blocks > 0) {
      LAUNCH(activation_backward_kernel<T>, dim3(row_blocks, column_blocks), dim3(kColumns), 0, stream,
             static_cast<const T*>(grad), dz ? static_cast<const T*>(saved) : nullptr, static_cast<T*>(dz),
             dbias ? partial : nullptr, filled, slots, columns, activation);
      check_launch("activation_backward");
    }
    if (dbias) {
      LAUNCH(sum_columns_kernel<T>, dim3(column_blocks), dim3(kColumns), 0, stream,
             static_cast<const float*>(partial), static_cast<T*>(dbias), static_cast<int>(row_blocks), columns);
      check_launch("sum_columns");
    }
  });
}

void sum_rows(Dtype dtype, const void* rows, const int64_t* order, const int64_t* starts, void* out, int tokens,
              int columns, cudaStream_t stream) {
  if (tokens == 0) return;
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    LAUNCH(sum_rows_kernel<T>, dim3(static_cast<unsigned>(tokens), blocks_of(columns, kColumns)), dim3(kColumns), 0,
           stream, static_cast<const T*>(rows), order, starts, static_cast<T*>(out), columns);
    check_launch("sum_rows");
  });
}

}  // namespace mpoe::cuda
