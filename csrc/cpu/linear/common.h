// Shared by the strategies of the grouped linear layer: scratch memory, tiles of slots, gathering of rows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "common/parallel.h"
#include "cpu/linear/linear.h"

namespace mpoe {

// Uninitialised memory aligned to cache lines. On Linux, large buffers get huge pages if the system grants them on
// request.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(std::int64_t count) {
    constexpr std::size_t kHugePage = 2 << 20;
    const std::size_t bytes = static_cast<std::size_t>(count) * sizeof(T) + 64;
    const bool large = bytes >= 2 * kHugePage;
    void* memory = nullptr;
    if (posix_memalign(&memory, large ? kHugePage : 64, bytes) != 0) throw std::bad_alloc();
    data_ = static_cast<T*>(memory);
#if defined(__linux__)
    if (large) madvise(data_, bytes / kHugePage * kHugePage, MADV_HUGEPAGE);  // a hint: failure changes nothing
#endif
  }
  Buffer(Buffer&& other) noexcept : data_(other.data_) { other.data_ = nullptr; }
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    return *this;
  }
  ~Buffer() { std::free(data_); }
  T* get() { return data_; }
  const T* get() const { return data_; }
  explicit operator bool() const { return data_ != nullptr; }

 private:
  T* data_ = nullptr;
};

template <class T>
inline Buffer<T> zeros(std::int64_t count) {
  Buffer<T> buffer(count);
  std::fill_n(buffer.get(), count, T{});
  return buffer;
}

// Calls f(kernels, element) with the GEMM kernels of `dtype` and a value of its element type.
template <class F>
void with_element_type(Dtype dtype, const F& f) {
  if (dtype == Dtype::kBFloat16)
    f(gemm_kernels(dtype), BFloat16{});
  else
    f(gemm_kernels(dtype), float{});
}

// Rows [first, first + rows) of the slots, all of one expert.
struct SlotTile {
  std::int64_t first, rows, expert;
};

// A run of items [first, last).
struct Span {
  std::int64_t first, last;
};

// Sums are nested three deep, which rounds less than one long sum: its error grows with the square root of its length,
// theirs with that of the three lengths added up. The innermost have gemm.longest_sum units of k, the next this many of
// those.
constexpr std::int64_t kSumsOfSums = 8;

// tile (accumulate: +)= the sum of pieces of `units`, each computed by piece(first, count, tile, stride, accumulate).
template <std::int64_t most_rows = kMaxRows, class F>
inline void sum_of_sums(
    const GemmKernels& gemm, std::int64_t rows, std::int64_t units, float* tile, std::int64_t tile_stride,
    bool accumulate, const F& piece) {
  const std::int64_t longest = gemm.longest_sum;
  for_each_tile(units, longest * kSumsOfSums, [&](std::int64_t first, std::int64_t count) {
    const bool adds = accumulate || first > 0;
    if (!adds || count <= longest) {
      for_each_tile(count, longest, [&](std::int64_t start, std::int64_t length) {
        piece(first + start, length, tile, tile_stride, adds || start > 0);
      });
      return;
    }
    alignas(64) float part[most_rows * kPanel];
    for_each_tile(count, longest, [&](std::int64_t start, std::int64_t length) {
      piece(first + start, length, part, kPanel, start > 0);
    });
    for (std::int64_t r = 0; r < rows; ++r)
      for (std::int64_t c = 0; c < kPanel; ++c) tile[r * tile_stride + c] += part[r * kPanel + c];
  });
}

// Rows whose sums stay in the L1 cache together with a piece of a panel.
constexpr std::int64_t kStripRows = 112;

// multiply_rows and multiply_columns of gemm.h for any number of units; at most kStripRows rows.
template <class T>
inline void multiply_rows(
    const GemmKernels& gemm, std::int64_t rows, std::int64_t units, const T* a, std::int64_t stride, const T* panel,
    float* tile, bool accumulate) {
  sum_of_sums<kStripRows>(
      gemm, rows, units, tile, kPanel, accumulate,
      [&](std::int64_t first, std::int64_t count, float* sum, std::int64_t sum_stride, bool adds) {
        gemm.multiply_rows(
            rows, count, a + first * gemm.unit, stride / gemm.unit, panel + first * kPanel * gemm.unit, sum,
            sum_stride, adds);
      });
}
inline void multiply_columns(
    const GemmKernels& gemm, std::int64_t rows, std::int64_t units, const void* a, const void* panel, float* tile,
    std::int64_t tile_stride, bool accumulate) {
  sum_of_sums(
      gemm, rows, units, tile, tile_stride, accumulate,
      [&](std::int64_t first, std::int64_t count, float* sum, std::int64_t sum_stride, bool adds) {
        const std::int64_t offset = first * kPanel * 4;
        gemm.multiply_columns(
            rows, count, static_cast<const char*>(a) + offset, static_cast<const char*>(panel) + offset, sum,
            sum_stride, adds);
      });
}

