// o[t] = sum_k gates[t, k] h down_e, h = act(x[t] up_e^T + bias_e), e = index[t, k], and its
// gradients, on raw pointers.
//
// Slots are sorted by expert. First each expert's neurons: its rows of x are gathered into a block
// that stays in the cache and meet its packed weights; h, times the gate, is kept per slot, [T K,
// m]. Then the output, some columns at a time: expert by expert, rows of h meet those columns of
// its weights and are added to float32 sums of their tokens, all of which stay in the cache. The
// gradient of x is the same sum, of dz and up. Weight gradients are sums over an expert's rows. The
// order of every sum is fixed, whatever the number of threads. An expert with few rows reads its
// weights in place. Nothing of size T x K x I is stored.
#pragma once

#include <cstdint>

#include "common/types.h"
#include "cpu/gemm/gemm.h"

namespace mpoe {

struct NeuronExperts {
  Dtype dtype;  // kFloat32 or kBFloat16: dtype of everything except the gates
  std::int64_t tokens, in_features, out_features, neurons, experts, top_k;
  Activation activation;
  const void* x;              // [T, I]
  const float* gates;         // [T, K]
  const std::int64_t* index;  // [T, K], each in -1..E-1
  const void* up;             // [E, m, I]
  const void* down;           // [E, m, O]
  const void* bias;           // [E, m] or null
  const void* gate_up;        // [E, m, I] or null: h = act(x gate_up_e^T + bias_e) (x up_e^T)
};
void neuron_experts(const NeuronExperts& in, void* out);

// Gradients; null: not wanted.
struct NeuronExpertsGradients {
  void* dx;
  float* dgates;  // [T, K]
  void* dup;
  void* ddown;
  void* dbias;
  void* dgate_up;
};
void neuron_experts_backward(const NeuronExperts& in,
                             const void* grad,
                             const NeuronExpertsGradients& out);

// --------------------------------------------------- between neurons.cpp and its bodies

// At most 32 neurons of some rows of one expert. Tiles of floats are [rows, 32].
struct NeuronTile {
  std::int64_t rows, columns;
  const float* z;      // before the bias
  const float* value;  // x up^T of gated neurons, or null
  const float* dh;     // gradient of h before the gate's factor; backward only
  const float* gates;  // [rows]
  const void* bias;    // [columns] or null
  void* h;             // h times its gate, `h_stride` elements from row to row
  std::int64_t h_stride;
  // Backward:
  void *dz, *dvalue;  // rows `stride` elements apart; dvalue only if gated
  std::int64_t stride;
  float* dbias;   // [columns]: adds the sum of dz over the rows
  float* dgates;  // [rows]: <h, dh>
};

struct NeuronKernels {
  void (*activate)(Activation, const NeuronTile&);
  void (*turn_back)(Activation, const NeuronTile&);
  // sums[owners[r]] += row r of tile, 32 columns; sums are `stride` floats apart
  void (*add_rows)(const float* tile,
                   std::int64_t rows,
                   const std::int64_t* owners,
                   float* sums,
                   std::int64_t stride);
  // sums[owners[r]] += h[r] weights, weights [neurons, columns] read in place, `width` elements
  // from row to row
  void (*add_products)(const void* h,
                       std::int64_t h_stride,
                       std::int64_t rows,
                       const std::int64_t* owners,
                       const void* weights,
                       std::int64_t width,
                       std::int64_t neurons,
                       std::int64_t columns,
                       float* sums,
                       std::int64_t stride);
};

// Indexed by is_bfloat16.
extern const NeuronKernels kNeuronsGeneric[2];
extern const NeuronKernels kNeuronsAvx2[2];
extern const NeuronKernels kNeuronsAvx512[2];
extern const NeuronKernels kNeuronsAvx512Bf16[2];

}  // namespace mpoe
