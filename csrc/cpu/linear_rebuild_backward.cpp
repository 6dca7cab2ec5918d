// Backward of the rebuild strategy, one expert after the other: dx = dz W^T by the slabs of the forward, transposed, and for
// the same blocks dW = x^T dz, projected at once:
//   dright = LC^T dW,  dLC = dW right^T,  dleft = dLC central^T,  dcentral += left^T dLC.
// Threads share the blocks of iC: dx and dcentral have their own columns there; dleft and dright are kept per block of iC
// and summed in its order, so that the number of threads changes nothing.
#include "cpu/linear_rebuild.h"

namespace mpoe {
namespace {

// Which gradients of blocks are wanted, and what they need.
struct Wanted {
  bool x, left, central, right;
  explicit Wanted(const LinearBackward& in)
      : x(in.dx != nullptr), left(in.dleft != nullptr), central(in.dcentral != nullptr), right(in.dright != nullptr) {}
  bool weight() const { return left || central || right; }
  bool half_gradient() const { return left || central; }
};

struct BackwardSizes {
  std::int64_t a_panels, b_panels, left_panels, right_panels;  // whole panels, as columns
  std::int64_t left_units, right_units, b_units;               // iL jL, iR jR and b as inner sizes
  std::int64_t x_panels, dz_panels;                            // of one iC and of one jC
  std::int64_t half_row, weight_row, left_turned_row, dz_row;  // strides in elements
  std::int64_t pairs;                                          // (iC, jC) of a block, at most
  std::int64_t right_sums, left_sums;                          // floats

  BackwardSizes(const GemmKernels& gemm, const BlockDims& d, const RebuildPlan& plan, std::int64_t element_bytes)
      : a_panels(ceil_divide(d.a, kPanel)), b_panels(ceil_divide(d.b, kPanel)),
        left_panels(ceil_divide(plan.left_rows, kPanel)), right_panels(ceil_divide(plan.right_columns, kPanel)),
        left_units(ceil_divide(plan.left_rows, gemm.unit)), right_units(ceil_divide(plan.right_columns, gemm.unit)),
        b_units(ceil_divide(d.b, gemm.unit)), x_panels(ceil_divide(d.iL * d.iR, kPanel)),
        dz_panels(ceil_divide(d.jL * ceil_divide(d.jR, kGranule) * kGranule, kPanel)),
        pairs(plan.k_block * plan.n_block) {
    const auto stride = [&](std::int64_t elements) {
      return element_bytes == 2 ? row_stride<BFloat16>(elements) : row_stride<float>(elements);
    };
    half_row = stride(b_panels * kPanel);
    weight_row = stride(right_panels * kPanel);
    left_turned_row = stride(left_units * gemm.unit);
    dz_row = stride(plan.panel_units() * gemm.unit);
    right_sums = right_panels * b_panels * kPanel * kPanel;
    left_sums = left_panels * a_panels * kPanel * kPanel;
  }
};

// What all blocks of one expert read.
template <class T>
struct ExpertRows {
  const GemmKernels& gemm;
  const LinearBackward& in;
  const RebuildPlan& plan;
  const BackwardSizes& sizes;
  const Wanted& wanted;
  ExpertBlocks<T> blocks;
  Buffer<T> right_turned;  // panels of right^T [(iR jR), b]
  Buffer<T> left_turned;   // [a, iL jL]
  Buffer<T> gradient;      // dz, unless it is grad itself
  Buffer<T> dz_rows;       // [blocks of jC, count, dz_row]
  Buffer<T> dz_panels;     // [jC, dz_panels, slots in units, 32]
  Buffer<T> x_panels;      // [iC, x_panels, slots in units, 32]
  Buffer<T> x_rows;        // [iC, count, iL iR]
  const T* dz = nullptr;   // [count, F]
  std::int64_t first = 0, count = 0, units = 0;  // slots, and as an inner size

