#include "cpu/linear/rebuild.h"

namespace mpoe {

namespace {

// A slab and the rows that it multiplies should fit in the L2 cache together.
constexpr std::int64_t kSlabBytes = 320 * 1024;
// Columns of a block of the forward: enough to read rows rarely, few enough for a long k.
constexpr std::int64_t kColumns = 128;
// Blocks of the backward have separate sums of dleft and dright.
constexpr std::int64_t kMostBlocks = 16;

// Size of the parts when `count` is split into the fewest equal parts of at most `most`.
std::int64_t equal_part(std::int64_t count, std::int64_t most) {
  return ceil_divide(count, ceil_divide(count, std::clamp<std::int64_t>(most, 1, count)));
}

}  // namespace

RebuildPlan::RebuildPlan(const GemmKernels& gemm, const BlockDims& d, bool turned, std::int64_t element_bytes)
    : k(turned ? out_side(d) : in_side(d)), n(turned ? in_side(d) : out_side(d)), transposed(turned), unit(gemm.unit),
      left_rows(d.iL * d.jL), right_columns(d.iR * d.jR), a_units(ceil_divide(d.a, unit)),
      b_units(ceil_divide(d.b, unit)), b_panels(ceil_divide(d.b, kPanel)),
      half_row(row_stride(gemm, b_panels * kPanel)),
      right(unit, k.R, n.R, n.R) {
  const std::int64_t k_right = ceil_divide(k.R, unit);
  k_units = k.L * k_right;
  granules = ceil_divide(n.R, kGranule);
  const std::int64_t left_width = granules * kGranule, width = n.L * left_width;
  if (transposed) {
    n_left = n.L;
    n_block = ceil_divide(n.C, kMostBlocks);
  } else {
    n_left = equal_part(n.L, kColumns / left_width);
    n_block = n_left < n.L ? 1 : equal_part(n.C, kColumns / width);
  }
  k_block = equal_part(k.C, kSlabBytes / (most_panels() * kPanel * k_units * unit * element_bytes));
  x_row = row_stride(gemm, panel_units() * unit);

  row_unit.reserve(n_block * n_left * k.L * granules);
  for (std::int64_t c = 0; c < n_block; ++c)
    for (std::int64_t l = 0; l < n_left; ++l)
      for (std::int64_t kl = 0; kl < k.L; ++kl)
        for (std::int64_t g = 0; g < granules; ++g) {
          const std::int64_t column = ((c * n_left + l) * granules + g) * kGranule;
          row_unit.push_back(static_cast<std::int32_t>(
              column / kPanel * panel_units() * kPanel + column % kPanel + kl * k_right * kPanel));
        }
}

template <class T>
ExpertBlocks<T>::ExpertBlocks(const GemmKernels& gemm, const BlockDims& d, const RebuildPlan& plan)
    : left_row(row_stride(gemm, padded_k(gemm, d.a))) {
  left = Buffer<T>(plan.left_rows * left_row);
  right = Buffer<T>(plan.right.panels * kPanel * padded_k(gemm, d.b));
  if (plan.transposed) right_turned = Buffer<T>(d.b * plan.right_columns);
}

template <class T>
void ExpertBlocks<T>::load(
    const GemmKernels& gemm, const LinearInputs& in, const RebuildPlan& plan, std::int64_t expert) {
  const BlockDims& d = in.dims;
  const T* source = static_cast<const T*>(in.left) + expert * plan.left_rows * d.a;
  for (std::int64_t i = 0; i < d.iL; ++i)
    for (std::int64_t j = 0; j < d.jL; ++j, source += d.a) {
      T* row = left.get() + (plan.transposed ? i * d.jL + j : j * d.iL + i) * left_row;
      std::memcpy(row, source, d.a * sizeof(T));
      std::fill(row + d.a, row + padded_k(gemm, d.a), T{});
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
void pack_central(
    const GemmKernels& gemm, const LinearInputs& in, const RebuildPlan& plan, std::int64_t pair, std::int64_t count,
    T* panels) {
  const BlockDims& d = in.dims;
  const std::int64_t stride = d.iC * d.jC * d.b;
  const T* central = static_cast<const T*>(in.central) + pair * d.b;
  if (d.b % kPanel == 0) {
    gemm.pack(panels, plan.a_units, central, stride, d.a, count * d.b);
    return;
  }
  for (std::int64_t q = 0; q < count; ++q)
    gemm.pack(panels + q * plan.central_size(), plan.a_units, central + q * d.b, stride, d.a, d.b);
}

template <class T>
void build_half(
    const GemmKernels& gemm, const RebuildPlan& plan, const ExpertBlocks<T>& blocks, Span n_left, const T* central,
    T* half) {
  const T* left = blocks.left.get() + n_left.first * plan.k.L * blocks.left_row;
  multiply_all(
      gemm, (n_left.last - n_left.first) * plan.k.L, plan.a_units * gemm.unit, left, blocks.left_row, central,
      plan.b_panels * kPanel, [&](std::int64_t first, std::int64_t count, std::int64_t c, const float* tile) {
        gemm.store(tile, count, kPanel, half + first * plan.half_row + c, plan.half_row);
      });
}

template <class T>
void build_slab(
    const GemmKernels& gemm, const RebuildPlan& plan, const ExpertBlocks<T>& blocks, std::int64_t n_lefts,
    std::int64_t kc, std::int64_t nc, const T* half, T* slab) {
  const std::int64_t per_panel = plan.right.per_panel;
  T* target = slab + kc * plan.k_units * kPanel * gemm.unit;
  const std::int32_t* places = plan.row_unit.data() + nc * plan.n_left * plan.k.L * plan.granules;
  multiply_all(
      gemm, n_lefts * plan.k.L, plan.b_units * gemm.unit, half, plan.half_row, blocks.right.get(),
      plan.right.panels * kPanel, [&](std::int64_t first, std::int64_t count, std::int64_t c, const float* tile) {
        const std::int64_t granule = c / kPanel * per_panel;
        gemm.store_units(
            tile, count, target, places + first * plan.granules, plan.granules, plan.right.which.data() + granule,
            plan.right.unit_offset.data() + granule);
      });
}

#define MPOE_REBUILD(T)                                                                                                \
  template struct ExpertBlocks<T>;                                                                                     \
  template void pack_central<T>(                                                                                       \
      const GemmKernels&, const LinearInputs&, const RebuildPlan&, std::int64_t, std::int64_t, T*);                    \
  template void build_half<T>(                                                                                         \
      const GemmKernels&, const RebuildPlan&, const ExpertBlocks<T>&, Span, const T*, T*);                             \
  template void build_slab<T>(                                                                                         \
      const GemmKernels&, const RebuildPlan&, const ExpertBlocks<T>&, std::int64_t, std::int64_t, std::int64_t,        \
      const T*, T*);
MPOE_REBUILD(float)
MPOE_REBUILD(BFloat16)
#undef MPOE_REBUILD

}  // namespace mpoe
