// Steps that the forward and the backward of separable shapes share.
#pragma once

#include "cpu/linear_common.h"

namespace mpoe {

// Sizes and strides, in elements, of the intermediate results per slot.
struct SeparableSizes {
  std::int64_t left_k;       // iL in whole units
  std::int64_t x_row;        // [iC, left_k]: a row of x, transposed
  std::int64_t a;            // a in whole units
  std::int64_t t_row;        // [iC, a]: after left
  std::int64_t b;            // b in whole panels
  std::int64_t h_row;        // [jC, b]: after central
  SeparableSizes(const GemmKernels& gemm, const BlockDims& d)
      : left_k(padded_k(gemm, d.iL)), x_row(d.iC * left_k), a(padded_k(gemm, d.a)), t_row(d.iC * a),
        b(round_up(d.b, kPanel)), h_row(d.jC * b) {}
};

// Slots whose rows of `row_bytes` fill about half of a second-level cache.
inline std::int64_t rows_in_cache(std::int64_t row_bytes, std::int64_t least) {
  return std::max<std::int64_t>(least, 512 * 1024 / std::max<std::int64_t>(row_bytes, 1));
}

// xs[s - first_slot] = x row of slot s as [iC, left_k], zero where padded.
template <class T>
void transpose_rows(
    const GemmKernels& gemm, const LinearInputs& in, const SeparableSizes& sizes, std::int64_t first, std::int64_t last,
    T* xs);

// t[s] = left_e applied to the transposed rows xs of a tile: [iC, a].
template <class T>
void apply_left(
    const GemmKernels& gemm, const BlockDims& dims, const SeparableSizes& sizes, const T* left_panels, const T* xs,
    std::int64_t rows, T* t);

// t of every filled slot; keeps the transposed rows in `kept_rows` [N, x_row] if that is given.
template <class T>
void left_step(
    const GemmKernels& gemm, const LinearInputs& in, const SeparableSizes& sizes, const std::vector<SlotTile>& tiles,
    T* kept_rows, T* t);

}  // namespace mpoe