  ExpertRows(
      const GemmKernels& gemm_, const LinearBackward& in_, const RebuildPlan& plan_, const BackwardSizes& sizes_,
      const Wanted& wanted_, std::int64_t most)
      : gemm(gemm_), in(in_), plan(plan_), sizes(sizes_), wanted(wanted_), blocks(gemm_, in_.dims, plan_) {
    const BlockDims& d = in.dims;
    const std::int64_t most_units = ceil_divide(most, gemm.unit);
    if (in.activation != Activation::kNone) gradient = Buffer<T>(most * d.out_features);
    if (wanted.x) dz_rows = Buffer<T>(plan.k_blocks() * most * sizes.dz_row);
    if (!wanted.weight()) return;
    dz_panels = Buffer<T>(d.jC * sizes.dz_panels * most_units * kPanel * gemm.unit);
    x_panels = Buffer<T>(d.iC * sizes.x_panels * most_units * kPanel * gemm.unit);
    x_rows = Buffer<T>(d.iC * most * d.iL * d.iR);
    right_turned = Buffer<T>(sizes.b_panels * sizes.right_units * kPanel * gemm.unit);
    left_turned = Buffer<T>(d.a * sizes.left_turned_row);
    std::fill_n(left_turned.get(), d.a * sizes.left_turned_row, T{});
  }

  void load(std::int64_t expert) {
    const BlockDims& d = in.dims;
    first = in.offsets[expert];
    count = in.offsets[expert + 1] - first;
    units = ceil_divide(count, gemm.unit);
    load_gradient();
    if (wanted.x || wanted.weight()) blocks.load(gemm, in, plan, expert);
    if (wanted.x)
      parallel_for(0, plan.k_blocks(), 1, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t kb = begin; kb < end; ++kb)
          arrange_rows<T>(
              plan.k, gemm.unit, plan.k_span(kb), count, [&](std::int64_t t) { return dz + t * d.out_features; },
              dz_rows.get() + kb * count * sizes.dz_row, sizes.dz_row);
      });
    if (!wanted.weight()) return;
    const T* right = static_cast<const T*>(in.right) + expert * d.b * plan.right_columns;
    gemm.pack_transposed(
        right_turned.get(), sizes.right_units, right, plan.right_columns, plan.right_columns, d.b);
    const T* left = static_cast<const T*>(in.left) + expert * plan.left_rows * d.a;
    gemm.transpose(left, d.a, plan.left_rows, d.a, left_turned.get(), sizes.left_turned_row);
    load_panels();
  }

 private:
  void load_gradient() {
    const std::int64_t width = in.dims.out_features;
    const T* grad = static_cast<const T*>(in.grad) + first * width;
    dz = grad;
    if (in.activation == Activation::kNone) return;
    const T* saved = static_cast<const T*>(in.saved) + first * width;
    parallel_for(0, count, 16, [&](std::int64_t begin, std::int64_t end) {
      gemm.activation_backward(
          in.activation, grad + begin * width, saved + begin * width, gradient.get() + begin * width,
          (end - begin) * width);
    });
    dz = gradient.get();
  }

  void load_panels() {
    const BlockDims& d = in.dims;
    const Side out = out_side(d), input = in_side(d);
    const std::int64_t panel = units * kPanel * gemm.unit;
    parallel_for(0, d.jC * sizes.dz_panels, 4, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t k = begin; k < end; ++k) {
        const std::int64_t j = k / sizes.dz_panels;
        const ColumnMap columns = side_columns(out, {j, j + 1}, k % sizes.dz_panels);
        gemm.pack_granules(dz_panels.get() + k * panel, dz, d.out_features, count, columns);
      }
    });
    parallel_for(0, d.iC, 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) {
        T* rows = x_rows.get() + i * count * d.iL * d.iR;
        arrange_rows<T>(
            input, 1, {i, i + 1}, count, [&](std::int64_t t) { return row_of<T>(in, first + t); }, rows, d.iL * d.iR);
        gemm.pack(x_panels.get() + i * sizes.x_panels * panel, units, rows, d.iL * d.iR, count, d.iL * d.iR);
      }
    });
  }
};

// Sums that outlive a block.
struct BackwardSums {
  Buffer<float> right;    // [blocks of iC, panels of iR jR, b in whole panels, 32]
  Buffer<float> left;     // [blocks of iC, panels of iL jL, a in whole panels, 32], transposed
  Buffer<float> central;  // [iC, jC, panels of b, a, 32]
};

