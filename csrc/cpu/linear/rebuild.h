// Rebuilds an expert's weight block by block. A block is a range of the contracted side times a
// range of the other one:
//   LC[pair, (iL jL), b] = left_e central   for every pair (iC, jC) (`build_half`)
//   W[pair, (iL jL), (iR jR)] = LC right_e  (`build_slab`), stored as the packed operand that
//   multiplies rows.
// k is the side that is contracted with the rows: (iL, iC, iR) in x W and (jL, jC, jR) in dz W^T; n
// is the other side. Where things are (kR in whole units of elements, nR in whole granules of eight
// columns):
//
//   left    [nL, kL, a]                              of an expert
//   right   panels of (kR in units, nR in granules)  of an expert, see UnitColumns
//   half    [nL of the block, kL, b]                 LC of one pair (kC, nC)
//   slab    panels of (nC, nL, nR), in a panel       W of a block
//           [(kC, kL, kR) in units, 32]
//   rows    [blocks of kC, slots, (kC, kL, kR)]      what a slab multiplies
#pragma once

#include "cpu/linear/blocks.h"

namespace mpoe {

// Columns of a block: a range of nC, each with the same range of nL.
struct BlockColumns {
  Span central, left;
};

// A slab and the rows that it multiplies should fit in the L2 cache together.
constexpr int64_t kSlabBytes = 320 * 1024;
// Columns of a block of the forward: enough to read rows rarely, few enough for a long k.
constexpr int64_t kBlockColumns = 128;
// Blocks of the backward have separate sums of dleft and dright.
constexpr int64_t kMostBlocks = 16;

// Size of the parts when `count` is split into the fewest equal parts of at most `most`.
inline int64_t equal_part(int64_t count, int64_t most) {
  return ceil_divide(count, ceil_divide(count, std::clamp<int64_t>(most, 1, count)));
}

// Sizes of blocks, their layout, and the tables that place the granules of rebuilt tiles.
struct RebuildPlan {
  Side k, n;
  bool transposed;                // k is the output side
  int64_t unit;                   // elements of k in a unit
  int64_t left_rows;              // iL jL
  int64_t right_columns;          // iR jR
  int64_t a_units, b_units;       // of the bonds, where they are contracted
  int64_t b_panels;               // of LC's columns
  int64_t half_row;               // row stride of LC, in elements
  int64_t n_block, n_left;        // most nC and nL per block
  int64_t k_block;                // most kC per block
  int64_t k_units;                // of one kC: kL times kR in units
  int64_t granules;               // of one nL: nR in granules
  int64_t x_row;                  // row stride, in elements, of what a slab multiplies
  UnitColumns right;              // columns (kR, nR) of right_e
  std::vector<int32_t> row_unit;  // [nC, nL, kL, granules] of a block: unit of the slab in which a
                                  // granule of nR begins, at the first kR

  // For x W, in blocks of a few columns. For dz W^T (`transposed`), in at most kMostBlocks blocks
  // of whole nC.
  RebuildPlan(const GemmKernels& gemm, const BlockDims& d, bool turned, int64_t element_bytes)
      : k(turned ? out_side(d) : in_side(d)),
        n(turned ? in_side(d) : out_side(d)),
        transposed(turned),
        unit(gemm.unit),
        left_rows(d.iL * d.jL),
        right_columns(d.iR * d.jR),
        a_units(ceil_divide(d.a, unit)),
        b_units(ceil_divide(d.b, unit)),
        b_panels(ceil_divide(d.b, kPanel)),
        half_row(row_stride(gemm, b_panels * kPanel)),
        right(unit, k.R, n.R, n.R) {
    k_units = k.L * ceil_divide(k.R, unit);
    granules = ceil_divide(n.R, kGranule);
    const int64_t left_width = granules * kGranule;
    if (transposed) {
      n_left = n.L;
      n_block = ceil_divide(n.C, kMostBlocks);
    } else {
      n_left = equal_part(n.L, kBlockColumns / left_width);
      n_block = n_left < n.L ? 1 : equal_part(n.C, kBlockColumns / (n.L * left_width));
    }
    const int64_t k_central_bytes = most_panels() * kPanel * k_units * unit * element_bytes;
    k_block = equal_part(k.C, kSlabBytes / k_central_bytes);
    x_row = row_stride(gemm, panel_units() * unit);
    place_granules();
  }

