#include "cpu/linear/separable.h"

namespace mpoe {

namespace {

// Panels of central, b / 32 for every jC: rows of B are (iC, a), columns (jC, b).
template <class T>
void pack_central(const GemmKernels& gemm,
                  const BlockDims& d,
                  const SeparableSizes& sizes,
                  const T* central,
                  T* out) {
  const bool together = sizes.padded_b == d.b;  // then columns of several jC are contiguous
  const int64_t group = together ? ceil_divide(4 * kPanel, d.b) : 1;
  parallel_for_each(ceil_divide(d.jC, group), 1, [&](int64_t g) {
    const int64_t j = g * group;
    for (int64_t i = 0; i < d.iC; ++i)
      gemm.pack(out + j * sizes.padded_b * sizes.t_k + i * sizes.a_k * kPanel,
                sizes.t_k / gemm.unit,
                central + (i * d.jC + j) * d.b,
                d.iC * d.jC * d.b,
                d.a,
                std::min(group, d.jC - j) * d.b);
  });
}

// The bias as float32 [jC, row], where row is jR in whole panels; empty without a bias.
template <class T>
struct BiasRows {
  int64_t row;
  Buffer<float> values;

  explicit BiasRows(const LinearForward& in) : row(round_up(in.dims.jR, kPanel)) {
    const BlockDims& d = in.dims;
    if (in.bias == nullptr)
      return;
    values = zeros<float>(d.jC * row);
    for (int64_t j = 0; j < d.jC; ++j)
      load_bias<T>(in, j * d.jR, d.jR, values.get() + j * row);
  }
};

template <class T>
struct OutputStep {
  const GemmKernels& gemm;
  const LinearForward& in;
  const SeparableSizes& sizes;
  const T* central_panels;
  const BiasRows<T>& bias;

  // Central and right steps of a block for the jC in `columns`; t holds the block's rows.
  void run(Span block, Span columns, const T* t) const {
    const int64_t count = block.size();
    // As many jC at a time as keep the central step's result in cache for the right step.
    const int64_t row_bytes = count * sizes.padded_b * int64_t{sizeof(T)};
    const int64_t group = std::clamp<int64_t>(256 * 1024 / row_bytes, 1, columns.size());
    Buffer<T> h(count * group * sizes.padded_b);
    for (int64_t j = columns.first; j < columns.last; j += group) {
      const Span part{j, std::min(j + group, columns.last)};
      central_step(block, part, t, h.get());
      right_step(block, part, h.get(), sizes.padded_b);
    }
  }

  // y of `block` for the jC in `part`, from h [block, part, h_row].
  void right_step(Span block, Span part, const T* h, int64_t h_row) const {
    const BlockDims& d = in.dims;
    const int64_t right_k = padded_k(gemm, d.b);
    Buffer<T> panels(round_up(d.jR, kPanel) * right_k);
    for_each_expert(in, block, [&](int64_t expert, Span slots) {
      gemm.pack(panels.get(), right_k / gemm.unit, right_of<T>(in, expert), d.jR, d.b, d.jR);
      const int64_t first_row = (slots.first - block.first) * part.size();
      right_product(slots, part, h + first_row * h_row, h_row, panels.get(), right_k);
    });
  }

 private:
  // h [block, part, b]
  void central_step(Span block, Span part, const T* t, T* h) const {
    const BlockDims& d = in.dims;
    const int64_t width = part.size() * sizes.padded_b;
    multiply_all(gemm,
                 block.size(),
                 sizes.t_k,
                 t,
                 sizes.t_row,
                 central_panels + part.first * sizes.padded_b * sizes.t_k,
                 width,
                 [&](int64_t first, int64_t rows, int64_t c, const float* tile) {
                   gemm.store(tile, rows, kPanel, h + first * width + c, width);
                   if (in.h == nullptr)
                     return;
                   const int64_t j = part.first + c / sizes.padded_b, column = c % sizes.padded_b;
                   T* kept =
                       static_cast<T*>(in.h) + ((block.first + first) * d.jC + j) * d.b + column;
                   gemm.store(tile, rows, std::min(kPanel, d.b - column), kept, d.jC * d.b);
                 });
  }