// What a thread needs for the blocks that it computes.
template <class T>
class BackwardWorker {
 public:
  BackwardWorker(const ExpertRows<T>& rows, BackwardSums& sums, const T* central_rows, T* slot_gradient, std::int64_t most)
      : rows_(rows), gemm_(rows.gemm), in_(rows.in), plan_(rows.plan), sizes_(rows.sizes), wanted_(rows.wanted),
        sums_(sums), central_rows_(central_rows), dx_(slot_gradient),
        central_(sizes_.b_panels * kPanel * padded_k(gemm_, in_.dims.a)),
        half_(sizes_.pairs * plan_.left_rows * sizes_.half_row) {
    const std::int64_t half_units = ceil_divide(sizes_.pairs * plan_.left_rows, gemm_.unit);
    if (wanted_.x) {
      slab_ = Buffer<T>(plan_.slab_units() * gemm_.unit);
      std::fill_n(slab_.get(), plan_.slab_units() * gemm_.unit, T{});  // columns that no granule fills
      x_sums_ = Buffer<float>(plan_.panels(plan_.n_block) * most * kPanel);
    }
    if (!wanted_.weight()) return;
    weight_ = Buffer<T>(sizes_.pairs * plan_.left_rows * sizes_.weight_row);
    std::fill_n(weight_.get(), sizes_.pairs * plan_.left_rows * sizes_.weight_row, T{});  // padding of the rows
    if (wanted_.right) {
      half_panels_ = Buffer<T>(sizes_.b_panels * half_units * kPanel * gemm_.unit);
      weight_panels_ = Buffer<T>(sizes_.right_panels * half_units * kPanel * gemm_.unit);
    }
    if (wanted_.half_gradient()) {
      dhalf_ = Buffer<T>(sizes_.pairs * plan_.left_rows * sizes_.half_row);
      dhalf_panels_ = Buffer<T>(
          std::max(sizes_.left_panels * sizes_.b_units, sizes_.b_panels * sizes_.left_units) * kPanel * gemm_.unit);
    }
    const BlockDims& d = in_.dims;
    for (std::int64_t i = 0; i < d.iL; ++i)
      for (std::int64_t r = 0; r < d.iR; ++r) row_offset_.push_back(i * d.jL * sizes_.weight_row + r * d.jR);
    for (std::int64_t p = 0; p < sizes_.dz_panels; ++p) {
      ColumnMap map = side_columns({d.jL, 1, d.jR, d.jL * d.jR}, {0, 1}, p);
      for (std::int64_t g = 0; g < kPanel / kGranule; ++g)
        map.offset[g] = map.offset[g] / d.jR * sizes_.weight_row + map.offset[g] % d.jR;
      weight_columns_.push_back(map);
    }
  }

  void run(std::int64_t n_block) {
    const Span i_range = plan_.n_span(n_block);
    for (std::int64_t kb = 0; kb < plan_.k_blocks(); ++kb) {
      const Span j_range = plan_.k_span(kb);
      if (wanted_.x || wanted_.right)
        build_half(
            gemm_, in_, rows_.blocks.left.get(), rows_.blocks.left_stride, i_range, j_range, central_.get(), half_.get());
      if (wanted_.x) {
        build_slab(
            gemm_, in_.dims, plan_, j_range, i_range, half_.get(), rows_.blocks.right.get(), slab_.get());
        multiply_slab(
            gemm_, plan_, j_range, i_range, rows_.dz_rows.get() + kb * rows_.count * sizes_.dz_row, sizes_.dz_row,
            rows_.count, slab_.get(), x_sums_.get(), kb > 0);
      }
      if (!wanted_.weight()) continue;
      weight_gradient(i_range, j_range);
      if (wanted_.right) right_gradient(i_range, j_range, n_block, kb > 0);
      if (wanted_.half_gradient()) half_gradient(i_range, j_range, n_block, kb > 0);
    }
    if (wanted_.x) finish_x(i_range);
  }

