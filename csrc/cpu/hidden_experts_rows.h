// Rows of hidden_experts.h's tokens: how many come at once, where they are read, and where their sums go. Part of the
// bodies of each instruction set; nothing here may use inline functions that other files share.
#pragma once

#include <cstring>

#include "cpu/gemm_math.h"
#include "cpu/hidden_experts.h"

namespace mpoe {
namespace {

using std::int64_t;

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Sizes of one block and its operands. `wide`: columns of float tiles; `stride`: elements from row to row of operands.
struct Sizes {
  int64_t block, wide, unit, units, stride;
  int64_t chunk;  // rows at once: whole tiles

  Sizes(const GemmKernels& gemm, int64_t b)
      : block(b), wide((b + kPanel - 1) / kPanel * kPanel), unit(gemm.unit), units((b + unit - 1) / unit),
        chunk(kChunk / gemm.best_rows * gemm.best_rows) {
    const int64_t line = 16 * unit;
    stride = (((wide + line - 1) / line) | 1) * line;
  }
};

// Slots of one expert, at most `Sizes::chunk`.
struct Chunk {
  const int64_t *slots, *owners;
  int64_t rows;
};

// Rows of the slots' tokens, units [group * b, (group + 1) * b) of them.
template <class T>
void gather(const HiddenExperts& in, const Sizes& s, const void* from, int64_t group, const Chunk& chunk, T* out) {
  constexpr int64_t kAhead = 8, kLine = 64;  // each row lies in a page of its own, and no hardware knows which is next
  const T* source = static_cast<const T*>(from) + group * s.block;
  for (int64_t r = 0; r < chunk.rows; ++r) {
    if (r + kAhead < chunk.rows) {
      const char* next = reinterpret_cast<const char*>(source + chunk.owners[r + kAhead] * in.features);
      for (int64_t c = 0; c < s.block * static_cast<int64_t>(sizeof(T)); c += kLine) __builtin_prefetch(next + c);
    }
    std::memcpy(out + r * s.stride, source + chunk.owners[r] * in.features, s.block * sizeof(T));
  }
}

// sum[token][.] += factor * row
void add_rows(
    const Sizes& s, int64_t first_token, const Chunk& chunk, const float* tile, const float* gates, float* sum) {
  for (int64_t r = 0; r < chunk.rows; ++r) {
    float* target = sum + (chunk.owners[r] - first_token) * s.wide;
    const Floats gate = splat(gates == nullptr ? 1.0f : gates[chunk.slots[r]]);
    for (int64_t c = 0; c < s.wide; c += kWidth)
      store_floats(target + c, multiply_add(gate, load_floats(tile + r * s.wide + c), load_floats(target + c)));
  }
}

template <class T>
void store_row(const float* from, T* out, int64_t count) {
  int64_t c = 0;
  for (; c + kWidth <= count; c += kWidth) store_floats(out + c, load_floats(from + c));
  for (; c < count; ++c) store(out[c], from[c]);
}

// Rounded sums of a tile of tokens -> columns of the result; the sums become zero again.
template <class T>
void store_sums(
    const HiddenExperts& in, const Sizes& s, int64_t group, int64_t first, int64_t tokens, float* sum, void* out) {
  T* target = static_cast<T*>(out) + first * in.features + group * s.block;
  for (int64_t t = 0; t < tokens; ++t) {
    store_row(sum + t * s.wide, target + t * in.features, s.block);
    std::memset(sum + t * s.wide, 0, s.wide * sizeof(float));
  }
}

// Calls f(expert, chunk, first of this expert, all rows of this expert) for chunks of a tile's slots, expert after
// expert: whole ones, and what is left.
template <class F>
void for_each_chunk(const HiddenExperts& in, const Sizes& s, const HiddenSlots& sorted, int64_t tile, const F& f) {
  const int64_t* offsets = sorted.offsets + tile * (in.experts + 1);
  for (int64_t e = 0; e < in.experts; ++e) {
    const int64_t count = offsets[e + 1] - offsets[e];
    for (int64_t first = 0; first < count; first += s.chunk)
      f(e, Chunk{sorted.slots + offsets[e] + first, sorted.owners + offsets[e] + first, least(s.chunk, count - first)},
        first == 0, count);
  }
}

}  // namespace
}  // namespace mpoe
