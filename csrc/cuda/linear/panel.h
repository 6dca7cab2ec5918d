// Grouped product by the kernel of csrc/cuda/linear/panel.cuh: out[s] = activation(rows[row_index[s]] W_e + bias), or
// with W_e transposed. Needs no scratch memory.
#pragma once
#include <cstddef>

#include "cuda/named.h"

namespace mpoe::cuda {

// What one block holds: this many indices of the left, central and right block on the side of the result (j, or i if
// transposed). Each divides its axis.
struct PanelShape {
  int left = 1, centre = 1, right = 1;
  bool left_first = true;  // left is contracted with central before right is
};

struct PanelProduct {
  Dtype dtype = Dtype::kFloat32;
  Dims dims;
  bool tf32 = false;
  bool transposed = false;
  PanelShape shape;
  const void* rows = nullptr;  // [T, I]; transposed: [N, F]
  const void* left = nullptr;
  const void* central = nullptr;
  const void* right = nullptr;
  int experts = 0;
  const int* offsets = nullptr;        // [E + 1]
  const int64_t* row_index = nullptr;  // [N] or null
  int slots = 0;                       // N
  void* out = nullptr;                 // [N, F]; transposed: [N, I]; slots past the last offset become zero
  Epilogue epilogue;
};

// Bytes of shared memory of one block. Throws std::invalid_argument for a shape that does not divide the axes.
std::size_t panel_bytes(const PanelProduct& product);

// Throws std::invalid_argument if the panel does not fit into the device's shared memory.
void panel_product(const PanelProduct& product, cudaStream_t stream);

}  // namespace mpoe::cuda