 private:
  // weight_ [(iC jC), (iL jL), (iR jR)] = x^T dz
  void weight_gradient(Span i_range, Span j_range) {
    alignas(64) float tile[kMaxRows * kPanel];
    const std::int64_t units = rows_.units, panel = units * kPanel * gemm_.unit;
    T* out = weight_.get();
    for (std::int64_t i = i_range.first; i < i_range.last; ++i)
      for (std::int64_t j = j_range.first; j < j_range.last; ++j, out += plan_.left_rows * sizes_.weight_row) {
        const T* dz = rows_.dz_panels.get() + j * sizes_.dz_panels * panel;
        for_column_tiles(
            gemm_, in_.dims.iL * in_.dims.iR, units, rows_.x_panels.get() + i * sizes_.x_panels * panel,
            sizes_.dz_panels, [&](const T* columns, std::int64_t first, std::int64_t count, std::int64_t p) {
              multiply_columns(gemm_, count, units, columns, dz + p * panel, tile, false);
              gemm_.finish(tile, count, out, row_offset_.data() + first, 0, weight_columns_[p], Finish{});
            });
      }
  }

  std::int64_t block_rows(Span i_range, Span j_range) const {
    return (i_range.last - i_range.first) * (j_range.last - j_range.first) * plan_.left_rows;
  }

  void right_gradient(Span i_range, Span j_range, std::int64_t n_block, bool accumulate) {
    const BlockDims& d = in_.dims;
    const std::int64_t k = block_rows(i_range, j_range), units = ceil_divide(k, gemm_.unit);
    gemm_.pack(half_panels_.get(), units, half_.get(), sizes_.half_row, k, d.b);
    gemm_.pack(weight_panels_.get(), units, weight_.get(), sizes_.weight_row, k, plan_.right_columns);
    float* sums = sums_.right.get() + n_block * sizes_.right_sums;
    for_column_tiles(
        gemm_, d.b, units, half_panels_.get(), sizes_.right_panels,
        [&](const T* columns, std::int64_t first, std::int64_t count, std::int64_t p) {
          multiply_columns(
              gemm_, count, units, columns, weight_panels_.get() + p * units * kPanel * gemm_.unit,
              sums + (p * sizes_.b_panels * kPanel + first) * kPanel, accumulate);
        });
  }

  void half_gradient(Span i_range, Span j_range, std::int64_t n_block, bool accumulate) {
    const BlockDims& d = in_.dims;
    alignas(64) float tile[kMaxRows * kPanel];
    for_each_tile(block_rows(i_range, j_range), gemm_.best_rows, [&](std::int64_t first, std::int64_t count) {
      for (std::int64_t c = 0; c < sizes_.b_panels; ++c) {
        multiply_rows(
            gemm_, count, sizes_.right_units, weight_.get() + first * sizes_.weight_row, sizes_.weight_row,
            rows_.right_turned.get() + c * sizes_.right_units * kPanel * gemm_.unit, tile, false);
        gemm_.store(tile, count, kPanel, dhalf_.get() + first * sizes_.half_row + c * kPanel, sizes_.half_row);
      }
    });
    const T* dhalf = dhalf_.get();
    const std::int64_t b = padded_k(gemm_, d.b);
    for (std::int64_t i = i_range.first; i < i_range.last; ++i)
      for (std::int64_t j = j_range.first; j < j_range.last; ++j, dhalf += plan_.left_rows * sizes_.half_row) {
        const std::int64_t pair = i * d.jC + j;
        if (wanted_.left) {
          gemm_.pack_transposed(dhalf_panels_.get(), sizes_.b_units, dhalf, sizes_.half_row, d.b, plan_.left_rows);
          rows_times_panels(
              gemm_, d.a, sizes_.b_units, central_rows_ + pair * b, d.iC * d.jC * b, dhalf_panels_.get(),
              sizes_.b_units, sizes_.left_panels, sums_.left.get() + n_block * sizes_.left_sums, sizes_.a_panels * kPanel, accumulate);
          accumulate = true;
        }
        if (wanted_.central) {
          gemm_.pack(dhalf_panels_.get(), sizes_.left_units, dhalf, sizes_.half_row, plan_.left_rows, d.b);
          rows_times_panels(
              gemm_, d.a, sizes_.left_units, rows_.left_turned.get(), sizes_.left_turned_row, dhalf_panels_.get(),
              sizes_.left_units, sizes_.b_panels, sums_.central.get() + pair * sizes_.b_panels * d.a * kPanel, d.a, true);
        }
      }
  }

