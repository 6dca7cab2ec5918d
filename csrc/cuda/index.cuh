// Index maps: where element (row, column) of a matrix is, when the matrix is really a tensor with several axes.
#pragma once
#include "cuda/device.cuh"

namespace mpoe::cuda {

// Quotient and remainder by a divisor known at launch, for numbers below 2^31 (Granlund and Montgomery, PLDI 1994).
struct FastDiv {
  uint32_t divisor = 1, multiplier = 1, shift = 0;

  FastDiv() = default;
  explicit FastDiv(uint32_t d) : divisor(d) {
    while ((1ull << shift) < d) ++shift;
    multiplier = static_cast<uint32_t>((((1ull << shift) - d) << 32) / d + 1);
  }
  __device__ __forceinline__ uint32_t divide(uint32_t n) const { return (__umulhi(n, multiplier) + n) >> shift; }
};

constexpr int kMaxDigits = 4;

// A position split in two: the slot (whose row may be looked up) and an offset inside the row.
struct Position {
  int slot = 0;
  int inner = 0;
};

// Linear index -> mixed-radix digits, most significant first -> offset. The first digit may be a slot.
struct IndexMap {
  FastDiv size[kMaxDigits];   // of every digit; not needed for the first
  int stride[kMaxDigits] = {};  // in elements
  int digits = 1;
  bool slot_first = false;

  __device__ __forceinline__ Position at(int index) const {
    Position p;
    uint32_t rest = static_cast<uint32_t>(index);
    UNROLL
    for (int d = kMaxDigits - 1; d > 0; --d) {
      if (d < digits) {
        const uint32_t q = size[d].divide(rest);
        p.inner += static_cast<int>(rest - q * size[d].divisor) * stride[d];
        rest = q;
      }
    }
    if (slot_first) {
      p.slot = static_cast<int>(rest);
    } else {
      p.inner += static_cast<int>(rest) * stride[0];
    }
    return p;
  }
};

// A factor of a product as a matrix [mn, k].
struct Operand {
  const void* data = nullptr;
  int64_t expert_stride = 0;  // elements from one expert to the next
  int64_t slot_stride = 0;
  const int64_t* rows = nullptr;  // row of every slot; null: the slot itself
  IndexMap mn, k;
  int limit = 0x7fffffff;  // offsets inside a row from here on read as zero (padded features)
  bool k_major = true;     // adjacent in memory: along k, or along mn
  bool vector = false;     // every aligned run of 16 bytes along that direction is contiguous and aligned

  __device__ __forceinline__ int64_t row_of(int slot) const { return rows ? rows[slot] : slot; }
};

// The result of a product as a matrix [m, n].
struct Output {
  void* data = nullptr;
  int64_t expert_stride = 0, slot_stride = 0;
  IndexMap m, n;
  int limit = 0x7fffffff;
  bool pair = false;        // columns 2j, 2j + 1 are adjacent and aligned as a pair
  bool as_float = false;    // float32, whatever T
  int activation = 0;       // see activation.cuh
  const void* bias = nullptr;            // by offset inside a row
  void* pre_activation = nullptr;        // same layout as data, except for `rows`
  const int64_t* rows = nullptr;         // row of every slot; null: the slot itself
  const float* gates = nullptr;          // factor of every row, applied after rounding; null: none

  __device__ __forceinline__ int64_t row_of(int slot) const { return rows ? rows[slot] : slot; }
};

}  // namespace mpoe::cuda
