// What the kernels of hidden_experts.h share: arguments, the layout of shared memory, products of tiles in it.
//
// A block of threads works on one group of b hidden units. Blocks and rows are padded there to whole tiles of 16 units
// with zeros, which activations map to zeros. Each of the four warps computes 16 of at most 64 units.
#pragma once
#include "cuda/activation.cuh"
#include "cuda/hidden_experts/hidden_experts.h"
#include "cuda/tile.cuh"

namespace mpoe::cuda {

constexpr int kHiddenThreads = 128;
constexpr int kHiddenWarps = kHiddenThreads / 32;
constexpr int kHiddenRows = 32;      // of an expert, computed at once
constexpr int kHiddenEntries = 512;  // most choices of a tile's tokens

struct HiddenArguments {
  const void *u = nullptr, *u_gate = nullptr, *grad = nullptr;                // [T, F]
  const void *right = nullptr, *right_gate = nullptr, *left = nullptr;        // [E, own, b, b]
  const void* bias = nullptr;                                                 // [E, F]
  const float* gates = nullptr;                                               // [T, K]
  const int64_t* index = nullptr;                                             // [T, K]
  int tokens = 0, features = 0, block = 0, own = 1, experts = 0, top_k = 0, activation = 0, groups = 0;
  int padded = 0, stride = 0;  // units of a tile; row stride in elements
  bool vector = false;         // rows and blocks start at multiples of 16 bytes and have such sizes
  // Forward and rows kernels.
  int tile_tokens = 0, tiles = 0;
  void *out = nullptr, *du = nullptr, *du_gate = nullptr;  // [T, F]
  float* gate_parts = nullptr;  // [G, T, K]
  // Slots: pairs (token, choice) sorted by expert, written by the rows kernel and read by the cores kernel.
  int *pair_of_slot = nullptr, *offsets = nullptr;  // [T K], [E + 1]
  // Cores kernel. Partial: float32 [shares, E, b, b], one per share of the groups; otherwise like the blocks.
  void *dright = nullptr, *dright_gate = nullptr, *dleft = nullptr, *dbias = nullptr;
  int share = 1, shares = 1;  // groups per share, shares per expert
  bool partial = false;

  __host__ __device__ bool gated() const { return u_gate != nullptr; }
  __host__ __device__ int entries() const { return tile_tokens * top_k; }
};

enum class HiddenKernel { kForward, kRows, kCores };

// Shared memory of a block of threads; on the host only `bytes` is useful.
template <class T>
struct HiddenShared {
  T *right, *right_gate, *left;            // [padded][stride]
  T *u, *u_gate, *grad;                    // [rows][stride]
  T *h, *first, *second;                   // h; gradients of u R and of the pre-activation (not gated: only first)
  float *sums, *sums_gate;                 // [tile][padded + 4]: the tile's result
  float* columns;                          // [warps][rows]: gates' gradients
  int *raw, *expert, *token;               // choices of the tile, and sorted by expert
  float* weight;
  std::size_t bytes = 0;

  __host__ __device__ HiddenShared(const HiddenArguments& p, HiddenKernel kernel, void* memory)
      : memory_(static_cast<char*>(memory)) {
    const bool cores = kernel == HiddenKernel::kCores, rows = kernel == HiddenKernel::kRows, backward = cores || rows;
    const int block = p.padded * p.stride, tile = kHiddenRows * p.stride;
    right = take<T>(block);
    left = take<T>(block);
    right_gate = take<T>(p.gated() ? block : 0);
    u = take<T>(tile);
    u_gate = take<T>(p.gated() ? tile : 0);
    grad = take<T>(backward ? tile : 0);
    h = take<T>(rows ? 0 : tile);
    first = take<T>(backward ? tile : 0);
    second = take<T>(backward && p.gated() ? tile : 0);
    sums = take<float>(cores ? 0 : p.tile_tokens * (p.padded + 4));
    sums_gate = take<float>(rows && p.gated() ? p.tile_tokens * (p.padded + 4) : 0);
    columns = take<float>(rows ? kHiddenWarps * kHiddenRows : 0);
    raw = take<int>(cores ? 0 : p.entries());
    expert = take<int>(cores ? 0 : p.entries());
    token = take<int>(cores ? kHiddenRows : p.entries());
    weight = take<float>(cores ? kHiddenRows : p.entries());
  }

 private:
  template <class U>
  __host__ __device__ U* take(int count) {
    U* const from = reinterpret_cast<U*>(memory_ + bytes);
    bytes += (static_cast<std::size_t>(count) * sizeof(U) + 15) / 16 * 16;
    return from;
  }

  char* memory_;
};

// Results of a warp: 16 columns of kTiles times 16 rows.
template <int kTiles>
struct HiddenPart {
  float v[kTiles][2][4] = {};

