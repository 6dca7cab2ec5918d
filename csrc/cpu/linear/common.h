// Shared by the strategies of the grouped linear layer: tiles of slots, rows of tokens, columns and
// bias of a result.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "common/buffer.h"
#include "common/parallel.h"
#include "cpu/gemm/multiply.h"
#include "cpu/linear/linear.h"

namespace mpoe {

// The n-th part of `count` items in parts of `most`; the last one may have less.
inline Span nth_part(int64_t count, int64_t most, int64_t n) {
  return {n * most, std::min(count, (n + 1) * most)};
}

// Calls f(expert, slots) for every expert with slots in `block`.
template <class F>
void for_each_expert(const LinearInputs& in, Span block, const F& f) {
  int64_t e =
      std::upper_bound(in.offsets, in.offsets + in.experts + 1, block.first) - in.offsets - 1;
  for (; e < in.experts && in.offsets[e] < block.last; ++e) {
    const Span slots{std::max(block.first, in.offsets[e]), std::min(block.last, in.offsets[e + 1])};
    if (slots.first < slots.last)
      f(e, slots);
  }
}

template <class T>
const T* row_of(const LinearInputs& in, int64_t slot) {
  const int64_t row = in.row_index == nullptr ? slot : in.row_index[slot];
  return static_cast<const T*>(in.x) + row * in.dims.in_features;
}

// An expert's blocks.
template <class T>
const T* left_of(const LinearInputs& in, int64_t expert) {
  return static_cast<const T*>(in.left) + expert * in.dims.left_size();
}
template <class T>
const T* right_of(const LinearInputs& in, int64_t expert) {
  return static_cast<const T*>(in.right) + expert * in.dims.right_size();
}

// to [whole] = the elements [first, first + count) of a row, zero past its `size`.
template <class T>
void copy_padded(const T* row, int64_t size, int64_t first, int64_t count, T* to, int64_t whole) {
  const int64_t valid = std::clamp<int64_t>(size - first, 0, count);
  std::memcpy(to, row + std::min(first, size), valid * sizeof(T));
  std::fill(to + valid, to + whole, T{});
}

// Map of 32 contiguous columns at `first`, of which those below `limit` exist.
inline ColumnMap consecutive(int64_t first, int64_t limit) {
  ColumnMap map{};
  for (int64_t g = 0; g < kGranules; ++g) {
    map.offset[g] = first + g * kGranule;
    map.valid[g] = static_cast<int32_t>(std::clamp<int64_t>(limit - map.offset[g], 0, kGranule));
  }
  return map;
}

// Bias of `count` output columns from `first` on; zeros past the true size.
template <class T>
inline void load_bias(const LinearForward& in, int64_t first, int64_t count, float* out) {
  const T* bias = static_cast<const T*>(in.bias);
  for (int64_t c = 0; c < count; ++c)
    out[c] = first + c < in.dims.out_features ? mpoe::load(bias[first + c]) : 0.0f;
}

// Zeros the rows [first, last) of a result.
inline void zero_rows(void* out, int64_t first, int64_t last, int64_t row_bytes) {
  if (out != nullptr && last > first)
    std::memset(static_cast<char*>(out) + first * row_bytes, 0, (last - first) * row_bytes);
}

// Zeros the rows of the results that no expert owns; whether there are others.
template <class T>
inline bool zero_the_rest(const LinearForward& in) {
  for (void* rows : {in.y, in.saved})
    zero_rows(rows, in.filled(), in.slots, in.dims.out_features * sizeof(T));
  zero_rows(in.h, in.filled(), in.slots, in.dims.jC * in.dims.b * sizeof(T));
  return in.filled() > 0;
}

}  // namespace mpoe