  int64_t central_size() const { return a_units * b_panels * kPanel * unit; }  // of a packed [a, b]
  int64_t panel_units() const { return k_block * k_units; }
  int64_t panels(int64_t n_centrals, int64_t n_lefts) const {
    return ceil_divide(n_centrals * n_lefts * granules * kGranule, kPanel);
  }
  int64_t panels(const BlockColumns& columns) const {
    return panels(columns.central.size(), columns.left.size());
  }
  int64_t most_panels() const { return panels(n_block, n_left); }
  int64_t slab_size() const { return most_panels() * panel_units() * kPanel * unit; }
  int64_t k_blocks() const { return ceil_divide(k.C, k_block); }
  int64_t n_blocks() const { return ceil_divide(n.C, n_block) * ceil_divide(n.L, n_left); }
  Span k_span(int64_t block) const { return nth_part(k.C, k_block, block); }
  BlockColumns n_columns(int64_t block) const {
    const int64_t lefts = ceil_divide(n.L, n_left);
    return {nth_part(n.C, n_block, block / lefts), nth_part(n.L, n_left, block % lefts)};
  }
  // (iC, jC) in the order of central.
  int64_t pair(int64_t k_central, int64_t n_central) const {
    return transposed ? n_central * k.C + k_central : k_central * n.C + n_central;
  }

 private:
  void place_granules() {
    for (int64_t left = 0; left < n_block * n_left; ++left)  // (nC, nL)
      for (int64_t k_left = 0; k_left < k.L; ++k_left)
        for (int64_t g = 0; g < granules; ++g) {
          const int64_t column = (left * granules + g) * kGranule;
          const int64_t panel_start = column / kPanel * panel_units() * kPanel;
          const int64_t k_start = k_left * (k_units / k.L) * kPanel;
          row_unit.push_back(static_cast<int32_t>(panel_start + k_start + column % kPanel));
        }
  }
};

// One expert's left and right blocks in the forms that the products need.
template <class T>
struct ExpertBlocks {
  Buffer<T> left;          // [nL, kL, left_row]
  Buffer<T> right;         // panels of the plan
  Buffer<T> right_turned;  // right with jR before iR, for a transposed plan
  int64_t left_row;

