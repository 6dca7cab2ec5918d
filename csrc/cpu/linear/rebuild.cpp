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

}  // namespace mpoe