// Calls f(first_row, rows, first_column, tile) for every tile of `count` rows of `a` times every panel. A piece of a
// panel, as long as an innermost sum, is multiplied with a strip of rows before the next piece is: then it comes from
// the L1 cache, and only the rows come from the L2 cache. Summed as in multiply_rows.
template <class T, class F>
void multiply_all(
    const GemmKernels& gemm, std::int64_t count, std::int64_t k, const T* a, std::int64_t stride, const T* panels,
    std::int64_t columns, const F& f) {
  alignas(64) float sums[kStripRows * kPanel];
  const std::int64_t units = k / gemm.unit;
  for (std::int64_t c = 0; c < columns; c += kPanel)
    for_each_tile(count, kStripRows, [&](std::int64_t strip, std::int64_t strip_rows) {
      multiply_rows(gemm, strip_rows, units, a + strip * stride, stride, panels + c * k, sums, false);
      for_each_tile(strip_rows, gemm.best_rows, [&](std::int64_t row, std::int64_t rows) {
        f(strip + row, rows, c, sums + row * kPanel);
      });
    });
}

// Tiles of at most `most` slots that cover every expert's slots.
inline std::vector<SlotTile> slot_tiles(const LinearInputs& in, std::int64_t most) {
  std::vector<SlotTile> tiles;
  for (std::int64_t e = 0; e < in.experts; ++e) {
    const std::int64_t start = in.offsets[e];
    for_each_tile(in.offsets[e + 1] - start, most, [&](std::int64_t first, std::int64_t rows) {
      tiles.push_back({start + first, rows, e});
    });
  }
  return tiles;
}

// Runs of consecutive tiles with at most `most` slots (at least one tile each).
inline std::vector<Span> tile_blocks(const std::vector<SlotTile>& tiles, std::int64_t most) {
  std::vector<Span> blocks;
  std::int64_t rows = 0;
  for (std::int64_t t = 0; t < static_cast<std::int64_t>(tiles.size()); ++t) {
    if (blocks.empty() || rows + tiles[t].rows > most) {
      blocks.push_back({t, t});
      rows = 0;
    }
    rows += tiles[t].rows;
    blocks.back().last = t + 1;
  }
  return blocks;
}

// Calls f(expert, slots) for every expert with slots in `block`.
template <class F>
void for_each_expert(const LinearInputs& in, Span block, const F& f) {
  std::int64_t e = std::upper_bound(in.offsets, in.offsets + in.experts + 1, block.first) - in.offsets - 1;
  for (; e < in.experts && in.offsets[e] < block.last; ++e) {
    const Span slots{std::max(block.first, in.offsets[e]), std::min(block.last, in.offsets[e + 1])};
    if (slots.first < slots.last) f(e, slots);
  }
}

template <class T>
const T* row_of(const LinearInputs& in, std::int64_t slot) {
  const std::int64_t row = in.row_index == nullptr ? slot : in.row_index[slot];
  return static_cast<const T*>(in.x) + row * in.dims.in_features;
}

// Map of 32 contiguous columns at `first`, of which those below `limit` exist.
inline ColumnMap consecutive(std::int64_t first, std::int64_t limit) {
  ColumnMap map{};
  for (std::int64_t g = 0; g < kPanel / kGranule; ++g) {
    map.offset[g] = first + g * kGranule;
    map.valid[g] = static_cast<std::int32_t>(std::clamp<std::int64_t>(limit - map.offset[g], 0, kGranule));
  }
  return map;
}

// k padded to whole units.
inline std::int64_t padded_k(const GemmKernels& gemm, std::int64_t k) { return round_up(k, gemm.unit); }

// Bias of `count` output columns from `first` on; zeros past the true size.
template <class T>
inline void load_bias(const LinearForward& in, std::int64_t first, std::int64_t count, float* out) {
  const T* bias = static_cast<const T*>(in.bias);
  for (std::int64_t c = 0; c < count; ++c)
    out[c] = first + c < in.dims.out_features ? mpoe::load(bias[first + c]) : 0.0f;
}

// Zeros the rows [first, last) of a result.
inline void zero_rows(void* out, std::int64_t first, std::int64_t last, std::int64_t row_bytes) {
  if (out != nullptr && last > first)
    std::memset(static_cast<char*>(out) + first * row_bytes, 0, static_cast<std::size_t>((last - first) * row_bytes));
}

}  // namespace mpoe
