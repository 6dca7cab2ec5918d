// Experts on the hidden side, on raw device pointers: o[t, g, :] = sum_k gates[t, k] act(u[t, g, :] R_e + bias_e) L_e,
// or with u_gate act(u_gate[t, g, :] R^gate_e + bias_e) * (u[t, g, :] R_e) inside; e = index[t, k]. Dense arrays;
// F = G b.
#pragma once
#include <cstddef>
#include <cstdint>

#include "common/types.h"
#include "cuda/device.cuh"

namespace mpoe::cuda {

constexpr int kLargestHiddenBlock = 64;

struct HiddenInputs {
  Dtype dtype = Dtype::kFloat32;
  bool tf32 = false;            // multiply float32 on tensor cores, rounded to tf32
  int tokens = 0, features = 0;  // T, F
  int block = 0;                // b, at most kLargestHiddenBlock
  int own = 1;                  // blocks of an expert: 1, shared by the groups, or G
  int experts = 0, top_k = 0;
  int activation = 0;           // see activation.cuh
  const void *u = nullptr, *u_gate = nullptr;  // [T, F]; u_gate null: not gated
  const float* gates = nullptr;   // [T, K]
  const int64_t* index = nullptr;  // [T, K]; outside 0..E-1: no expert
  const void *right = nullptr, *right_gate = nullptr, *left = nullptr;  // [E, own, b, b]
  const void* bias = nullptr;   // [E, F] or null
};
struct HiddenForward : HiddenInputs {
  void* out = nullptr;  // [T, F]; one launch
};
// Gradients; null: not needed. At most three launches.
struct HiddenBackward : HiddenInputs {
  const void* grad = nullptr;  // [T, F]
  void *du = nullptr, *du_gate = nullptr, *dright = nullptr, *dright_gate = nullptr, *dleft = nullptr, *dbias = nullptr;
  float* dgates = nullptr;  // [T, K]
};

// Bytes of scratch memory, aligned to 256.
std::size_t workspace_bytes(const HiddenBackward& arguments);

// Throw std::invalid_argument for blocks that are too large, and if a block of threads does not fit on the device.
void hidden_forward(const HiddenForward& arguments, cudaStream_t stream);
void hidden_backward(const HiddenBackward& arguments, void* workspace, cudaStream_t stream);

}  // namespace mpoe::cuda
