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

// Groups [first, last) that are taken together, and the tokens of one tile.
struct Tile {
  int64_t first_group, last_group, first_token, tokens;
};

// Slots of one expert, each in a group: at most `Sizes::chunk`.
struct Chunk {
  int64_t rows;
  int64_t slots[kChunk], owners[kChunk], groups[kChunk];
};

// The group's units of the slots' tokens.
template <class T>
void gather(const HiddenExperts& in, const Sizes& s, const void* from, const Chunk& chunk, T* out) {
  constexpr int64_t kAhead = 8, kLine = 64;  // rows lie in pages of their own, and no hardware knows which is next
  const auto source = [&](int64_t r) {
    return static_cast<const T*>(from) + chunk.owners[r] * in.features + chunk.groups[r] * s.block;
  };
  for (int64_t r = 0; r < chunk.rows; ++r) {
    if (r + kAhead < chunk.rows) {
      const char* next = reinterpret_cast<const char*>(source(r + kAhead));
      for (int64_t c = 0; c < s.block * static_cast<int64_t>(sizeof(T)); c += kLine) __builtin_prefetch(next + c);
    }
    std::memcpy(out + r * s.stride, source(r), s.block * sizeof(T));
  }
}

// sum[group][token][.] += factor * row
void add_rows(
    const Sizes& s, const Tile& tile, const Chunk& chunk, const float* rows, const float* gates, float* sum) {
  for (int64_t r = 0; r < chunk.rows; ++r) {
    const int64_t group = chunk.groups[r] - tile.first_group, token = chunk.owners[r] - tile.first_token;
    float* target = sum + (group * tile.tokens + token) * s.wide;
    const Floats gate = splat(gates == nullptr ? 1.0f : gates[chunk.slots[r]]);
    for (int64_t c = 0; c < s.wide; c += kWidth)
      store_floats(target + c, multiply_add(gate, load_floats(rows + r * s.wide + c), load_floats(target + c)));
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
void store_sums(const HiddenExperts& in, const Sizes& s, const Tile& tile, float* sum, void* out) {
  for (int64_t group = tile.first_group; group < tile.last_group; ++group) {
    T* target = static_cast<T*>(out) + tile.first_token * in.features + group * s.block;
    for (int64_t t = 0; t < tile.tokens; ++t, sum += s.wide) {
      store_row(sum, target + t * in.features, s.block);
      std::memset(sum, 0, s.wide * sizeof(float));
    }
  }
}

// Calls f(tile, number of the tile) for the groups of a part that are taken together, and the tiles of each.
template <class F>
void for_each_tile(const HiddenExperts& in, const HiddenSlots& sorted, const HiddenPart& part, const F& f) {
  const int64_t together = in.own_groups == 1 ? part.last - part.first : 1;
  for (int64_t group = part.first; group < part.last; group += together)
    for (int64_t tile = 0; tile < sorted.tiles; ++tile) {
      const int64_t first = tile * sorted.tile_tokens;
      f(Tile{group, group + together, first, least(sorted.tile_tokens, in.tokens - first)}, tile);
    }
}

// Calls f(expert, chunk, first of this expert, all rows of this expert) for chunks of a tile's slots, expert after
// expert: whole ones, and what is left. The groups of a slot come after another.
template <class F>
void for_each_chunk(
    const HiddenExperts& in, const Sizes& s, const HiddenSlots& sorted, const Tile& tile, int64_t number, const F& f) {
  const int64_t* offsets = sorted.offsets + number * (in.experts + 1);
  Chunk chunk;
  for (int64_t e = 0; e < in.experts; ++e) {
    const int64_t all = (offsets[e + 1] - offsets[e]) * (tile.last_group - tile.first_group);
    int64_t slot = offsets[e], group = tile.first_group;
    for (int64_t first = 0; first < all; first += s.chunk) {
      chunk.rows = least(s.chunk, all - first);
      for (int64_t r = 0; r < chunk.rows; ++r) {
        chunk.slots[r] = sorted.slots[slot];
        chunk.owners[r] = sorted.owners[slot];
        chunk.groups[r] = group;
        if (++group == tile.last_group) {
          group = tile.first_group;
          ++slot;
        }
      }
      f(e, chunk, first == 0, all);
    }
  }
}

}  // namespace
}  // namespace mpoe
