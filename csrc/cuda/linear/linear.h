// The fused contraction on raw device pointers, dense arrays: experts' weights and their gradients
// stay on chip,
//   W_e[iL iC iR, jL jC jR] = sum over a, b of left[e, iL, jL, a] central[a, iC, jC, b] right[e,
//   iR, jR, b]
// Digits 0, 1, 2 of a row's columns are those of left, central and right.
#pragma once
#include <cstdint>

#include "common/types.h"
#include "cuda/device.cuh"

namespace mpoe::cuda {

struct Slots {
  Dtype dtype = Dtype::kFloat32;
  int experts = 0, slots = 0;          // E, N
  const int* offsets = nullptr;        // [E + 1] slots of every expert
  const int64_t* row_index = nullptr;  // [N] rows of x, or null: a slot's own
};
struct LinearSizes : Slots {
  int i[3] = {1, 1, 1}, j[3] = {1, 1, 1};  // digits of W's rows and columns
  int a = 1, b = 1;                        // bonds
  int in_features = 0,
      out_features = 0;  // at most the products of i and of j: what is missing is padding
};

// What follows a product.
struct Epilogue {
  const void* bias = nullptr;          // of the result's columns
  int activation = 0;                  // see activation.cuh
  void* pre_activation = nullptr;      // like the result, by slot, or null
  const int64_t* out_index = nullptr;  // [N] rows of the result; null: a slot's own
  const float* gates = nullptr;        // by row of the result, applied after rounding; null: 1
};

// out[s] = activation(x[row_index[s]] W_e + bias); transposed: rows of out_features times W_e
// transposed.
struct RebuiltProduct : LinearSizes {
  bool transposed = false;
  const void *rows = nullptr, *left = nullptr, *central = nullptr, *right = nullptr;
  void* out = nullptr;  // slots past the last offset become zero
  Epilogue epilogue = {};
};
void rebuilt_product(const RebuiltProduct& product, cudaStream_t stream);

// The gradient of W_e, x^T dz, times right: out = that of half = left central [E, iL, jL, iC, jC,
// b]; or of_right, times half: out = that of right, in float32 and in `parts` to be added up
// [parts, E, iR, jR, b].
struct GradientProduct : LinearSizes {
  bool of_right = false;
  const void *x = nullptr, *dz = nullptr, *other = nullptr;
  void* out = nullptr;
  int parts = 1;
};
void gradient_product(const GradientProduct& product, cudaStream_t stream);

}  // namespace mpoe::cuda
