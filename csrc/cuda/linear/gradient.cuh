// Gradients of the blocks, without a weight gradient in memory: the gradient x^T dz of a tile of an expert's weight is
// computed in registers, regrouped in shared memory and multiplied at once,
//
//   out[outer, bond] = sum dw[outer, inner] other[inner, bond]    over `inner` and a part of the central indices
//
// `outer` are indices of left, `inner` those of right, and `other` is right; or the other way round, and `other` is left
// times central. No atomics, the same bits on every run.
#pragma once
#include "cuda/linear/epilogue.cuh"

namespace mpoe::cuda {

// How far one step along an axis of tiles moves each tensor, in elements.
struct TileAxis {
  int count = 1;
  int x = 0, dz = 0, other = 0, out = 0;
};

struct GradientArguments {
  Operand x, dz, other;    // mn: indices of a tile, or the bond; k: slots, or `inner`
  Output out;              // m: `outer`, n: bond
  int64_t part_stride = 0;  // of out
  IndexMap x_at, dz_at;    // places of a tile's indices of x and dz in the regrouped tile
  TileAxis outer[2], inner[2], centre[2];  // the indices on the side of x, and on that of dz
  int m = 0, n = 0, outer_size = 0, inner_size = 0, bond = 0;  // of a tile; all of the bond
  const int* offsets = nullptr;                               // [E + 1]
};

// Grid: (tiles of outer and of the bond, parts of the central indices, experts).
template <class T, class TileT, bool kMajorOther>
__global__ void __launch_bounds__(TileT::kThreads, 1) gradient_kernel(const __grid_constant__ GradientArguments p) {
  using X = Staged<T, TileT, TileT::kM, false>;
  using Dz = Staged<T, TileT, TileT::kN, false>;
  using Other = Staged<T, TileT, TileT::kN, kMajorOther>;
  constexpr int kStride = padded_stride<T>(TileT::kN, true);
  DYN_SHARED(T, tile);
  T* const stages = tile + TileT::kM * kStride;
  const int expert = blockIdx.z, begin = p.offsets[expert], end = p.offsets[expert + 1];
  TileAxis at;
  const auto move = [&](const TileAxis& axis, int index) {
    at.x += index * axis.x;
    at.dz += index * axis.dz;
    at.other += index * axis.other;
    at.out += index * axis.out;
  };
  const int bond_tiles = (p.bond + TileT::kN - 1) / TileT::kN;
  const int bond = blockIdx.x % bond_tiles * TileT::kN, outer = blockIdx.x / bond_tiles;
  move(p.outer[0], outer / p.outer[1].count);
  move(p.outer[1], outer % p.outer[1].count);
  const TileAxis first = at;
  const int centres = p.centre[0].count * p.centre[1].count, parts = static_cast<int>(gridDim.y);
  const int share = (centres + parts - 1) / parts, inner = p.inner[0].count * p.inner[1].count;
  const int first_centre = share * static_cast<int>(blockIdx.y);
  const int last_centre = first_centre + share < centres ? first_centre + share : centres;

  Accumulator<TileT> sum;
  sum.clear();
  for (int i = threadIdx.x; i < TileT::kM * kStride; i += TileT::kThreads) {
    tile[i] = dev::from_float<T>(0.f);  // what only completes a tile
  }
  for (int step = first_centre * inner; begin < end && step < last_centre * inner; ++step) {
    at = first;
    move(p.centre[0], step / inner / p.centre[1].count);
    move(p.centre[1], step / inner % p.centre[1].count);
    move(p.inner[0], step % inner / p.inner[1].count);
    move(p.inner[1], step % inner % p.inner[1].count);
    Accumulator<TileT> dw;
    dw.clear();
    const X x(p.x, at.x, 0, p.m, end);
    const Dz dz(p.dz, at.dz, 0, p.n, end);
    block_gemm<T, TileT, false, false>(dw, x, dz, begin, end, p.m, p.n, stages);
    // Nobody reads the tile: the product has begun with a barrier.
    dw.for_each_pair([&](int row, int column, float v0, float v1) {
      if (row >= p.m) return;
      const int at_row = p.x_at.at(row).inner;
      if (column < p.n) tile[at_row + p.dz_at.at(column).inner] = dev::from_float<T>(v0);
      if (column + 1 < p.n) tile[at_row + p.dz_at.at(column + 1).inner] = dev::from_float<T>(v1);
    });
    const Resident<T, true> regrouped{tile, kStride};
    const Other other(p.other, p.other.expert_stride * expert + at.other, bond, p.bond, p.inner_size);
    block_gemm<T, TileT, true, kMajorOther>(sum, regrouped, other, 0, p.inner_size, p.outer_size, p.bond - bond, stages);
  }
  __syncthreads();  // nobody reads the stages
  const ColumnPair own(p.out, 0, bond + sum.own_column(), p.bond);
  const int64_t base = p.out.expert_stride * expert + p.part_stride * blockIdx.y + first.out;
  sum.for_each_row(reinterpret_cast<float*>(stages), [&](int row, float v0, float v1) {
    if (row < p.outer_size) store_pair<T>(p.out, base, p.out.m.at(row).inner, own, v0, v1, true, 1.f);
  });
}

}  // namespace mpoe::cuda
