// Rows of hidden_experts.h's tokens: how many are processed at once, where they are read, and where
// their sums go. Part of the bodies of each instruction set; nothing here may use inline functions
// that other files share.
#pragma once

#include <cstring>

#include "cpu/gemm/math.h"
#include "cpu/hidden_experts/hidden_experts.h"

namespace mpoe {
namespace {

using std::int64_t;

int64_t least(int64_t a, int64_t b) {
  return a < b ? a : b;
}

// Sizes of one block and its operands. `wide`: columns of float tiles; `stride`: elements from row
// to row of operands.
struct Sizes {
  int64_t block, wide, unit, units, stride;
  int64_t chunk;  // rows at once: whole tiles

  Sizes(const GemmKernels& gemm, int64_t b)
      : block(b),
        wide((b + kPanel - 1) / kPanel * kPanel),
        unit(gemm.unit),
        units((b + unit - 1) / unit),
        chunk(kChunk / gemm.best_rows * gemm.best_rows) {
    const int64_t line = 16 * unit;
    stride = (((wide + line - 1) / line) | 1) * line;
  }
};

// Groups [first, last) that are processed together, and the tokens of one tile.
struct Tile {
  int64_t first_group, last_group, first_token, tokens;
};

// Rows: each is in its own page, and the hardware cannot tell which is next.
constexpr int64_t kAhead = 8;

// Rows of one expert, at most `Sizes::chunk`, each with its group: all of one group if groups have
// their own blocks.
struct Chunk {
  int64_t group;      // whose blocks are used
  int64_t all;        // rows that use the same blocks, in this tile
  bool begins, ends;  // whether these are the first and the last of them
  int64_t rows,
      ahead;  // the owners and groups of `ahead` rows that come later follow those of `rows`
  int64_t slots[kChunk], owners[kChunk + kAhead], groups[kChunk + kAhead];
  std::uint8_t marks[kChunk];
};

// locality: 3 into the L1 cache, 2 into the L2 cache.
template <int locality>
inline void prefetch_to_read(const void* address, int64_t bytes) {
  for (int64_t b = 0; b < bytes; b += 64)
    __builtin_prefetch(static_cast<const char*>(address) + b, 0, locality);
}
inline void prefetch_to_write(const void* address, int64_t bytes) {
  for (int64_t b = 0; b < bytes; b += 64)
    __builtin_prefetch(static_cast<const char*>(address) + b, 1);
}

// Copies, for each row, its group's units of its token. `width`: elements to fetch ahead, from a
// row's on.
template <class T>
void gather(const HiddenExperts& in,
            const Sizes& s,
            const void* from,
            const Chunk& chunk,
            int64_t width,
            T* out) {
  const auto source = [&](int64_t r) {
    return static_cast<const T*>(from) + chunk.owners[r] * in.features + chunk.groups[r] * s.block;
  };
  constexpr int64_t kOnce = 4 * kWidth / static_cast<int64_t>(sizeof(T));  // elements of a vector
  for (int64_t r = 0; r < chunk.rows; ++r) {
    if (r + kAhead < chunk.rows + chunk.ahead)
      prefetch_to_read<3>(source(r + kAhead), width * static_cast<int64_t>(sizeof(T)));
    const T* const row = source(r);
    T* const to = out + r * s.stride;
    int64_t c = 0;
    for (; c + kOnce <= s.block; c += kOnce)
      store_vector(to + c, load_vector<Words>(row + c));
    if (c < s.block)
      std::memcpy(to + c, row + c, (s.block - c) * sizeof(T));
  }
}

template <class T>
void store_row(const float* from, T* out, int64_t count) {
  int64_t c = 0;
  for (; c + kWidth <= count; c += kWidth)
    store_floats(out + c, load_floats(from + c));
  for (; c < count; ++c)
    store(out[c], from[c]);
}

// sum[group][token][.] += factor * row, begun by the token's first slot and rounded into the result
// by its last.
template <class T>
void add_rows(const HiddenExperts& in,
              const Sizes& s,
              const Tile& tile,
              const Chunk& chunk,
              const float* rows,
              const float* gates,
              float* sum,
              void* out) {
  for (int64_t r = 0; r < chunk.rows; ++r, rows += s.wide) {
    const int64_t group = chunk.groups[r], token = chunk.owners[r];
    const int64_t later = r + kAhead;
    if (later < chunk.rows && (chunk.marks[later] & kLast) != 0)
      prefetch_to_write(
          static_cast<T*>(out) + chunk.owners[later] * in.features + chunk.groups[later] * s.block,
          s.block * static_cast<int64_t>(sizeof(T)));
    float* const target =
        sum + ((group - tile.first_group) * tile.tokens + token - tile.first_token) * s.wide;
    const bool begins = (chunk.marks[r] & kFirst) != 0;
    const Floats gate = splat(gates == nullptr ? 1.0f : gates[chunk.slots[r]]);
    const auto value = [&](int64_t c) {
      return multiply_add(gate, load_floats(rows + c), begins ? Floats{} : load_floats(target + c));
    };
    int64_t c = 0;
    if ((chunk.marks[r] & kLast) == 0) {
      for (; c < s.wide; c += kWidth)
        store_floats(target + c, value(c));
      continue;
    }
    T* const result = static_cast<T*>(out) + token * in.features + group * s.block;
    for (; c + kWidth <= s.block; c += kWidth)
      store_floats(result + c, value(c));
    if (c == s.block)
      continue;
    float rest[kWidth];
    store_floats(rest, value(c));
    store_row(rest, result + c, s.block - c);
  }
}

// Zeros for the tokens that have no expert.
template <class T>
void store_missing(const HiddenExperts& in,
                   const Sizes& s,
                   const HiddenSlots& sorted,
                   const Tile& tile,
                   void* out) {
  for (int64_t t = tile.first_token; !sorted.complete && t < tile.first_token + tile.tokens; ++t) {
    bool missing = true;
    for (int64_t k = 0; k < in.top_k; ++k)
      missing = missing && in.index[t * in.top_k + k] < 0;
    T* const row = static_cast<T*>(out) + t * in.features;
    if (missing)
      std::memset(row + tile.first_group * s.block,
                  0,
                  (tile.last_group - tile.first_group) * s.block * sizeof(T));
  }
}

// Calls f(tile, number of the tile) for the groups of a part that are processed together, and the
// tiles of each.
template <class F>
void for_each_tile(const HiddenExperts& in,
                   const HiddenSlots& sorted,
                   const HiddenPart& part,
                   const F& f) {
  for (int64_t group = part.first; group < part.last; group += sorted.together)
    for (int64_t tile = 0; tile < sorted.tiles; ++tile) {
      const int64_t first = tile * sorted.tile_tokens,
                    last_group = least(group + sorted.together, part.last);
      f(Tile{group, last_group, first, least(sorted.tile_tokens, in.tokens - first)}, tile);
    }
}

// Calls f(expert, chunk) for a tile's slots, one expert at a time: whole chunks, then the rest.
// Groups that share their blocks are consecutive rows of a slot; groups with their own come one
// after another, each with all slots.
template <class F>
void for_each_chunk(const HiddenExperts& in,
                    const Sizes& s,
                    const HiddenSlots& sorted,
                    const Tile& tile,
                    int64_t number,
                    const F& f) {
  const int64_t* offsets = sorted.offsets + number * (in.experts + 1);
  const bool shared = in.own_groups == 1;
  Chunk chunk;
  const auto run = [&](int64_t e, int64_t first_group, int64_t last_group) {
    chunk.group = first_group;
    chunk.all = (offsets[e + 1] - offsets[e]) * (last_group - first_group);
    int64_t slot = offsets[e], group = first_group;
    const auto next = [&](int64_t& of_slot, int64_t& of_group) {
      if (++of_group < last_group)
        return;
      of_group = first_group;
      ++of_slot;
    };
    for (int64_t first = 0; first < chunk.all; first += s.chunk) {
      chunk.rows = least(s.chunk, chunk.all - first);
      chunk.begins = first == 0;
      chunk.ends = first + chunk.rows == chunk.all;
      for (int64_t r = 0; r < chunk.rows; ++r) {
        chunk.slots[r] = sorted.slots[slot];
        chunk.owners[r] = sorted.owners[slot];
        chunk.marks[r] = sorted.marks[slot];
        chunk.groups[r] = group;
        next(slot, group);
      }
      // The slots of the next expert follow.
      const int64_t end = offsets[in.experts];
      chunk.ahead = 0;
      for (int64_t later = slot, of_group = group; later < end && chunk.ahead < kAhead;
           next(later, of_group)) {
        chunk.owners[chunk.rows + chunk.ahead] = sorted.owners[later];
        chunk.groups[chunk.rows + chunk.ahead++] = of_group;
      }
      f(e, chunk);
    }
  };
  for (int64_t e = 0; e < in.experts; ++e) {
    if (shared)
      run(e, tile.first_group, tile.last_group);
    else
      for (int64_t group = tile.first_group; group < tile.last_group; ++group)
        run(e, group, group + 1);
  }
}

// Elements of a row to fetch ahead. Of groups with their own blocks, some at once: memory yields
// consecutive lines faster than scattered ones.
inline int64_t fetched(const HiddenExperts& in,
                       const Sizes& s,
                       const Tile& tile,
                       const Chunk& chunk) {
  constexpr int64_t kAtOnce = 4;  // groups
  if (in.own_groups == 1)
    return s.block;
  const int64_t behind = (chunk.group - tile.first_group) % kAtOnce;
  return behind > 0 ? 0 : least(kAtOnce, tile.last_group - chunk.group) * s.block;
}

}  // namespace
}  // namespace mpoe