  void finish_x(Span i_range) {
    const std::int64_t features = in_.dims.in_features;
    T* out = dx_ + rows_.first * features;
    for (std::int64_t p = 0; p < plan_.panels(i_range.last - i_range.first); ++p)
      gemm_.finish(
          x_sums_.get() + p * rows_.count * kPanel, rows_.count, out, nullptr, features, plan_.columns(i_range, p),
          Finish{});
  }

  const ExpertRows<T>& rows_;
  const GemmKernels& gemm_;
  const LinearBackward& in_;
  const RebuildPlan& plan_;
  const BackwardSizes& sizes_;
  const Wanted& wanted_;
  BackwardSums& sums_;
  const T* central_rows_;  // central with b in whole units
  T* dx_;                  // [N, I]
  Buffer<T> central_, half_, slab_, weight_, half_panels_, weight_panels_, dhalf_, dhalf_panels_;
  Buffer<float> x_sums_;
  std::vector<std::int64_t> row_offset_;   // of (iL iR) in weight_
  std::vector<ColumnMap> weight_columns_;  // of the panels of one jC
};

// Sums over the blocks of iC, into the first of them.
void sum_blocks(float* sums, std::int64_t blocks, std::int64_t size) {
  for (std::int64_t block = 1; block < blocks; ++block)
    for (std::int64_t k = 0; k < size; ++k) sums[k] += sums[block * size + k];
}

template <class T>
void store_auxiliary(
    const ExpertRows<T>& rows, BackwardSums& sums, std::int64_t expert) {
  const BlockDims& d = rows.in.dims;
  const RebuildPlan& plan = rows.plan;
  const BackwardSizes& sizes = rows.sizes;
  std::vector<float> row(std::max(sizes.right_panels * kPanel, d.a));
  if (rows.wanted.right) {
    sum_blocks(sums.right.get(), plan.n_blocks(), sizes.right_sums);
    T* out = static_cast<T*>(rows.in.dright) + expert * d.b * plan.right_columns;
    for (std::int64_t b = 0; b < d.b; ++b) {
      for (std::int64_t p = 0; p < sizes.right_panels; ++p)
        std::memcpy(
            row.data() + p * kPanel, sums.right.get() + (p * sizes.b_panels * kPanel + b) * kPanel,
            kPanel * sizeof(float));
      rows.gemm.round_row(row.data(), out + b * plan.right_columns, plan.right_columns);
    }
  }
  if (rows.wanted.left) {
    sum_blocks(sums.left.get(), plan.n_blocks(), sizes.left_sums);
    T* out = static_cast<T*>(rows.in.dleft) + expert * plan.left_rows * d.a;
    for (std::int64_t l = 0; l < plan.left_rows; ++l) {
      const float* column = sums.left.get() + l / kPanel * sizes.a_panels * kPanel * kPanel + l % kPanel;
      for (std::int64_t a = 0; a < d.a; ++a) row[a] = column[a * kPanel];
      rows.gemm.round_row(row.data(), out + l * d.a, d.a);
    }
  }
}

template <class T>
void store_central(const GemmKernels& gemm, const LinearBackward& in, const BackwardSizes& sizes, const float* sums) {
  const BlockDims& d = in.dims;
  parallel_for(0, d.a, 8, [&](std::int64_t begin, std::int64_t end) {
    std::vector<float> row(sizes.b_panels * kPanel);
    for (std::int64_t a = begin; a < end; ++a)
      for (std::int64_t pair = 0; pair < d.iC * d.jC; ++pair) {
        for (std::int64_t p = 0; p < sizes.b_panels; ++p)
          std::memcpy(
              row.data() + p * kPanel, sums + ((pair * sizes.b_panels + p) * d.a + a) * kPanel, kPanel * sizeof(float));
        gemm.round_row(row.data(), static_cast<T*>(in.dcentral) + (a * d.iC * d.jC + pair) * d.b, d.b);
      }
  });
}

