#include "cpu/linear_rebuild.h"

namespace mpoe {

namespace {

// A slab, the half it comes from and the rows that meet it should share a second-level cache.
constexpr std::int64_t kSlabBytes = 256 * 1024;
// Long enough that reading and writing sums costs little.
constexpr std::int64_t kInner = 256;

}  // namespace

ColumnMap side_columns(const Side& side, Span range, std::int64_t panel) {
  const std::int64_t granules = ceil_divide(side.R, kGranule);
  ColumnMap map{};
  for (std::int64_t g = 0; g < kPanel / kGranule; ++g) {
    const std::int64_t q = panel * (kPanel / kGranule) + g;
    const std::int64_t c = range.first + q / (side.L * granules), l = q / granules % side.L;
    if (c >= range.last) continue;
    const std::int64_t r = q % granules * kGranule, offset = side.offset(l, c, r);
    map.offset[g] = offset;
    map.valid[g] = static_cast<std::int32_t>(
        std::clamp<std::int64_t>(std::min(side.R - r, side.features - offset), 0, kGranule));
  }
  return map;
}

UnitColumns::UnitColumns(std::int64_t unit, std::int64_t inner, std::int64_t inner_stride, std::int64_t columns)
    : per_panel(kPanel / kGranule / unit) {
  const std::int64_t granules = ceil_divide(columns, kGranule), count = ceil_divide(inner, unit) * granules;
  panels = ceil_divide(count, per_panel);
  for (std::int64_t p = 0; p < panels; ++p) {
    ColumnMap columns_of_panel{};
    for (std::int64_t s = 0; s < per_panel; ++s) {
      const std::int64_t q = std::min(p * per_panel + s, count - 1);  // past the end: the last one again
      const std::int64_t first = q / granules * unit, column = q % granules * kGranule;
      which.push_back(static_cast<std::int32_t>(q % granules));
      unit_offset.push_back(static_cast<std::int32_t>(q / granules * kPanel));
      for (std::int64_t i = 0; i < unit && first + i < inner; ++i) {
        columns_of_panel.offset[i * per_panel + s] = (first + i) * inner_stride + column;
        columns_of_panel.valid[i * per_panel + s] = static_cast<std::int32_t>(std::min(kGranule, columns - column));
      }
    }
    map.push_back(columns_of_panel);
  }
}

RebuildPlan::RebuildPlan(const GemmKernels& gemm, const BlockDims& d, bool turned, std::int64_t element_bytes)
    : k(turned ? out_side(d) : in_side(d)), n(turned ? in_side(d) : out_side(d)), transposed(turned), unit(gemm.unit),
      left_rows(d.iL * d.jL), right_columns(d.iR * d.jR), right(gemm.unit, k.R, n.R, n.R) {
  const std::int64_t pair_bytes = left_rows * std::max(right_columns, d.b) * element_bytes;
  const std::int64_t most = std::max<std::int64_t>(1, kSlabBytes / pair_bytes);  // pairs of a block
  k_block = std::min({k.C, most, ceil_divide(kInner, k.L * k.R)});
  n_block = std::min(n.C, most / k_block);
  k_block = std::min(k.C, most / n_block);
  const std::int64_t k_right = ceil_divide(k.R, unit);
  k_units = k.L * k_right;
  granules = ceil_divide(n.R, kGranule);

  row_unit.resize(n_block * left_rows * granules);
  for (std::int64_t c = 0; c < n_block; ++c)
    for (std::int64_t row = 0; row < left_rows; ++row) {
      const std::int64_t i = row / d.jL, j = row % d.jL;
      const std::int64_t kl = transposed ? j : i, nl = transposed ? i : j;
      for (std::int64_t g = 0; g < granules; ++g) {
        const std::int64_t column = ((c * n.L + nl) * granules + g) * kGranule;
        row_unit[(c * left_rows + row) * granules + g] = static_cast<std::int32_t>(
            column / kPanel * panel_units() * kPanel + column % kPanel + kl * k_right * kPanel);
      }
    }
}

ColumnMap RebuildPlan::columns(Span n_range, std::int64_t panel) const { return side_columns(n, n_range, panel); }

template <class T>
ExpertBlocks<T>::ExpertBlocks(const GemmKernels& gemm, const BlockDims& d, const RebuildPlan& plan)
    : left_stride(row_stride<T>(padded_k(gemm, d.a))) {
  left = Buffer<T>(plan.left_rows * left_stride);
  right = Buffer<T>(plan.right.panels * kPanel * padded_k(gemm, d.b));
  if (plan.transposed) right_turned = Buffer<T>(d.b * plan.right_columns);
}

template <class T>
void ExpertBlocks<T>::load(
    const GemmKernels& gemm, const LinearInputs& in, const RebuildPlan& plan, std::int64_t expert) {
  const BlockDims& d = in.dims;
  const T* source = static_cast<const T*>(in.left) + expert * plan.left_rows * d.a;
  for (std::int64_t r = 0; r < plan.left_rows; ++r) {
    std::memcpy(left.get() + r * left_stride, source + r * d.a, d.a * sizeof(T));
    for (std::int64_t c = d.a; c < padded_k(gemm, d.a); ++c) left.get()[r * left_stride + c] = T{};
  }
  const T* from = static_cast<const T*>(in.right) + expert * d.b * plan.right_columns;
  if (plan.transposed) {
    for (std::int64_t b = 0; b < d.b; ++b)
      gemm.transpose(
          from + b * plan.right_columns, d.jR, d.iR, d.jR, right_turned.get() + b * plan.right_columns, d.iR);
    from = right_turned.get();
  }
  const std::int64_t panel = kPanel * padded_k(gemm, d.b);
  for (std::int64_t p = 0; p < plan.right.panels; ++p)
    gemm.pack_granules(right.get() + p * panel, from, plan.right_columns, d.b, plan.right.map[p]);
}

template <class T>
void build_half(
    const GemmKernels& gemm, const LinearInputs& in, const T* left, std::int64_t left_stride, Span i_range, Span j_range,
    T* panels, T* half) {
  const BlockDims& d = in.dims;
  const std::int64_t rows = d.iL * d.jL, units = ceil_divide(d.a, gemm.unit), stride = half_stride<T>(d);
  const T* central = static_cast<const T*>(in.central);
  alignas(64) float tile[kMaxRows * kPanel];
  for (std::int64_t i = i_range.first; i < i_range.last; ++i)
    for (std::int64_t j = j_range.first; j < j_range.last; ++j, half += rows * stride) {
      gemm.pack(panels, units, central + (i * d.jC + j) * d.b, d.iC * d.jC * d.b, d.a, d.b);
      for (std::int64_t c = 0; c < d.b; c += kPanel)
        for_each_tile(rows, gemm.best_rows, [&](std::int64_t first, std::int64_t count) {
          multiply_rows(
              gemm, count, units, left + first * left_stride, left_stride, panels + c * units * gemm.unit, tile, false);
          gemm.store(tile, count, kPanel, half + first * stride + c, stride);
        });
    }
}

template <class T>
void build_slab(
    const GemmKernels& gemm, const BlockDims& d, const RebuildPlan& plan, Span k_range, Span n_range, const T* half,
    const T* right_panels, T* slab) {
  const std::int64_t units = ceil_divide(d.b, gemm.unit), stride = half_stride<T>(d);
  const std::int64_t per_panel = plan.right.per_panel;
  const Span i_range = plan.transposed ? n_range : k_range, j_range = plan.transposed ? k_range : n_range;
  alignas(64) float tile[kMaxRows * kPanel];
  for (std::int64_t i = i_range.first; i < i_range.last; ++i)
    for (std::int64_t j = j_range.first; j < j_range.last; ++j, half += plan.left_rows * stride) {
      const std::int64_t kc = (plan.transposed ? j : i) - k_range.first, nc = (plan.transposed ? i : j) - n_range.first;
      T* target = slab + kc * plan.k_units * kPanel * gemm.unit;
      const std::int32_t* places = plan.row_unit.data() + nc * plan.left_rows * plan.granules;
      for_each_tile(plan.left_rows, gemm.best_rows, [&](std::int64_t first, std::int64_t count) {
        for (std::int64_t p = 0; p < plan.right.panels; ++p) {
          multiply_rows(
              gemm, count, units, half + first * stride, stride, right_panels + p * units * kPanel * gemm.unit, tile,
              false);
          gemm.store_units(
              tile, count, target, places + first * plan.granules, plan.granules, plan.right.which.data() + p * per_panel,
              plan.right.unit_offset.data() + p * per_panel);
        }
      });
    }
}

namespace {

// What a thread needs for the experts and columns that it computes.
template <class T>
class ForwardWorker {
 public:
  ForwardWorker(const GemmKernels& gemm, const LinearForward& in, const RebuildPlan& plan, std::int64_t most_rows)
      : gemm_(gemm), in_(in), plan_(plan), blocks_(gemm, in.dims, plan),
        row_stride_(row_stride<T>(plan.panel_units() * gemm.unit)), rows_(plan.k_blocks() * most_rows * row_stride_),
        central_(round_up(in.dims.b, kPanel) * padded_k(gemm, in.dims.a)),
        half_(plan.k_block * plan.n_block * plan.left_rows * half_stride<T>(in.dims)),
        slab_(plan.slab_units() * gemm.unit), sums_(plan.panels(plan.n_block) * most_rows * kPanel) {
    // Columns that no granule fills are multiplied too, and thrown away.
    std::fill_n(slab_.get(), plan.slab_units() * gemm.unit, T{});
  }