  // Calls f(row, column of the tile, element) for everything that this thread holds.
  template <class F>
  __device__ __forceinline__ void each(F&& f) {
    const int lane = threadIdx.x & 31, column = (threadIdx.x >> 5) * 16 + (lane & 3) * 2;
    UNROLL
    for (int i = 0; i < kTiles; ++i) {
      UNROLL
      for (int e = 0; e < 4; ++e) {
        UNROLL
        for (int j = 0; j < 2; ++j) f(i * 16 + (lane >> 2) + (e >> 1) * 8, column + j * 8 + (e & 1), v[i][j][e]);
      }
    }
  }
};
using HiddenRows = HiddenPart<kHiddenRows / 16>;
using HiddenCore = HiddenPart<kLargestHiddenBlock / 16>;

// part += A B over `depth` inner indices, a multiple of 16; row tiles at or past `rows` are left unchanged.
template <class T, bool kMajorA, bool kMajorB, int kTiles>
__device__ __forceinline__ void multiply(HiddenPart<kTiles>& part, const T* a, const T* b, int stride, int depth,
                                         int rows) {
  using F = Fragments<T>;
  const int lane = threadIdx.x & 31, column = (threadIdx.x >> 5) * 16;
  for (int k = 0; k < depth; k += F::kStep) {
    typename F::B b0, b1;
    F::template load_b<kMajorB>(b0, b1, b, stride, column, k, lane);
    UNROLL
    for (int i = 0; i < kTiles; ++i) {
      if (i * 16 >= rows) continue;
      typename F::A fragment;
      F::template load_a<kMajorA>(fragment, a, stride, i * 16, k, lane);
      F::multiply(part.v[i][0], fragment, b0);
      F::multiply(part.v[i][1], fragment, b1);
    }
  }
}

// Copies rows [0, rows) from the addresses row(r), and zeros up to `filled`, to a tile. Does not wait for the copies.
template <class T, class Row>
__device__ __forceinline__ void load_rows(const HiddenArguments& p, T* tile, int rows, int filled, Row&& row) {
  constexpr int kPer = 16 / static_cast<int>(sizeof(T));
  const int step = p.vector ? kPer : 1, per_row = p.padded / step;
  for (int i = threadIdx.x; i < filled * per_row; i += kHiddenThreads) {
    const int r = i / per_row, unit = i % per_row * step;
    const bool inside = r < rows && unit < p.block;
    const T* const from = row(inside ? r : 0) + (inside ? unit : 0);
    T* const to = tile + r * p.stride + unit;
    if (p.vector) {
      dev::cp_async16(to, from, inside ? 16 : 0);
    } else {
      *to = inside ? *from : dev::from_float<T>(0.f);
    }
  }
}
template <class T>
__device__ __forceinline__ void load_block(const HiddenArguments& p, T* tile, const void* blocks, int expert, int group) {
  const T* const from =
      static_cast<const T*>(blocks) + (int64_t(expert) * p.own + (p.own > 1 ? group : 0)) * p.block * p.block;
  load_rows(p, tile, p.block, p.padded, [&](int r) { return from + r * p.block; });
}
// Loads the blocks of an expert for a group.
template <class T>
__device__ __forceinline__ void load_blocks(const HiddenArguments& p, const HiddenShared<T>& s, int expert, int group) {
  load_block(p, s.right, p.right, expert, group);
  load_block(p, s.left, p.left, expert, group);
  if (p.gated()) load_block(p, s.right_gate, p.right_gate, expert, group);
}
__device__ __forceinline__ void arrived() {
  dev::cp_async_commit();
  dev::cp_async_wait<0>();
  __syncthreads();
}
__device__ __forceinline__ int whole_tiles(int rows) { return (rows + 15) / 16 * 16; }

// `value` = u R, and `z` = the pre-activation, which without a gate is `value` plus the bias.
template <class T>
__device__ __forceinline__ void pre_activation(const HiddenArguments& p, const HiddenShared<T>& s, int expert, int group,
                                               int rows, HiddenRows& value, HiddenRows& z) {
  multiply<T, true, false>(value, s.u, s.right, p.stride, p.padded, rows);
  if (p.gated()) {
    multiply<T, true, false>(z, s.u_gate, s.right_gate, p.stride, p.padded, rows);
  } else {
    z = value;
  }
  if (!p.bias) return;
  const T* const bias = static_cast<const T*>(p.bias) + int64_t(expert) * p.features + group * p.block;
  z.each([&](int, int unit, float& sum) {
    if (unit < p.block) sum += dev::to_float(bias[unit]);
  });
}

}  // namespace mpoe::cuda
