#include "cpu/linear_separable.h"

namespace mpoe {

template <class T>
void transpose_rows(
    const GemmKernels& gemm, const LinearInputs& in, const SeparableSizes& sizes, std::int64_t first, std::int64_t last,
    T* xs) {
  const BlockDims& d = in.dims;
  std::vector<T> whole;  // a row with its padding, where there is any
  if (d.padded_in() != d.in_features) whole.resize(d.padded_in());
  for (std::int64_t s = first; s < last; ++s) {
    const T* row = row_of<T>(in, s);
    T* out = xs + (s - first) * sizes.x_row;
    if (!whole.empty()) {
      std::memcpy(whole.data(), row, d.in_features * sizeof(T));
      row = whole.data();
    }
    if (sizes.left_k != d.iL) std::memset(static_cast<void*>(out), 0, sizes.x_row * sizeof(T));
    gemm.transpose(row, d.iC, d.iL, d.iC, out, sizes.left_k);
  }
}

template <class T>
void apply_left(
    const GemmKernels& gemm, const BlockDims& d, const SeparableSizes& sizes, const T* left_panels, const T* xs,
    std::int64_t rows, T* t) {
  alignas(64) float tile[kMaxRows * kPanel];
  const std::int64_t units = sizes.left_k / gemm.unit;
  for (std::int64_t c = 0; c < d.a; c += kPanel) {
    const std::int64_t columns = std::min(kPanel, sizes.a - c);  // a padding column of zeros is written too
    for (std::int64_t i = 0; i < d.iC; ++i) {
      gemm.multiply_rows(
          rows, units, xs + i * sizes.left_k, sizes.x_row / gemm.unit, left_panels + c * sizes.left_k, tile, kPanel,
          false);
      gemm.store(tile, rows, columns, t + i * sizes.a + c, sizes.t_row);
    }
  }
}

template <class T>
void left_step(
    const GemmKernels& gemm, const LinearInputs& in, const SeparableSizes& sizes, const std::vector<SlotTile>& tiles,
    T* kept_rows, T* t) {
  const BlockDims& d = in.dims;
  const T* left = static_cast<const T*>(in.left);
  const std::vector<Span> blocks = tile_blocks(tiles, rows_in_cache(sizes.x_row * sizeof(T), 64));
  parallel_for(0, static_cast<std::int64_t>(blocks.size()), 1, [&](std::int64_t begin, std::int64_t end) {
    Buffer<T> panels(round_up(d.a, kPanel) * sizes.left_k);
    Buffer<T> rows(kept_rows == nullptr ? gemm.best_rows * sizes.x_row : 0);
    std::int64_t packed = -1;
    for (std::int64_t k = blocks[begin].first; k < blocks[end - 1].last; ++k) {
      const SlotTile& tile = tiles[k];
      if (tile.expert != packed) {
        packed = tile.expert;
        gemm.pack(panels.get(), sizes.left_k / gemm.unit, left + packed * d.iL * d.a, d.a, d.iL, d.a);
      }
      T* xs = kept_rows == nullptr ? rows.get() : kept_rows + tile.first * sizes.x_row;
      transpose_rows(gemm, in, sizes, tile.first, tile.first + tile.rows, xs);
      apply_left(gemm, d, sizes, panels.get(), xs, tile.rows, t + tile.first * sizes.t_row);
    }
  });
}

namespace {

// Panels of central, one run of b / 32 panels for every jC: rows of B are (iC, a), columns (jC, b).
template <class T>
void pack_central(const GemmKernels& gemm, const BlockDims& d, const SeparableSizes& sizes, const T* central, T* out) {
  const std::int64_t units = sizes.t_row / gemm.unit;
  const bool together = sizes.b == d.b;  // then columns of several jC lie behind one another
  const std::int64_t group = together ? ceil_divide(4 * kPanel, d.b) : 1;
  parallel_for(0, ceil_divide(d.jC, group), 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t j = begin * group; j < std::min(end * group, d.jC); j += group)
      for (std::int64_t i = 0; i < d.iC; ++i)
        gemm.pack(
            out + j * sizes.b * sizes.t_row + i * sizes.a * kPanel, units, central + (i * d.jC + j) * d.b,
            d.iC * d.jC * d.b, d.a, std::min(group, d.jC - j) * d.b);
  });
}

// What one task of the central and right steps works on.
template <class T>
struct OutputStep {
  const GemmKernels& gemm;
  const LinearForward& in;
  const SeparableSizes& sizes;
  const std::vector<SlotTile>& tiles;
  const T* t;
  const T* central_panels;
  const float* bias;  // [jC, jR in whole panels] or null

  // Slots of the tiles of `block`, columns of `columns` (of jC).
  void run(Span block, Span columns) const {
    const BlockDims& d = in.dims;
    const std::int64_t first = tiles[block.first].first;
    const std::int64_t last = tiles[block.last - 1].first + tiles[block.last - 1].rows;
    const std::int64_t right_k = padded_k(gemm, d.b), right_panels = round_up(d.jR, kPanel);
    Buffer<T> panels(right_panels * right_k), scratch((last - first) * sizes.b);
    const T* right = static_cast<const T*>(in.right);
    std::int64_t packed = -1;
    for (std::int64_t j = columns.first; j < columns.last; ++j) {
      // The result of the central step goes to its final place if it is wanted and needs no padding.
      const bool in_place = in.h != nullptr && sizes.b == d.b;
      T* h = in_place ? static_cast<T*>(in.h) + (first * d.jC + j) * d.b : scratch.get();
      const std::int64_t h_stride = in_place ? sizes.h_row : sizes.b;
      central_step(block, j, h, h_stride);
      if (in.h != nullptr && !in_place)
        for (std::int64_t s = first; s < last; ++s)
          std::memcpy(
              static_cast<T*>(in.h) + (s * d.jC + j) * d.b, h + (s - first) * h_stride, d.b * sizeof(T));
      for (std::int64_t k = block.first; k < block.last; ++k) {
        const SlotTile& tile = tiles[k];
        if (tile.expert != packed) {
          packed = tile.expert;
          gemm.pack(panels.get(), right_k / gemm.unit, right + packed * d.b * d.jR, d.jR, d.b, d.jR);
        }
        right_step(tile, j, h + (tile.first - first) * h_stride, h_stride, panels.get(), right_k);
      }
    }
  }

