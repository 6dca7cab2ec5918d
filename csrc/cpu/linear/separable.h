// Separable shapes, jL = iR = 1 (linear.h): steps that their forward and backward share. A slot's
// row of x is [iL, iC]; transposed, [iC, iL], it is iC rows that left maps to [iC, a]: one row t of
// the central product, whose result [jC, b] is jC rows that right maps to [jC, jR]. So left and
// right are products with (number of slots) x iC or jC short rows, and central is one product over
// all slots, whatever their experts.
//
// Few slots are computed otherwise (are_few): central is read in memory order, and panels of it are
// never written to memory. With one slot, that traffic would take all the time. Rows t of the
// slots, and their gradients, are then in the order of central's rows, (a, iC). They are so too if
// the caller makes the products with central (CentralProduct).
#pragma once

#include "cpu/linear/common.h"

namespace mpoe {

// Sizes and strides, in elements, of the intermediate results per slot.
struct SeparableSizes {
  int64_t left_k;    // iL in whole units
  int64_t x_row;     // [iC, left_k]: a row of x, transposed
  int64_t a_k;       // a in whole units
  int64_t t_k;       // [iC, a_k]: after left
  int64_t t_row;     // the same with the gap that row_stride adds
  int64_t padded_b;  // b in whole panels
  int64_t h_k;       // [jC, padded_b]: after central
  SeparableSizes(const GemmKernels& gemm, const BlockDims& d)
      : left_k(padded_k(gemm, d.iL)),
        x_row(d.iC * left_k),
        a_k(padded_k(gemm, d.a)),
        t_k(d.iC * a_k),
        t_row(row_stride(gemm, t_k)),
        padded_b(round_up(d.b, kPanel)),
        h_k(d.jC * padded_b) {}
};

// Rows of which every slot has `per_slot`, adjacent and each `width` elements wide; those of the
// next slot begin `slot_step` elements later.
struct ShortRows {
  int64_t per_slot, slot_step, width;
};

// Stores a tile of at most kMaxRows such rows, from row `first` and column `c` on.
template <class T>
void store_short_rows(const GemmKernels& gemm,
                      const float* tile,
                      int64_t first,
                      int64_t rows,
                      int64_t c,
                      const ShortRows& layout,
                      T* out) {
  int64_t row_offset[kMaxRows];
  for (int64_t r = 0; r < rows; ++r)
    row_offset[r] = (first + r) / layout.per_slot * layout.slot_step +
                    (first + r) % layout.per_slot * layout.width;
  gemm.finish(tile, rows, out, row_offset, 0, consecutive(c, layout.width), Finish{});
}

// Runs of slots, regardless of experts, whose rows of `row_bytes` stay in the L2 cache; at least
// half a strip, however long the rows are.
inline std::vector<Span> slot_blocks(int64_t slots, int64_t row_bytes) {
  const int64_t most = std::max(kStripRows / 2, 512 * 1024 / std::max<int64_t>(row_bytes, 1));
  std::vector<Span> blocks;
  for_each_tile(
      slots, most, [&](int64_t first, int64_t count) { blocks.push_back({first, first + count}); });
  return blocks;
}

// Calls f(block) for runs of the slots whose rows of `row_bytes` stay in the L2 cache; 0: for one
// run a thread.
template <class F>
void for_slot_blocks(int64_t slots, int64_t row_bytes, const F& f) {
  parallel_for(slots, 1, [&](int64_t begin, int64_t end) {
    for (const Span block : slot_blocks(end - begin, row_bytes))
      f(Span{begin + block.first, begin + block.last});
  });
}

// xs[s - slots.first] = x row of slot s as [iC, left_k], zero where padded.
template <class T>
void transpose_rows(const GemmKernels& gemm,
                    const LinearInputs& in,
                    const SeparableSizes& sizes,
                    Span slots,
                    T* xs) {
  const BlockDims& d = in.dims;
  std::vector<T> whole;  // a row with its padding, if there is any
  if (d.padded_in() != d.in_features)
    whole.resize(d.padded_in());
  for (int64_t s = slots.first; s < slots.last; ++s) {
    const T* row = row_of<T>(in, s);
    T* out = xs + (s - slots.first) * sizes.x_row;
    if (!whole.empty()) {
      std::memcpy(whole.data(), row, d.in_features * sizeof(T));
      row = whole.data();
    }
    if (sizes.left_k != d.iL)
      std::memset(out, 0, sizes.x_row * sizeof(T));
    gemm.transpose(row, d.iC, d.iL, d.iC, out, sizes.left_k);
  }
}

// t[s - block.first] = left_e applied to the row of slot s, for the slots of `block`. Keeps the
// transposed rows in xs [block, x_row] if that is given.
template <class T>
void left_step(const GemmKernels& gemm,
               const LinearInputs& in,
               const SeparableSizes& sizes,
               Span block,
               T* xs,
               T* t) {
  const BlockDims& d = in.dims;
  Buffer<T> panels(round_up(d.a, kPanel) * sizes.left_k);
  Buffer<T> scratch(xs == nullptr ? block.size() * sizes.x_row : 0);
  for_each_expert(in, block, [&](int64_t expert, Span slots) {
    const int64_t offset = slots.first - block.first, count = slots.size();
    T* rows = (xs == nullptr ? scratch.get() : xs) + offset * sizes.x_row;
    transpose_rows(gemm, in, sizes, slots, rows);
    gemm.pack(panels.get(), sizes.left_k / gemm.unit, left_of<T>(in, expert), d.a, d.iL, d.a);
    T* out = t + offset * sizes.t_row;
    multiply_all(gemm,
                 count * d.iC,
                 sizes.left_k,
                 rows,
                 sizes.left_k,
                 panels.get(),
                 sizes.a_k,
                 [&](int64_t first, int64_t tile_rows, int64_t c, const float* tile) {
                   // A padding column of zeros is written too.
                   store_short_rows(
                       gemm, tile, first, tile_rows, c, {d.iC, sizes.t_row, sizes.a_k}, out);
                 });
  });
}

constexpr int64_t kFewSlots = 128;
constexpr int64_t kFewSlotsBackward = 64;

// Whether the filled slots are at most `most`, and b is whole units, as contiguous rows of h must
// be.
inline bool are_few(const GemmKernels& gemm, const LinearInputs& in, int64_t most) {
  return in.filled() <= most && in.dims.b % gemm.unit == 0;
}

// left_step with t [block, stride] in the order of central's rows, (a, iC), in whole units.
template <class T>
void left_step_in_order(const GemmKernels& gemm,
                        const LinearInputs& in,
                        const SeparableSizes& sizes,
                        Span block,
                        T* xs,
                        T* t,
                        int64_t stride) {
  const BlockDims& d = in.dims;
  const int64_t size = d.a * d.iC;
  Buffer<T> rows(block.size() * sizes.t_row);
  left_step<T>(gemm, in, sizes, block, xs, rows.get());
  for (int64_t s = 0; s < block.size(); ++s, t += stride) {
    gemm.transpose(rows.get() + s * sizes.t_row, sizes.a_k, d.iC, d.a, t, d.iC);
    std::fill(t + size, t + padded_k(gemm, size), T{});
  }
}

}  // namespace mpoe
