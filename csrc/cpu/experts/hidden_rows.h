// Rows of hidden-side experts: how many are processed at once, where they are read, and where their
// sums go. Part of the bodies of each instruction set; nothing here may use inline functions that
// other files share.
#pragma once

#include <cstring>

#include "common/scratch.h"
#include "cpu/experts/kernels.h"
#include "cpu/gemm/math.h"

namespace mpoe {
namespace {

// Rows: each is in its own page, and the hardware cannot tell which is next.
constexpr int64_t kAhead = 8;

int64_t least(int64_t a, int64_t b) {
  return a < b ? a : b;
}

template <class T>
constexpr int64_t bytes_of(int64_t count) {
  return count * int64_t{sizeof(T)};
}

// Groups [first, last) that are processed together, and the tokens of one tile.
struct Tile {
  int64_t number;
  int64_t first_group, last_group;
  int64_t first_token, tokens;

  int64_t groups() const { return last_group - first_group; }
};

// Rows of one expert, each with its group: all of one group if groups have their own blocks.
struct Chunk {
  int64_t expert;
  int64_t group;  // whose blocks are used
  int64_t all;    // rows that use the same blocks, in this tile
  // Whether these are the first and the last of them.
  bool begins, ends;
  int64_t rows;
  int64_t ahead;  // the owners and groups of `ahead` rows that come later follow those of `rows`
  int64_t slots[kChunk], owners[kChunk + kAhead], groups[kChunk + kAhead];
  uint8_t marks[kChunk];
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

// What a forward and a backward of one part share.
class HiddenPass {
 protected:
  HiddenPass(const GemmKernels& gemm,
             const HiddenExperts& in,
             const SlotsView& sorted,
             const HiddenPart& part)
      : gemm_(gemm),
        in_(in),
        sorted_(sorted),
        part_(part),
        gated_(in.right_gate != nullptr),
        shared_(in.own_groups == 1),
        block_(in.block),
        square_(block_ * block_),
        wide_((block_ + kPanel - 1) / kPanel * kPanel),
        unit_(gemm.unit),
        units_((block_ + unit_ - 1) / unit_),
        chunk_(kChunk / gemm.best_rows * gemm.best_rows),
        scratch_(part.scratch, part.scratch_size) {
    const int64_t line = 16 * unit_;
    stride_ = (((wide_ + line - 1) / line) | 1) * line;
    const int64_t tokens = least(sorted.tile_tokens, in.tokens);
    const int64_t rows = in.top_k * (shared_ ? part.together : 1);  // of a token
    most_rows_ = kChunk / rows < tokens ? kChunk : tokens * rows;
    tile_sums_ = part.together * tokens * wide_;
  }

  // The block of one expert and group.
  template <class T>
  const T* block_of(const void* blocks, int64_t expert, int64_t group) const {
    const int64_t number = shared_ ? expert : expert * in_.own_groups + group;
    return static_cast<const T*>(blocks) + number * square_;
  }

  // Where a row's units of a matrix [T, F] are.
  template <class T>
  T* units_of(T* matrix, const Chunk& chunk, int64_t row) const {
    return matrix + chunk.owners[row] * in_.features + chunk.groups[row] * block_;
  }

  // Copies each row's units. `width`: elements to fetch ahead, from a row's on.
  template <class T>
  void gather(const void* matrix, const Chunk& chunk, int64_t width, T* out) const {
    const T* const from = static_cast<const T*>(matrix);
    constexpr int64_t kOnce = 4 * kWidth / bytes_of<T>(1);  // elements of a vector
    for (int64_t r = 0; r < chunk.rows; ++r) {
      if (r + kAhead < chunk.rows + chunk.ahead)
        prefetch_to_read<3>(units_of(from, chunk, r + kAhead), bytes_of<T>(width));
      const T* const row = units_of(from, chunk, r);
      T* const to = out + r * stride_;
      int64_t c = 0;
      for (; c + kOnce <= block_; c += kOnce)
        store_vector(to + c, load_vector<Words>(row + c));
      if (c < block_)
        std::memcpy(to + c, row + c, bytes_of<T>(block_ - c));
    }
  }

  // sum[group][token][.] += factor * row, begun by the token's first slot and rounded into the
  // result by its last.
  template <class T>
  void add_rows(const Tile& tile,
                const Chunk& chunk,
                const float* rows,
                const float* gates,
                float* sum,
                T* out) const {
    for (int64_t r = 0; r < chunk.rows; ++r, rows += wide_) {
      const int64_t later = r + kAhead;
      if (later < chunk.rows && (chunk.marks[later] & kLast) != 0)
        prefetch_to_write(units_of(out, chunk, later), bytes_of<T>(block_));
      const int64_t group = chunk.groups[r] - tile.first_group;
      const int64_t token = chunk.owners[r] - tile.first_token;
      float* const target = sum + (group * tile.tokens + token) * wide_;
      const bool begins = (chunk.marks[r] & kFirst) != 0;
      const Floats gate = splat(gates == nullptr ? 1.0f : gates[chunk.slots[r]]);
      const auto value = [&](int64_t c) {
        return multiply_add(
            gate, load_floats(rows + c), begins ? Floats{} : load_floats(target + c));
      };
      int64_t c = 0;
      if ((chunk.marks[r] & kLast) == 0) {
        for (; c < wide_; c += kWidth)
          store_floats(target + c, value(c));
        continue;
      }
      T* const result = units_of(out, chunk, r);
      for (; c + kWidth <= block_; c += kWidth)
        store_floats(result + c, value(c));
      if (c == block_)
        continue;
      float rest[kWidth];
      store_floats(rest, value(c));
      store_row(rest, result + c, block_ - c);
    }
  }