 private:
  void central_step(Span block, std::int64_t j, T* h, std::int64_t h_stride) const {
    alignas(64) float tile[kMaxRows * kPanel];
    const std::int64_t units = sizes.t_row / gemm.unit, first = tiles[block.first].first;
    for (std::int64_t c = 0; c < sizes.b; c += kPanel)
      for (std::int64_t k = block.first; k < block.last; ++k) {
        const SlotTile& rows = tiles[k];
        gemm.multiply_rows(
            rows.rows, units, t + rows.first * sizes.t_row, units, central_panels + (j * sizes.b + c) * sizes.t_row,
            tile, kPanel, false);
        gemm.store(tile, rows.rows, kPanel, h + (rows.first - first) * h_stride + c, h_stride);
      }
  }

  void right_step(
      const SlotTile& rows, std::int64_t j, const T* h, std::int64_t h_stride, const T* panels,
      std::int64_t right_k) const {
    const BlockDims& d = in.dims;
    alignas(64) float tile[kMaxRows * kPanel];
    T* y = static_cast<T*>(in.y) + rows.first * d.out_features;
    Finish finish{.bias = nullptr, .activation = in.activation, .saved = nullptr};
    if (in.saved != nullptr) finish.saved = static_cast<T*>(in.saved) + rows.first * d.out_features;
    for (std::int64_t c = 0; c < d.jR; c += kPanel) {
      gemm.multiply_rows(
          rows.rows, right_k / gemm.unit, h, h_stride / gemm.unit, panels + c * right_k, tile, kPanel, false);
      if (bias != nullptr) finish.bias = bias + j * round_up(d.jR, kPanel) + c;
      const std::int64_t end = std::min((j + 1) * d.jR, d.out_features);
      gemm.finish(tile, rows.rows, y, nullptr, d.out_features, consecutive(j * d.jR + c, end), finish);
    }
  }
};

template <class T>
void forward(const GemmKernels& gemm, const LinearForward& in) {
  const BlockDims& d = in.dims;
  const SeparableSizes sizes(gemm, d);
  const std::int64_t filled = in.filled(), slots = in.slots;
  const std::int64_t y_bytes = d.out_features * sizeof(T);
  zero_rows(in.y, filled, slots, y_bytes);
  zero_rows(in.saved, filled, slots, y_bytes);
  zero_rows(in.h, filled, slots, d.jC * d.b * sizeof(T));
  if (filled == 0) return;
  const std::vector<SlotTile> tiles = slot_tiles(in, gemm.best_rows);
  Buffer<T> t(slots * sizes.t_row), central_panels(sizes.h_row * sizes.t_row);
  left_step<T>(gemm, in, sizes, tiles, nullptr, t.get());
  pack_central(gemm, d, sizes, static_cast<const T*>(in.central), central_panels.get());
  const std::int64_t bias_row = round_up(d.jR, kPanel);
  Buffer<float> bias(in.bias == nullptr ? 0 : d.jC * bias_row);
  if (in.bias != nullptr) {
    std::fill_n(bias.get(), d.jC * bias_row, 0.0f);
    for (std::int64_t f = 0; f < d.out_features; ++f)
      bias.get()[f / d.jR * bias_row + f % d.jR] = load(static_cast<const T*>(in.bias)[f]);
  }
  const OutputStep<T> step{gemm,    in, sizes, tiles, t.get(), central_panels.get(),
                           in.bias == nullptr ? nullptr : bias.get()};
  const std::vector<Span> blocks = tile_blocks(tiles, rows_in_cache(sizes.t_row * sizeof(T), 64));
  // Few blocks of slots: cut the columns too, so that every thread has work.
  const std::int64_t count = static_cast<std::int64_t>(blocks.size());
  const std::int64_t cuts = std::clamp<std::int64_t>(ceil_divide(2 * num_threads(), count), 1, d.jC);
  const std::int64_t tasks = num_threads() == 1 ? count : count * cuts;
  parallel_for(0, tasks, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t k = begin; k < end; ++k) {
      const std::int64_t parts = tasks / count, part = k % parts;
      step.run(blocks[k / parts], {d.jC * part / parts, d.jC * (part + 1) / parts});
    }
  });
}

}  // namespace

template void transpose_rows<float>(
    const GemmKernels&, const LinearInputs&, const SeparableSizes&, std::int64_t, std::int64_t, float*);
template void transpose_rows<BFloat16>(
    const GemmKernels&, const LinearInputs&, const SeparableSizes&, std::int64_t, std::int64_t, BFloat16*);
template void left_step<float>(
    const GemmKernels&, const LinearInputs&, const SeparableSizes&, const std::vector<SlotTile>&, float*, float*);
template void left_step<BFloat16>(
    const GemmKernels&, const LinearInputs&, const SeparableSizes&, const std::vector<SlotTile>&, BFloat16*,
    BFloat16*);

void separable_forward(const LinearForward& in) {
  const GemmKernels& gemm = gemm_kernels(in.dtype);
  if (in.dtype == Dtype::kBFloat16)
    forward<BFloat16>(gemm, in);
  else
    forward<float>(gemm, in);
}

}  // namespace mpoe
