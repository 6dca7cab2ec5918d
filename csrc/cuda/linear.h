// Grouped MPO linear on raw device pointers: y[s] = activation(x[row_index[s]] W_e + bias) for the slots s of expert e.
// Dense arrays of `dtype` (float32, bfloat16, float16), every product summed in float32. The same bits on every run.
#pragma once
#include <cstdint>
#include <string>

#include "common/types.h"
#include "cuda/activation.cuh"
#include "cuda/named.h"

namespace mpoe::cuda {

// How to contract: "LC W | W" builds LC, then W, and x meets W; "| L C R" builds nothing. See planner/orders.py: program().
// "panel 4 1 24 LC W | W": W lives in shared memory only, so many of its columns in a block (csrc/cuda/panel.h); in a
// backward this holds for dx. "few 1 2 8 4 | L C R": a forward in one launch (csrc/cuda/few.h).
struct LinearInputs {
  Dtype dtype = Dtype::kFloat32;
  Dims dims;
  const char* program = "";
  bool tf32 = false;             // multiply float32 as tf32
  const void* x = nullptr;       // [T, I]
  const void* left = nullptr;    // [E, iL, jL, a]
  const void* central = nullptr;  // [a, iC, jC, b]
  const void* right = nullptr;   // [E, b, iR, jR]
  int experts = 0;               // E
  const int* offsets = nullptr;  // [E + 1]
  const int64_t* row_index = nullptr;  // [N]; null: slot s reads row s
  int slots = 0;                       // N
  int activation = kNone;
};

struct LinearForward : LinearInputs {
  const void* bias = nullptr;  // [F] or null
  void* y = nullptr;           // [N, F]; slots past the last offset become zero
  void* h = nullptr;           // [N * jC, b] what the central step of a separable shape gives, or null
  void* saved = nullptr;       // [N, F] pre-activation, or null
};

struct LinearBackward : LinearInputs {
  const void* grad = nullptr;   // [N, F]
  const void* h = nullptr;      // of the forward, or null
  const void* saved = nullptr;  // output for relu, pre-activation for the rest, null for none
  // Results; null where not needed.
  void* dx = nullptr;        // [N, I] by slot; sum_rows() adds up what belongs to one token
  void* dleft = nullptr;     // as left
  void* dcentral = nullptr;  // as central
  void* dright = nullptr;    // as right
  void* dbias = nullptr;     // [F]
};

// Bytes of scratch memory, aligned to 256, that a call needs; temporary weights are at most those of two experts.
std::size_t workspace_bytes(const LinearForward& arguments);
std::size_t workspace_bytes(const LinearBackward& arguments);

// Throw std::invalid_argument for a program that does not fit the shape, std::runtime_error for a failed launch.
void linear_forward(const LinearForward& arguments, void* workspace, cudaStream_t stream);
void linear_backward(const LinearBackward& arguments, void* workspace, cudaStream_t stream);

}  // namespace mpoe::cuda
