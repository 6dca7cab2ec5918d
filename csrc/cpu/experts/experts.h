// Experts between two products, on raw pointers, and their gradients, in two forms:
//   hidden-side experts  o[t, g, :] = sum_k gates[t, k] act(x[t, g, :] R_e + bias_e) L_e
//   experts' own neurons o[t]       = sum_k gates[t, k] act(x[t] R_e^T + bias_e) L_e
// with e = index[t, k]. Gated experts have act(x_gate R^gate_e + bias_e) (x R_e) in place of act(..);
// neurons read x for both. The order of every sum is fixed, whatever the number of threads, and
// nothing of size T x K x (features) is stored. hidden.cpp and neurons.cpp tell how.
#pragma once

#include <cstdint>

#include "common/types.h"
#include "cpu/gemm/gemm.h"

namespace mpoe {

struct Experts {
  Dtype dtype;  // kFloat32 or kBFloat16: dtype of everything except the gates
  Activation activation;
  int64_t tokens, experts, top_k;
  const void* x;
  const float* gates;    // [T, K]
  const int64_t* index;  // [T, K], each in -1..E-1
  const void* right;
  const void* left;
  const void* bias;  // or null
  // Of gated experts, else null.
  const void* x_gate;
  const void* right_gate;

  bool gated() const { return right_gate != nullptr; }
};

struct HiddenExperts : Experts {
  // x, x_gate [T, F]; right, left, right_gate [E, own_groups, b, b]; bias [E, F].
  int64_t features, block, own_groups;  // own_groups: features / block, or 1: shared

  int64_t groups() const { return features / block; }
  bool shared() const { return own_groups == 1; }
};

struct NeuronExperts : Experts {
  // x [T, I]; right (up) and right_gate [E, m, I]; left (down) [E, m, O]; bias [E, m].
  int64_t in_features, out_features, neurons;
};

// As the inputs; null: not wanted.
struct ExpertsGradients {
  void* dx;
  float* dgates;
  void* dright;
  void* dleft;
  void* dbias;
  void* dx_gate;
  void* dright_gate;
};

// out [T, F]; it may be in.x: a row is written when it is read for the last time.
void experts_forward(const HiddenExperts& in, void* out);
void experts_backward(const HiddenExperts& in, const void* grad, const ExpertsGradients& out);

// out [T, O]
void experts_forward(const NeuronExperts& in, void* out);
void experts_backward(const NeuronExperts& in, const void* grad, const ExpertsGradients& out);

}  // namespace mpoe