// central [a, iC jC, b in whole units] where b is not.
template <class T>
Buffer<T> pad_central(const GemmKernels& gemm, const LinearBackward& in) {
  const BlockDims& d = in.dims;
  const std::int64_t rows = d.a * d.iC * d.jC, width = padded_k(gemm, d.b);
  Buffer<T> padded(rows * width);
  std::fill_n(padded.get(), rows * width, T{});
  for (std::int64_t r = 0; r < rows; ++r)
    std::memcpy(padded.get() + r * width, static_cast<const T*>(in.central) + r * d.b, d.b * sizeof(T));
  return padded;
}

template <class T>
void add_bias(const ExpertRows<T>& rows, float* sums) {
  const std::int64_t width = rows.in.dims.out_features, chunk = 256;
  parallel_for(0, ceil_divide(width, chunk), 1, [&](std::int64_t begin, std::int64_t end) {
    const std::int64_t first = begin * chunk, last = std::min(width, end * chunk);
    for (std::int64_t t = 0; t < rows.count; ++t)
      rows.gemm.add_row(rows.dz + t * width + first, sums + first, last - first);
  });
}

template <class T>
void backward(const GemmKernels& gemm, const LinearBackward& in) {
  const BlockDims& d = in.dims;
  const Wanted wanted(in);
  const RebuildPlan plan(gemm, d, true, sizeof(T));
  const BackwardSizes sizes(gemm, d, plan, sizeof(T));
  std::int64_t most = 0;
  for (std::int64_t e = 0; e < in.experts; ++e) most = std::max(most, in.offsets[e + 1] - in.offsets[e]);

  Buffer<T> slot_gradient, padded_central;
  T* dx = static_cast<T*>(in.dx);
  if (wanted.x && in.row_index != nullptr) {
    slot_gradient = Buffer<T>(in.filled() * d.in_features);
    dx = slot_gradient.get();
  } else {
    zero_rows(in.dx, in.filled(), in.slots, d.in_features * sizeof(T));
  }
  const T* central_rows = static_cast<const T*>(in.central);
  if (wanted.left && d.b % gemm.unit != 0) {
    padded_central = pad_central<T>(gemm, in);
    central_rows = padded_central.get();
  }
  BackwardSums sums;
  const std::int64_t central_size = d.iC * d.jC * sizes.b_panels * d.a * kPanel;
  if (wanted.right) sums.right = Buffer<float>(plan.n_blocks() * sizes.right_sums);
  if (wanted.left) sums.left = Buffer<float>(plan.n_blocks() * sizes.left_sums);
  if (wanted.central) {
    sums.central = Buffer<float>(central_size);
    std::fill_n(sums.central.get(), central_size, 0.0f);
  }
  std::vector<float> bias(in.dbias == nullptr ? 0 : d.out_features, 0.0f);

  ExpertRows<T> rows(gemm, in, plan, sizes, wanted, most);
  const std::int64_t count = std::min<std::int64_t>(num_threads(), plan.n_blocks());
  std::vector<BackwardWorker<T>> workers;
  for (std::int64_t w = 0; w < count; ++w) workers.emplace_back(rows, sums, central_rows, dx, most);
  for (std::int64_t e = 0; e < in.experts; ++e) {
    if (in.offsets[e + 1] == in.offsets[e]) {
      zero_rows(in.dleft, e, e + 1, plan.left_rows * d.a * sizeof(T));
      zero_rows(in.dright, e, e + 1, d.b * plan.right_columns * sizeof(T));
      continue;
    }
    rows.load(e);
    if (in.dbias != nullptr) add_bias(rows, bias.data());
    if (!wanted.x && !wanted.weight()) continue;
    parallel_for(0, count, 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t w = begin; w < end; ++w)
        for (std::int64_t block = w; block < plan.n_blocks(); block += count) workers[w].run(block);
    });
    store_auxiliary(rows, sums, e);
  }
  if (wanted.central) store_central<T>(gemm, in, sizes, sums.central.get());
  if (in.dbias != nullptr) gemm.round_row(bias.data(), in.dbias, d.out_features);
  if (slot_gradient) gather_gradient(gemm, in, slot_gradient.get());
}

}  // namespace

void rebuild_backward(const LinearBackward& in) {
  const GemmKernels& gemm = gemm_kernels(in.dtype);
  if (in.dtype == Dtype::kBFloat16)
    backward<BFloat16>(gemm, in);
  else
    backward<float>(gemm, in);
}

}  // namespace mpoe
