// o[t, g, :] = sum_k gates[t, k] act(u[t, g, :] R_e + bias_e) L_e, e = index[t, k], and its
// gradients, on raw pointers.
//
// Everything is local to a group g of `block` hidden units. Slots are sorted by expert once, for
// all groups. Per (expert, group), rows are gathered, multiplied with the packed blocks and added
// to float32 sums, expert by expert: the order of every sum is fixed, whatever the number of
// threads. A token's last slot writes its sum to the result. Groups with their own blocks are
// processed together if few tokens make few sums, `kOwnFloats`: an expert's blocks are read in the
// order of memory. Groups that share their blocks are always processed together, each group of a
// token as a row, in tiles of tokens with at most `kTileFloats` sums. Nothing of size T x K x F is
// stored.
#pragma once

#include <cstdint>

#include "common/types.h"
#include "cpu/gemm/gemm.h"

namespace mpoe {

struct HiddenExperts {
  Dtype dtype;  // kFloat32 or kBFloat16: dtype of everything except the gates
  std::int64_t tokens, features, block, experts, own_groups,
      top_k;  // own_groups: features / block, or 1: shared
  Activation activation;
  const void* u;              // [T, F]
  const void* u_gate;         // [T, F] or null
  const float* gates;         // [T, K]
  const std::int64_t* index;  // [T, K], each in -1..E-1
  const void* right;          // [E, own_groups, b, b]
  const void* left;
  const void* right_gate;  // with u_gate
  const void* bias;        // [E, F] or null

  std::int64_t groups() const { return features / block; }
};
// `out` may be in.u: a row is written when it is read for the last time.
void hidden_experts(const HiddenExperts& in, void* out);

// Gradients; null: not wanted.
struct HiddenExpertsGradients {
  void* du;
  float* dgates;  // [T, K]
  void* dright;
  void* dleft;
  void* dbias;
  void* du_gate;
  void* dright_gate;
};
void hidden_experts_backward(const HiddenExperts& in,
                             const void* grad,
                             const HiddenExpertsGradients& out);

// --------------------------------------------------- between hidden_experts.cpp and its bodies

// 1 MiB of sums, more if those of kChunk tokens are more
constexpr std::int64_t kTileFloats = 1 << 18;
// The same for groups with their own blocks; more if one group's are
constexpr std::int64_t kOwnFloats = 1 << 16;
constexpr std::int64_t kChunk = 64;  // maximum rows that are processed at once
// Of an expert: packing its blocks costs more than reading them per row.
constexpr std::int64_t kFewRows = 3;

// Whether a slot is the first or the last of its token.
constexpr std::uint8_t kFirst = 1, kLast = 2;

// Slots sorted by tile (one if groups have their own blocks), expert and token.
struct HiddenSlots {
  std::int64_t tile_tokens, tiles;
  const std::int64_t* slots;    // t * K + k
  const std::int64_t* owners;   // t of each slot
  const std::uint8_t* marks;    // kFirst and kLast of each slot
  const std::uint8_t* used;     // [E]: whether an expert has a slot
  bool complete;                // every token has a slot
  const std::int64_t* offsets;  // [tiles, E + 1]
  std::int64_t together;        // the most groups that are processed together
};

// Maximum rows of a chunk.
static inline std::int64_t rows_at_once(const HiddenExperts& in, const HiddenSlots& sorted) {
  const std::int64_t tokens = sorted.tile_tokens < in.tokens ? sorted.tile_tokens : in.tokens;
  const std::int64_t rows = in.top_k * (in.own_groups == 1 ? sorted.together : 1);  // of a token
  return kChunk / rows < tokens ? kChunk : tokens * rows;
}

// Groups [first, last) of one part; the sums of the experts' cores go to `cores`.
struct HiddenPart {
  std::int64_t first, last;
  float* scratch;
  float* cores;  // [E, 2 or 3 (right, left, right_gate), b, b], sums of this part; E = 1 if groups
                 // have their own
  float* slot_gates;  // [groups, T * K]: gradients of gates, by group; null: not wanted
};

struct HiddenKernels {
  void (*forward)(
      const GemmKernels&, const HiddenExperts&, const HiddenSlots&, const HiddenPart&, void* out);
  void (*backward)(const GemmKernels&,
                   const HiddenExperts&,
                   const HiddenSlots&,
                   const HiddenPart&,
                   const void* grad,
                   const HiddenExpertsGradients&);
};

// Indexed by is_bfloat16.
extern const HiddenKernels kHiddenGeneric[2];
extern const HiddenKernels kHiddenAvx2[2];
extern const HiddenKernels kHiddenAvx512[2];
extern const HiddenKernels kHiddenAvx512Bf16[2];

}  // namespace mpoe
