// Experts of a feed-forward network on raw device pointers, dense arrays. For a token t and each of its choices k, with
// e = index[t, k], within each of G groups:
//   out[t] = sum_k gates[t, k] act(x[t] up_e + bias_e) down_e
// or with up_gate act(x_gate[t] up_gate_e + bias_e) * (x[t] up_e) inside. Hidden-side experts (blocks b x b in every
// group of b units) and neurons (one group) are both of this form.
#pragma once
#include <cstddef>
#include <cstdint>

#include "cuda/dispatch.h"

namespace mpoe::cuda {

constexpr int kMostUnits = 512;  // hidden units of an expert in a group: they stay in shared memory

struct ExpertsInputs {
  Dtype dtype = Dtype::kFloat32;
  bool by_unit = false;  // a row of `up` is one unit's, and both its inputs are x
  int tokens = 0, experts = 0, top_k = 0, groups = 1;
  int own = 1;                              // weights of an expert: 1, shared by the groups, or one for each group
  int width = 0, units = 0, columns = 0;    // of one group: inputs, hidden units, outputs
  int activation = 0;                       // see activation.cuh
  const void *x = nullptr, *x_gate = nullptr;  // [T, G width]; x_gate is needed if up_gate is given and not by_unit
  const float* gates = nullptr;                // [T, K]
  const int64_t* index = nullptr;              // [T, K]; outside 0..E-1: no expert
  const void *up = nullptr, *up_gate = nullptr;  // [E, own, width, units]; by_unit: [E, own, units, width]
  const void* down = nullptr;                    // [E, own, units, columns]
  const void* bias = nullptr;                    // [E, G units] or null
};
struct ExpertsForward : ExpertsInputs {
  void* out = nullptr;  // [T, G columns]
};
// Gradients; null: not needed.
struct ExpertsBackward : ExpertsInputs {
  const void* grad = nullptr;  // [T, G columns]
  void *dx = nullptr, *dx_gate = nullptr, *dup = nullptr, *dup_gate = nullptr, *ddown = nullptr, *dbias = nullptr;
  float* dgates = nullptr;  // [T, K]
};

// Slots are sorted by choice and expert (one launch, or three); blocks of threads compute tiles of slots of one expert,
// and add to a token's row in the order of its choices. Backward: for as many groups at a time as the L2 cache holds,
// with a launch more for weights and for biases; then one for sums of parts. Throw std::invalid_argument for sizes that
// the kernels do not take.
void experts_forward(const ExpertsForward& arguments, const Memory& memory, cudaStream_t stream);
void experts_backward(const ExpertsBackward& arguments, const Memory& memory, cudaStream_t stream);

}  // namespace mpoe::cuda
