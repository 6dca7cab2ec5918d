// Backward of the rebuild strategy: one block of one expert.
#pragma once

#include "cpu/linear/rebuild_rows.h"

namespace mpoe {

// Sums that outlive a block.
struct GradientSums {
  Buffer<float> left;     // [block of iC, panel of a, iL jL, 32], of one expert
  Buffer<float> central;  // [block of iC, block of jC, panel of (pairs b), a, 32]
  Buffer<float> right;    // [block of iC, panel of iR jR, b in whole panels, 32], of one expert
};

// What a thread needs for the blocks that it computes.
template <class T>
class GradientWorker {
 public:
  GradientWorker(const ExpertRows<T>& rows, GradientSums& sums, int64_t most_rows)
      : rows_(rows),
        gemm_(rows.gemm),
        in_(rows.in),
        plan_(rows.plan),
        sizes_(rows.sizes),
        wanted_(rows.wanted),
        sums_(sums),
        central_(sizes_.pairs * plan_.central_size()),
        half_(plan_.left_rows * plan_.half_row) {
    const BlockDims& d = in_.dims;
    const int64_t unit = gemm_.unit, panel = sizes_.pairs * sizes_.left_units * kPanel * unit;
    if (wanted_.x) {
      slab_ = zeros<T>(plan_.slab_size());  // columns that no granule fills
      dx_sums_ = Buffer<float>((plan_.k_blocks() > 1 ? most_rows : kMaxRows) * plan_.most_panels() *
                               kPanel);
    }
    if (!wanted_.weight())
      return;
    weight_ = zeros<T>(plan_.left_rows * sizes_.weight_row);  // padding of the rows
    if (wanted_.right) {
      half_panels_ = Buffer<T>(plan_.b_panels * panel);
      weight_panels_ = Buffer<T>(sizes_.right_panels * panel);
    }
    if (wanted_.half())
      dhalf_ = Buffer<T>(plan_.left_rows * sizes_.dhalf_row);
    if (wanted_.left)
      central_turned_ = Buffer<T>(sizes_.a_panels * sizes_.pairs * sizes_.b * kPanel);
    if (wanted_.central)
      dhalf_panels_ = Buffer<T>(sizes_.dhalf_panels * sizes_.left_units * kPanel * unit);
    for (int64_t i = 0; i < d.iL; ++i)
      for (int64_t r = 0; r < d.iR; ++r)
        weight_row_.push_back(i * d.jL * sizes_.weight_row + r * d.jR);
    for (int64_t p = 0; p < sizes_.dz_panels; ++p) {
      ColumnMap map = side_columns({d.jL, 1, d.jR, d.jL * d.jR}, {0, 1}, p);
      for (int64_t g = 0; g < kGranules; ++g)
        map.offset[g] = map.offset[g] / d.jR * sizes_.weight_row + map.offset[g] % d.jR;
      weight_columns_.push_back(map);
    }
  }

  // `dx`: row of the expert's first slot.
  void run(int64_t block, T* dx) {
    const BlockColumns n = plan_.n_columns(block);
    for (int64_t kb = 0; kb < plan_.k_blocks(); ++kb) {
      const Span k = plan_.k_span(kb);
      pairs_ = k.size() * n.central.size();
      load_central(k, n.central);
      int64_t q = 0;
      for (int64_t i = n.central.first; i < n.central.last; ++i)
        for (int64_t j = k.first; j < k.last; ++j, ++q) {
          half(q);
          if (wanted_.x)
            build_slab(gemm_,
                       plan_,
                       rows_.blocks,
                       n.left.size(),
                       j - k.first,
                       i - n.central.first,
                       half_.get(),
                       slab_.get());
          if (wanted_.weight())
            weight_gradient(i, j);
          if (wanted_.right)
            pack_right(q);
          if (wanted_.half())
            half_gradient(q);
        }
      if (wanted_.x)
        row_gradient(k, n, kb, dx);
      if (wanted_.right)
        right_gradient(block, kb > 0);
      if (wanted_.left)
        left_gradient(block, kb > 0);
      if (wanted_.central)
        central_gradient(block * plan_.k_blocks() + kb);
    }
  }

 private:
  void load_central(Span j_range, Span i_range) {
    const BlockDims& d = in_.dims;
    const int64_t count = j_range.size(), stride = d.iC * d.jC * d.b;
    // Pairs whose b are contiguous in whole units
    const int64_t run = d.b % gemm_.unit == 0 ? count : 1;
    for (int64_t i = i_range.first, q = 0; i < i_range.last; ++i, q += count) {
      const int64_t pair = plan_.pair(j_range.first, i);
      if (wanted_.x || wanted_.right)
        pack_central(gemm_, in_, plan_, pair, count, central_.get() + q * plan_.central_size());
      if (!wanted_.left)
        continue;
      for (int64_t k = 0; k < count; k += run)
        gemm_.pack_transposed(central_turned_.get() + (q + k) * sizes_.b * kPanel,
                              pairs_ * plan_.b_units,
                              static_cast<const T*>(in_.central) + (pair + k) * d.b,
                              stride,
                              run * d.b,
                              d.a);
    }
  }

  void half(int64_t q) {
    if (!wanted_.x && !wanted_.right)
      return;
    build_half(gemm_,
               plan_,
               rows_.blocks,
               {0, plan_.n.L},
               central_.get() + q * plan_.central_size(),
               half_.get());
  }