  // y of `slots`, all of one expert.
  void right_product(
      Span slots, Span part, const T* h, int64_t h_row, const T* panels, int64_t right_k) const {
    const BlockDims& d = in.dims;
    const int64_t width = part.size(), total = slots.size() * width;
    // About one strip ahead.
    const int64_t later_rows = ceil_divide(kStripRows, width) * d.out_features;
    T* y = static_cast<T*>(in.y);
    Finish finish{.activation = in.activation, .saved = in.saved};
    // If the last columns do not exist, rows of different jC end differently.
    const bool whole = d.padded_out() == d.out_features;
    multiply_all(gemm,
                 total,
                 right_k,
                 h,
                 h_row,
                 panels,
                 d.jR,
                 [&](int64_t first, int64_t rows, int64_t c, const float* tile) {
                   int64_t row_offset[kMaxRows], bias_offset[kMaxRows];
                   const int64_t slot = slots.first + first / width;
                   int64_t start = slot * d.out_features, j = part.first + first % width;
                   for (int64_t r = 0; r < rows; ++r) {
                     row_offset[r] = start + j * d.jR;
                     bias_offset[r] = j * bias.row;
                     // A write waits for its cache line, and the writes after it wait too: prefetch those of
                     // the next strip.
                     if (first + r + kStripRows < total) {
                       const T* later = y + row_offset[r] + later_rows + c;
                       for (int64_t i = 0; i < kPanel * int64_t{sizeof(T)}; i += 64)
                         __builtin_prefetch(reinterpret_cast<const char*>(later) + i, 1, 2);
                     }
                     if (++j == part.last) {
                       j = part.first;
                       start += d.out_features;
                     }
                   }
                   finish.bias = bias.values ? bias.values.get() + c : nullptr;
                   finish.bias_offset = bias_offset;
                   if (whole)
                     return gemm.finish(tile, rows, y, row_offset, 0, consecutive(c, d.jR), finish);
                   for (int64_t r = 0; r < rows; ++r) {
                     const int64_t end =
                         std::min(d.jR, d.out_features - (part.first + (first + r) % width) * d.jR);
                     finish.bias_offset = bias_offset + r;
                     gemm.finish(
                         tile + r * kPanel, 1, y, row_offset + r, 0, consecutive(c, end), finish);
                   }
                 });
  }
};

// h [filled, jC b] from rows `t` of the slots, `row` apart and in the order of central's rows: (a,
// iC). Central is packed piece by piece, and every piece is multiplied immediately.
template <class T>
void central_of_few(
    const GemmKernels& gemm, const LinearForward& in, const T* t, int64_t row, T* h) {
  const BlockDims& d = in.dims;
  const int64_t filled = in.filled(), k = d.a * d.iC, n = d.jC * d.b, unit = gemm.unit;
  // Sums of a strip of columns stay in cache throughout the loop over k; the fewer the slots, the
  // wider the strip and the fewer rows of central at a time, so that these are read nearly in
  // memory order.
  constexpr int64_t kGroup = 4 * kPanel;  // columns packed at a time
  constexpr int64_t kLongestSum = 512;    // units of k; sums of later ones are added
  const int64_t most_units = std::clamp<int64_t>(round_up(filled, 8), 32, kFewSlots);
  const int64_t most_columns = kFewSlots * kFewSlots * 2 / most_units / kGroup * kGroup;
  parallel_for(ceil_divide(n, kPanel), 1, [&](int64_t begin, int64_t end) {
    const int64_t last = std::min(n, end * kPanel),
                  stride = std::min(most_columns, round_up(last, kPanel));
    Buffer<T> panels(kGroup * most_units * unit);
    Buffer<float> sums(filled * stride), part(filled * stride);
    for (int64_t strip = begin * kPanel; strip < last; strip += most_columns) {
      const int64_t columns = std::min(most_columns, last - strip);
      for (int64_t first_k = 0; first_k < k; first_k += kLongestSum * unit) {
        float* sum = first_k == 0 ? sums.get() : part.get();
        const int64_t last_k = std::min(k, first_k + kLongestSum * unit);
        for (int64_t i = first_k; i < last_k; i += most_units * unit) {
          const int64_t count = std::min(most_units * unit, last_k - i),
                        units = ceil_divide(count, unit);
          const T* rows_of_central = static_cast<const T*>(in.central) + i * n + strip;
          for (int64_t c = 0; c < columns; c += kPanel) {
            const int64_t place = c % kGroup;
            if (place == 0)
              gemm.pack(panels.get(),
                        units,
                        rows_of_central + c,
                        n,
                        count,
                        std::min(kGroup, columns - c));
            for_each_tile(filled, gemm.best_rows, [&](int64_t first, int64_t rows) {
              gemm.multiply_rows(rows,
                                 units,
                                 t + first * row + i,
                                 row / unit,
                                 panels.get() + place * units * unit,
                                 sum + first * stride + c,
                                 stride,
                                 i > first_k);
            });
          }
        }
        if (first_k == 0)
          continue;
        for (int64_t s = 0; s < filled; ++s)
          for (int64_t c = 0; c < columns; ++c)
            sums.get()[s * stride + c] += part.get()[s * stride + c];
      }
      for (int64_t s = 0; s < filled; ++s)
        gemm.round_row(sums.get() + s * stride, h + s * n + strip, columns);
    }
  });
}

// The left step of all slots, then `central`, then the right step. Rows t are in the order of
// central's, `t_row` apart; block_bytes: see for_slot_blocks.
template <class T, class Central>
void forward_in_order(const GemmKernels& gemm,
                      const LinearForward& in,
                      const SeparableSizes& sizes,
                      T* t,
                      int64_t t_row,
                      T* h,
                      int64_t block_bytes,
                      const Central& central) {
  const BlockDims& d = in.dims;
  for_slot_blocks(in.filled(), block_bytes, [&](Span block) {
    left_step_in_order<T>(gemm, in, sizes, block, nullptr, t + block.first * t_row, t_row);
  });
  central();
  const BiasRows<T> bias(in);
  const OutputStep<T> step{gemm, in, sizes, nullptr, bias};
  const int64_t h_row = d.jC * d.b;
  for_slot_blocks(in.filled(), block_bytes, [&](Span block) {
    step.right_step(block, {0, d.jC}, h + block.first * h_row, d.b);
  });
}

template <class T>
void forward_of_few(const GemmKernels& gemm, const LinearForward& in, const SeparableSizes& sizes) {
  const BlockDims& d = in.dims;
  const int64_t filled = in.filled(), t_row = row_stride(gemm, d.a * d.iC);
  Buffer<T> t(filled * t_row), own_h(in.h == nullptr ? filled * d.jC * d.b : 0);
  T* h = in.h == nullptr ? own_h.get() : static_cast<T*>(in.h);
  forward_in_order(
      gemm, in, sizes, t.get(), t_row, h, 0, [&] { central_of_few(gemm, in, t.get(), t_row, h); });
}

// With the caller's product.
template <class T>
void forward_around_product(const GemmKernels& gemm,
                            const LinearForward& in,
                            const SeparableSizes& sizes) {
  const BlockDims& d = in.dims;
  const int64_t block_bytes = std::max(d.padded_in(), d.padded_out()) * int64_t{sizeof(T)};
  T* t = static_cast<T*>(in.product->t);
  forward_in_order(
      gemm, in, sizes, t, d.a * d.iC, static_cast<T*>(in.h), block_bytes, in.product->multiply);
}

template <class T>
void forward(const GemmKernels& gemm, const LinearForward& in) {
  const BlockDims& d = in.dims;
  const SeparableSizes sizes(gemm, d);
  const int64_t filled = in.filled();
  if (!zero_the_rest<T>(in))
    return;
  if (in.product != nullptr)
    return forward_around_product<T>(gemm, in, sizes);
  if (are_few(gemm, in, kFewSlots))
    return forward_of_few<T>(gemm, in, sizes);
  Buffer<T> central_panels(sizes.h_k * sizes.t_k);
  pack_central(gemm, d, sizes, static_cast<const T*>(in.central), central_panels.get());
  const BiasRows<T> bias(in);
  const OutputStep<T> step{gemm, in, sizes, central_panels.get(), bias};
  const std::vector<Span> blocks = slot_blocks(filled, sizes.t_row * sizeof(T));
  const int64_t count = std::ssize(blocks);
  if (num_threads() == 1 || count >= 4 * num_threads()) {
    parallel_for(count, 1, [&](int64_t begin, int64_t end) {
      Buffer<T> t((blocks[0].size() + 1) * sizes.t_row);
      for (int64_t k = begin; k < end; ++k) {
        left_step<T>(gemm, in, sizes, blocks[k], nullptr, t.get());
        step.run(blocks[k], {0, d.jC}, t.get());
      }
    });
    return;
  }
  // Few slots per thread: split them more finely for the left step; for the other steps, split the
  // columns too.
  Buffer<T> t(filled * sizes.t_row);
  parallel_for(filled, 1, [&](int64_t begin, int64_t end) {
    left_step<T>(gemm, in, sizes, {begin, end}, nullptr, t.get() + begin * sizes.t_row);
  });
  const int64_t parts = std::clamp<int64_t>(ceil_divide(4 * num_threads(), count), 1, d.jC);
  parallel_for_each(count * parts, 1, [&](int64_t k) {
    const int64_t part = k % parts;
    const Span block = blocks[k / parts];
    step.run(block,
             {d.jC * part / parts, d.jC * (part + 1) / parts},
             t.get() + block.first * sizes.t_row);
  });
}

}  // namespace

void separable_forward(const LinearForward& in) {
  with_element_type(in.dtype, [&]<class T>(const GemmKernels& gemm, T) { forward<T>(gemm, in); });
}

}  // namespace mpoe