  ExpertBlocks(const GemmKernels& gemm, const BlockDims& d, const RebuildPlan& plan)
      : left_row(row_stride(gemm, padded_k(gemm, d.a))) {
    left = Buffer<T>(plan.left_rows * left_row);
    right = Buffer<T>(plan.right.panels * kPanel * padded_k(gemm, d.b));
    if (plan.transposed)
      right_turned = Buffer<T>(d.b * plan.right_columns);
  }
  void load(const GemmKernels& gemm,
            const LinearInputs& in,
            const RebuildPlan& plan,
            int64_t expert) {
    const BlockDims& d = in.dims;
    const T* source = left_of<T>(in, expert);
    for (int64_t i = 0; i < d.iL; ++i)
      for (int64_t j = 0; j < d.jL; ++j) {
        T* row = left.get() + (plan.transposed ? i * d.jL + j : j * d.iL + i) * left_row;
        std::memcpy(row, source, d.a * sizeof(T));
        std::fill(row + d.a, row + padded_k(gemm, d.a), T{});
        source += d.a;
      }
    const T* from = right_of<T>(in, expert);
    if (plan.transposed) {
      for (int64_t b = 0; b < d.b; ++b)
        gemm.transpose(from + b * plan.right_columns,
                       d.jR,
                       d.iR,
                       d.jR,
                       right_turned.get() + b * plan.right_columns,
                       d.iR);
      from = right_turned.get();
    }
    plan.right.pack(gemm, from, plan.right_columns, d.b, right.get());
  }
};

// Panels of [a, b] of `count` pairs from `pair` on, one pair after another.
template <class T>
void pack_central(const GemmKernels& gemm,
                  const LinearInputs& in,
                  const RebuildPlan& plan,
                  int64_t pair,
                  int64_t count,
                  T* panels) {
  const BlockDims& d = in.dims;
  const int64_t stride = d.iC * d.jC * d.b;
  const T* central = static_cast<const T*>(in.central) + pair * d.b;
  if (d.b % kPanel == 0) {
    gemm.pack(panels, plan.a_units, central, stride, d.a, count * d.b);
    return;
  }
  for (int64_t q = 0; q < count; ++q)
    gemm.pack(panels + q * plan.central_size(), plan.a_units, central + q * d.b, stride, d.a, d.b);
}

// half [nL in `n_left`, kL, half_row] of one pair; columns from b to the end of the last panel are
// zero.
template <class T>
void build_half(const GemmKernels& gemm,
                const RebuildPlan& plan,
                const ExpertBlocks<T>& blocks,
                Span n_left,
                const T* central,
                T* half) {
  const T* left = blocks.left.get() + n_left.first * plan.k.L * blocks.left_row;
  multiply_all(gemm,
               n_left.size() * plan.k.L,
               plan.a_units * gemm.unit,
               left,
               blocks.left_row,
               central,
               plan.b_panels * kPanel,
               [&](int64_t first, int64_t count, int64_t c, const float* tile) {
                 gemm.store(tile, count, kPanel, half + first * plan.half_row + c, plan.half_row);
               });
}

// The slab's part for one pair, of the `k_central`-th kC and the `n_central`-th nC of a block, from
// its half: in every panel of these columns, k_units units.
template <class T>
void build_slab(const GemmKernels& gemm,
                const RebuildPlan& plan,
                const ExpertBlocks<T>& blocks,
                int64_t n_lefts,
                int64_t k_central,
                int64_t n_central,
                const T* half,
                T* slab) {
  T* target = slab + k_central * plan.k_units * kPanel * gemm.unit;
  const int32_t* places = plan.row_unit.data() + n_central * plan.n_left * plan.k.L * plan.granules;
  multiply_all(gemm,
               n_lefts * plan.k.L,
               plan.b_units * gemm.unit,
               half,
               plan.half_row,
               blocks.right.get(),
               plan.right.panels * kPanel,
               [&](int64_t first, int64_t count, int64_t c, const float* tile) {
                 plan.right.store(
                     gemm, tile, count, c, target, places + first * plan.granules, plan.granules);
               });
}

// Running sums of a block over k: [tile of rows][panel][row of the tile][32], for all rows or for
// one tile.
struct BlockSums {
  float* data;
  bool all;
  float* tile(int64_t first, int64_t panels) const {
    return data + (all ? first * panels * kPanel : 0);
  }
};

// sums (+)= rows x slab. `done(first, count, tile)` gets every tile of rows while it is in the L1
// cache.
template <class T, class F>
void multiply_slab(const GemmKernels& gemm,
                   const RebuildPlan& plan,
                   int64_t k_centrals,
                   int64_t panels,
                   int64_t count,
                   const T* rows,
                   const T* slab,
                   const BlockSums& sums,
                   bool accumulate,
                   const F& done) {
  for_each_tile(count, gemm.best_rows, [&](int64_t first, int64_t tile_rows) {
    float* tile = sums.tile(first, panels);
    for_each_tile(k_centrals * plan.k_units, gemm.longest_sum, [&](int64_t start, int64_t units) {
      for (int64_t p = 0; p < panels; ++p)
        gemm.multiply_rows(tile_rows,
                           units,
                           rows + first * plan.x_row + start * gemm.unit,
                           plan.x_row / gemm.unit,
                           slab + (p * plan.panel_units() + start) * kPanel * gemm.unit,
                           tile + p * tile_rows * kPanel,
                           kPanel,
                           accumulate || start > 0);
    });
    done(first, tile_rows, tile);
  });
}

}  // namespace mpoe