  void row_gradient(Span k, const BlockColumns& n, int64_t kb, T* dx) {
    const int64_t panels = plan_.panels(n), blocks = plan_.k_blocks();
    multiply_slab(gemm_,
                  plan_,
                  k.size(),
                  panels,
                  rows_.count,
                  rows_.dz_rows.get() + kb * rows_.count * plan_.x_row,
                  slab_.get(),
                  BlockSums{dx_sums_.get(), blocks > 1},
                  kb > 0,
                  [&](int64_t first, int64_t count, const float* tile) {
                    if (kb < blocks - 1)
                      return;
                    for (int64_t p = 0; p < panels; ++p)
                      gemm_.finish(tile + p * count * kPanel,
                                   count,
                                   dx,
                                   rows_.dx_rows.data() + first,
                                   0,
                                   side_columns(plan_.n, n.central, n.left, p),
                                   Finish{});
                  });
  }

  // weight [(iL jL), (iR jR)] = x^T dz of one pair
  void weight_gradient(int64_t i, int64_t j) {
    alignas(64) float tile[kMaxRows * kPanel];
    const int64_t units = rows_.units, panel = units * kPanel * gemm_.unit;
    const T* dz = rows_.dz_panels.get() + j * sizes_.dz_panels * panel;
    for_column_tiles(gemm_,
                     in_.dims.iL * in_.dims.iR,
                     units,
                     rows_.x_panels.get() + i * sizes_.x_panels * panel,
                     sizes_.dz_panels,
                     [&](const T* columns, int64_t first, int64_t count, int64_t p) {
                       multiply_columns_any_length(
                           gemm_, count, units, columns, dz + p * panel, tile, kPanel, false);
                       gemm_.finish(tile,
                                    count,
                                    weight_.get(),
                                    weight_row_.data() + first,
                                    0,
                                    weight_columns_[p],
                                    Finish{});
                     });
  }

  // Packs LC and dW of the q-th pair as operands whose inner index is (pair, iL jL).
  void pack_right(int64_t q) {
    const int64_t units = pairs_ * sizes_.left_units,
                  offset = q * sizes_.left_units * kPanel * gemm_.unit;
    gemm_.pack(half_panels_.get() + offset,
               units,
               half_.get(),
               plan_.half_row,
               plan_.left_rows,
               in_.dims.b);
    gemm_.pack(weight_panels_.get() + offset,
               units,
               weight_.get(),
               sizes_.weight_row,
               plan_.left_rows,
               plan_.right_columns);
  }

  // dright = LC^T dW
  void right_gradient(int64_t block, bool accumulate) {
    add_column_products(gemm_,
                        in_.dims.b,
                        pairs_ * sizes_.left_units,
                        half_panels_.get(),
                        weight_panels_.get(),
                        sizes_.right_panels,
                        sums_.right.get() + block * sizes_.right_sums,
                        kPanel,
                        plan_.b_panels * kPanel * kPanel,
                        accumulate);
  }

  // dhalf [(iL jL), (pairs b)]: dLC = dW right^T of the q-th pair
  void half_gradient(int64_t q) {
    multiply_all(gemm_,
                 plan_.left_rows,
                 sizes_.right_units * gemm_.unit,
                 weight_.get(),
                 sizes_.weight_row,
                 rows_.right_turned.get(),
                 plan_.b_panels * kPanel,
                 [&](int64_t first, int64_t count, int64_t c, const float* tile) {
                   T* out = dhalf_.get() + first * sizes_.dhalf_row + q * sizes_.b + c;
                   gemm_.store(tile, count, std::min(kPanel, sizes_.b - c), out, sizes_.dhalf_row);
                 });
  }

  // dleft = dLC central^T
  void left_gradient(int64_t block, bool accumulate) {
    const int64_t units = pairs_ * plan_.b_units;
    rows_times_panels(gemm_,
                      plan_.left_rows,
                      units,
                      dhalf_.get(),
                      sizes_.dhalf_row,
                      central_turned_.get(),
                      units,
                      sizes_.a_panels,
                      sums_.left.get() + block * sizes_.left_sums,
                      plan_.left_rows,
                      accumulate);
  }

  // dcentral += left^T dLC
  void central_gradient(int64_t block) {
    const int64_t columns = pairs_ * sizes_.b;
    gemm_.pack(dhalf_panels_.get(),
               sizes_.left_units,
               dhalf_.get(),
               sizes_.dhalf_row,
               plan_.left_rows,
               columns);
    float* sums = sums_.central.get() + block * sizes_.central_sums;
    // Panel by panel: the sums, too large for a cache, are then read and written sequentially.
    for (int64_t p = 0; p * kPanel < columns; ++p)
      rows_times_panels(gemm_,
                        in_.dims.a,
                        sizes_.left_units,
                        rows_.left_turned.get(),
                        sizes_.left_turned_row,
                        dhalf_panels_.get() + p * sizes_.left_units * kPanel * gemm_.unit,
                        sizes_.left_units,
                        1,
                        sums + p * in_.dims.a * kPanel,
                        in_.dims.a,
                        true);
  }

  const ExpertRows<T>& rows_;
  const GemmKernels& gemm_;
  const LinearBackward& in_;
  const RebuildPlan& plan_;
  const GradientSizes& sizes_;
  const Wanted& wanted_;
  GradientSums& sums_;
  int64_t pairs_ = 0;  // of the block
  Buffer<T> central_,
      central_turned_;       // panels of [a, b], pair by pair; of its transpose, inner (pairs b)
  Buffer<T> half_, weight_;  // of a pair
  Buffer<T> slab_, half_panels_, weight_panels_, dhalf_, dhalf_panels_;  // of a block
  Buffer<float> dx_sums_;
  std::vector<int64_t> weight_row_;        // of (iL iR) in weight_
  std::vector<ColumnMap> weight_columns_;  // of the panels of one jC
};

}  // namespace mpoe
