// Gradients of the blocks by the kernel of csrc/cuda/linear/gradient.cuh: the gradient of every expert's weight, which
// stays on chip, times right, or times left · central.
#pragma once
#include "cuda/named.h"

namespace mpoe::cuda {

struct GradientProduct {
  Dtype dtype = Dtype::kFloat32;
  Dims dims;  // without padded features
  bool tf32 = false;
  bool of_right = false;      // the gradient of right, from left · central; else that of left · central, from right
  int tile[4] = {1, 1, 1, 1};  // indices of iL, jL, iR, jR in a tile; each divides its axis
  const void* x = nullptr;    // [T, I]
  const void* dz = nullptr;   // [N, F]
  const void* other = nullptr;  // [E, b, iR, jR], or [E, iL, jL, iC, jC, b]
  void* out = nullptr;          // [E, iL, jL, iC, jC, b], or float32 [parts, E, b, iR, jR]
  int parts = 1;
  int experts = 0;
  const int* offsets = nullptr;        // [E + 1]
  const int64_t* row_index = nullptr;  // [N] or null
};

// Throws std::invalid_argument for a tile that does not divide the axes or is too large.
void gradient_product(const GradientProduct& product, cudaStream_t stream);

}  // namespace mpoe::cuda