  void run(std::int64_t expert, std::int64_t n_block) {
    const BlockDims& d = in_.dims;
    const std::int64_t first = in_.offsets[expert], count = in_.offsets[expert + 1] - first;
    if (expert != loaded_) load(expert, first, count);
    const Span n_range = plan_.n_span(n_block);
    for (std::int64_t kb = 0; kb < plan_.k_blocks(); ++kb) {
      const Span k_range = plan_.k_span(kb);
      build_half(gemm_, in_, blocks_.left.get(), blocks_.left_stride, k_range, n_range, central_.get(), half_.get());
      build_slab(gemm_, d, plan_, k_range, n_range, half_.get(), blocks_.right.get(), slab_.get());
      multiply_slab(
          gemm_, plan_, k_range, n_range, rows_.get() + kb * count * row_stride_, row_stride_, count, slab_.get(),
          sums_.get(), kb > 0);
    }
    finish(n_range, first, count);
  }

 private:
  void load(std::int64_t expert, std::int64_t first, std::int64_t count) {
    loaded_ = expert;
    blocks_.load(gemm_, in_, plan_, expert);
    for (std::int64_t kb = 0; kb < plan_.k_blocks(); ++kb)
      arrange_rows<T>(
          plan_.k, gemm_.unit, plan_.k_span(kb), count, [&](std::int64_t t) { return row_of<T>(in_, first + t); },
          rows_.get() + kb * count * row_stride_, row_stride_);
  }