  // Zeros for the tokens that have no expert.
  template <class T>
  void store_missing(const Tile& tile, T* out) const {
    if (sorted_.complete)
      return;
    for (int64_t t = tile.first_token; t < tile.first_token + tile.tokens; ++t) {
      bool missing = true;
      for (int64_t k = 0; k < in_.top_k; ++k)
        missing = missing && in_.index[t * in_.top_k + k] < 0;
      if (missing)
        std::memset(out + t * in_.features + tile.first_group * block_,
                    0,
                    bytes_of<T>(tile.groups() * block_));
    }
  }

  // Calls f(tile) for the groups of a part that are processed together, and the tiles of each.
  template <class F>
  void for_each_tile(const F& f) const {
    for (int64_t group = part_.first; group < part_.last; group += part_.together)
      for (int64_t number = 0; number < sorted_.tiles; ++number) {
        const int64_t token = number * sorted_.tile_tokens;
        f(Tile{number,
               group,
               least(group + part_.together, part_.last),
               token,
               least(sorted_.tile_tokens, in_.tokens - token)});
      }
  }

  // Calls f(chunk) for a tile's slots, one expert at a time: whole chunks, then the rest. Groups
  // that share their blocks are consecutive rows of a slot; groups with their own come one after
  // another, each with all slots.
  template <class F>
  void for_each_chunk(const Tile& tile, const F& f) const {
    Chunk chunk;
    for (int64_t e = 0; e < in_.experts; ++e) {
      chunk.expert = e;
      if (shared_) {
        chunks_of_groups(tile, tile.first_group, tile.last_group, chunk, f);
        continue;
      }
      for (int64_t group = tile.first_group; group < tile.last_group; ++group)
        chunks_of_groups(tile, group, group + 1, chunk, f);
    }
  }

  // Elements of a row to fetch ahead. Of groups with their own blocks, some at once: memory yields
  // consecutive lines faster than scattered ones.
  int64_t fetched(const Tile& tile, const Chunk& chunk) const {
    constexpr int64_t kAtOnce = 4;  // groups
    if (shared_)
      return block_;
    if ((chunk.group - tile.first_group) % kAtOnce > 0)
      return 0;
    return least(kAtOnce, tile.last_group - chunk.group) * block_;
  }

  const GemmKernels& gemm_;
  const HiddenExperts& in_;
  const SlotsView& sorted_;
  const HiddenPart& part_;
  const bool gated_, shared_;
  const int64_t block_, square_;
  const int64_t wide_;  // columns of float tiles
  const int64_t unit_, units_;
  const int64_t chunk_;  // rows at once: whole tiles
  int64_t stride_;       // elements from row to row of operands
  int64_t most_rows_;    // of a chunk
  int64_t tile_sums_;    // floats of a tile's sums
  Scratch scratch_;

 private:
  template <class F>
  void chunks_of_groups(
      const Tile& tile, int64_t first_group, int64_t last_group, Chunk& chunk, const F& f) const {
    const int64_t* const offsets = sorted_.offsets + tile.number * (in_.experts + 1);
    const int64_t end = offsets[in_.experts];
    int64_t slot = offsets[chunk.expert];
    int64_t group = first_group;
    const auto next = [&](int64_t& of_slot, int64_t& of_group) {
      if (++of_group < last_group)
        return;
      of_group = first_group;
      ++of_slot;
    };
    chunk.group = first_group;
    chunk.all = (offsets[chunk.expert + 1] - slot) * (last_group - first_group);
    for (int64_t first = 0; first < chunk.all; first += chunk_) {
      chunk.rows = least(chunk_, chunk.all - first);
      chunk.begins = first == 0;
      chunk.ends = first + chunk.rows == chunk.all;
      for (int64_t r = 0; r < chunk.rows; ++r) {
        chunk.slots[r] = sorted_.slots[slot];
        chunk.owners[r] = sorted_.owners[slot];
        chunk.marks[r] = sorted_.marks[slot];
        chunk.groups[r] = group;
        next(slot, group);
      }
      // The slots of the next expert follow.
      int64_t later = slot;
      int64_t later_group = group;
      chunk.ahead = 0;
      while (later < end && chunk.ahead < kAhead) {
        chunk.owners[chunk.rows + chunk.ahead] = sorted_.owners[later];
        chunk.groups[chunk.rows + chunk.ahead] = later_group;
        ++chunk.ahead;
        next(later, later_group);
      }
      f(chunk);
    }
  }
};

}  // namespace
}  // namespace mpoe
