// Between hidden.cpp, neurons.cpp and their bodies for each instruction set.
#pragma once

#include "cpu/experts/sorted_slots.h"

namespace mpoe {

// Some groups of hidden-side experts, for one thread.
struct HiddenPart {
  int64_t first, last;  // groups
  int64_t together;     // the most groups that are processed together
  float* scratch;
  int64_t scratch_size;
  // [E, 2 or 3 (right, left, right_gate), b, b], sums of this part; E = 1 if groups have their own.
  float* cores = nullptr;
  float* slot_gates = nullptr;  // [groups, T * K]: gradients of gates, by group; null: not wanted
};

constexpr int64_t kChunk = 64;  // maximum rows of hidden-side experts that are processed at once

// At most 32 neurons of some rows of one expert. Tiles of floats are [rows, 32].
struct NeuronTile {
  int64_t rows, columns;
  const float* z;      // before the bias
  const float* value;  // x up^T of gated neurons, or null
  const float* dh;     // gradient of h before the gate's factor; backward only
  const float* gates;  // [rows]
  const void* bias;    // [columns] or null
  void* h;             // h times its gate, `h_stride` elements from row to row
  int64_t h_stride;
  // Backward:
  void* dz;      // rows `stride` elements apart
  void* dvalue;  // only if gated
  int64_t stride;
  float* dbias;   // [columns]: adds the sum of dz over the rows
  float* dgates;  // [rows]: <h, dh>
};

struct ExpertKernels {
  // Of hidden-side experts. Both return how much scratch memory they use, and without any they do
  // nothing else.
  int64_t (*forward)(
      const GemmKernels&, const HiddenExperts&, const SlotsView&, const HiddenPart&, void* out);
  int64_t (*backward)(const GemmKernels&,
                      const HiddenExperts&,
                      const SlotsView&,
                      const HiddenPart&,
                      const void* grad,
                      const ExpertsGradients&);
  // Of neurons.
  void (*activate)(Activation, const NeuronTile&);
  void (*turn_back)(Activation, const NeuronTile&);
  // sums[owners[r]] += row r of tile, 32 columns; sums are `stride` floats apart
  void (*add_rows)(
      const float* tile, int64_t rows, const int64_t* owners, float* sums, int64_t stride);
  // sums[owners[r]] += h[r] weights, weights [neurons, columns] read in place, `width` elements from
  // row to row
  void (*add_products)(const void* h,
                       int64_t h_stride,
                       int64_t rows,
                       const int64_t* owners,
                       const void* weights,
                       int64_t width,
                       int64_t neurons,
                       int64_t columns,
                       float* sums,
                       int64_t stride);
};

// Those in use for a dtype.
const ExpertKernels& expert_kernels(Dtype dtype);

}  // namespace mpoe