  void finish(Span n_range, std::int64_t first, std::int64_t count) {
    const std::int64_t features = plan_.n.features;
    alignas(64) float bias[kPanel] = {};
    Finish finish{.bias = in_.bias == nullptr ? nullptr : bias, .activation = in_.activation, .saved = nullptr};
    if (in_.saved != nullptr) finish.saved = static_cast<T*>(in_.saved) + first * features;
    for (std::int64_t p = 0; p < plan_.panels(n_range.last - n_range.first); ++p) {
      const ColumnMap columns = plan_.columns(n_range, p);
      if (in_.bias != nullptr)
        for (std::int64_t c = 0; c < kPanel; ++c) {
          const std::int64_t g = c / kGranule, i = c % kGranule;
          bias[c] = i < columns.valid[g] ? load_value(columns.offset[g] + i) : 0.0f;
        }
      gemm_.finish(
          sums_.get() + p * count * kPanel, count, static_cast<T*>(in_.y) + first * features, nullptr, features, columns,
          finish);
    }
  }

  float load_value(std::int64_t column) const { return mpoe::load(static_cast<const T*>(in_.bias)[column]); }

  const GemmKernels& gemm_;
  const LinearForward& in_;
  const RebuildPlan& plan_;
  ExpertBlocks<T> blocks_;
  std::int64_t row_stride_;
  Buffer<T> rows_, central_, half_, slab_;
  Buffer<float> sums_;
  std::int64_t loaded_ = -1;
};

template <class T>
void forward(const GemmKernels& gemm, const LinearForward& in) {
  const BlockDims& d = in.dims;
  zero_rows(in.y, in.filled(), in.slots, d.out_features * sizeof(T));
  zero_rows(in.saved, in.filled(), in.slots, d.out_features * sizeof(T));
  const RebuildPlan plan(gemm, d, false, sizeof(T));
  std::vector<std::int64_t> busy;
  std::int64_t most_rows = 0;
  for (std::int64_t e = 0; e < in.experts; ++e) {
    const std::int64_t count = in.offsets[e + 1] - in.offsets[e];
    if (count > 0) busy.push_back(e);
    most_rows = std::max(most_rows, count);
  }
  const std::int64_t blocks = plan.n_blocks();
  parallel_for(0, static_cast<std::int64_t>(busy.size()) * blocks, 1, [&](std::int64_t begin, std::int64_t end) {
    ForwardWorker<T> worker(gemm, in, plan, most_rows);
    for (std::int64_t task = begin; task < end; ++task) worker.run(busy[task / blocks], task % blocks);
  });
}

}  // namespace

#define MPOE_REBUILD(T)                                                                                                \
  template struct ExpertBlocks<T>;                                                                                     \
  template void build_half<T>(                                                                                         \
      const GemmKernels&, const LinearInputs&, const T*, std::int64_t, Span, Span, T*, T*);                            \
  template void build_slab<T>(                                                                                         \
      const GemmKernels&, const BlockDims&, const RebuildPlan&, Span, Span, const T*, const T*, T*);
MPOE_REBUILD(float)
MPOE_REBUILD(BFloat16)
#undef MPOE_REBUILD

void rebuild_forward(const LinearForward& in) {
  const GemmKernels& gemm = gemm_kernels(in.dtype);
  if (in.dtype == Dtype::kBFloat16)
    forward<BFloat16>(gemm, in);
  else
    forward<float>(gemm, in);
}

}  // namespace mpoe
