// Launches of csrc/cuda/linear/pointwise.cuh.
#pragma once
#include <cstdint>

#include "common/types.h"
#include "cuda/device.cuh"

namespace mpoe::cuda {

// Number of floats in which activation_backward() keeps its partial sums.
int64_t partial_elements(int slots, int columns);

// See activation_backward_kernel. `dz` null: the activation is none, only the bias gradient is computed.
void activation_backward(Dtype dtype, const void* grad, const void* saved, void* dz, void* dbias, float* partial,
                         const int* filled, int slots, int columns, int activation, cudaStream_t stream);

// rows [N, columns], order [N] slots sorted by token (stable), starts [T + 1], out [T, columns].
void sum_rows(Dtype dtype, const void* rows, const int64_t* order, const int64_t* starts, void* out, int tokens,
              int columns, cudaStream_t stream);

}  // namespace mpoe::cuda
