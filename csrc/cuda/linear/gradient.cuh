// Gradients of the blocks, without a weight gradient in memory: the gradient x^T dz of a tile of an expert's weight is
// computed in registers, regrouped in shared memory and multiplied at once,
//
//   out[outer, b] = sum of dw[outer, inner] other[inner, b]    over `inner` and, of right, a part of the tiles
//
// `outer` are pairs of digits of left and central (iL, jL), `inner` those of right, and `other` is right; or the other
// way round, and `other` is left times central. No atomics, the same bits on every run.
#pragma once
#include "cuda/linear/tiles.cuh"

namespace mpoe::cuda {

constexpr int kSide = 64;             // of the tiles
constexpr int kRowsAtOnce = 1024;  // whose places are looked up together

struct GradientArguments {
  Digits i, j;
  bool vector_x = false, vector_dz = false, vector_b = false;
  int share = 1;  // tiles of a part
  GradientProduct of;
};

template <class T>
struct GradientTiles {
  using Out = Tile<T, kSide, kSide, 32, 32>;
  static constexpr int kStride = padded_stride<T>(kSide);
  static constexpr int kElements = kSide * kStride + kStages * 2 * Out::kK * padded_stride<T>(kSide);
};

// Grid: (tiles of outer and of b, parts, experts).
template <class T>
__global__ void __launch_bounds__(GradientTiles<T>::Out::kThreads)
    gradient_kernel(const __grid_constant__ GradientArguments p) {
  using Tiles = GradientTiles<T>;
  using TileT = typename Tiles::Out;
  DYN_SHARED(T, tile);
  SHARED_ARRAY(int64_t, from, kRowsAtOnce);
  T* const stages = tile + kSide * Tiles::kStride;
  const GradientProduct& of = p.of;
  const int expert = blockIdx.z, begin = of.offsets[expert], end = of.offsets[expert + 1], thread = threadIdx.x;
  const int bond_tiles = (of.b + kSide - 1) / kSide;
  const int bond = blockIdx.x % bond_tiles * kSide, outer = blockIdx.x / bond_tiles;
  const bool of_right = of.of_right;
  const int left_of_j = p.j.left_tiles(), right_of_j = p.j.right_tiles();
  const int inner = of_right ? p.i.left_tiles() * left_of_j : p.i.right_tiles() * right_of_j;
  const int inner_lines = of_right ? p.i.units * p.j.units : p.i.run_length() * p.j.run_length();
  const int first = p.share * static_cast<int>(blockIdx.y), last = first + p.share < inner ? first + p.share : inner;
  const auto tiles_of = [&](int step) {  // of i and of j
    const DigitPair left(of_right ? step : outer, left_of_j), right(of_right ? outer : step, right_of_j);
    struct Pair {
      DigitTile i, j;
    };
    return Pair{DigitTile(p.i, left.x, right.x), DigitTile(p.j, left.y, right.y)};
  };
  // Elements before a line of half or of right, of all experts; negative: it is not in the tile.
  const auto line_of_left = [&](const DigitTile& i, const DigitTile& j, int line) -> int64_t {
    const DigitPair own(line, p.j.units);
    if (own.x >= i.units || own.y >= j.units) return -1;
    const int64_t left = (int64_t(expert) * of.i[0] + i.left + own.x) * of.j[0] + j.left + own.y;
    return ((left * of.i[1] + i.centre) * of.j[1] + j.centre) * of.b;
  };
  const auto line_of_right = [&](const DigitTile& i, const DigitTile& j, int line) -> int64_t {
    const DigitPair own(line, p.j.run_length());
    if (own.x >= i.run || own.y >= j.run) return -1;
    return ((int64_t(expert) * of.i[2] + i.right + own.x) * of.j[2] + j.right + own.y) * of.b;
  };
  // (iL, iR) and (jL, jR) -> outer and inner
  const auto place = [&](const Digits& digits, int column, int of_left, int of_run) {
    const DigitPair own(column, digits.run_length());
    const int left = own.x * of_left, right = own.y * of_run;
    if (own.x >= digits.units) return kNowhere;
    return of_right ? right * Tiles::kStride + left : left * Tiles::kStride + right;
  };
  const Places<TileT> places([&](int row) { return place(p.i, row, p.j.units, p.j.run_length()); },
                             [&](int column) { return place(p.j, column, 1, 1); });
  for (int i = thread; i < kSide * Tiles::kStride; i += TileT::kThreads) {
    tile[i] = dev::from_float<T>(0.f);  // what only completes a tile
  }

  Accumulator<TileT> sum;
  sum.clear();
  ROLLED
  for (int step = first; begin < end && step < last; ++step) {
    const auto [i, j] = tiles_of(step);
    Accumulator<TileT> dw;
    dw.clear();
    ROLLED
    for (int slot = begin; slot < end; slot += kRowsAtOnce) {
      const int rows = end - slot < kRowsAtOnce ? end - slot : kRowsAtOnce;
      if (step == first || end - begin > kRowsAtOnce) {
        __syncthreads();  // nobody reads the rows before
        for (int s = thread; s < rows; s += TileT::kThreads) {
          from[s] = (of.row_index ? of.row_index[slot + s] : slot + s) * of.in_features;
        }
        __syncthreads();  // rows are known
      }
      const auto x = lines_at<T, TileT, kSide, false>(
          of.x, i.first(), [&](int s) { return s < rows ? from[s] : -1; }, i, p.vector_x);
      const auto dz = lines_at<T, TileT, kSide, false>(
          of.dz, j.first(), [&](int s) { return s < rows ? int64_t(slot + s) * of.out_features : -1; }, j, p.vector_dz);
      block_gemm<T, TileT, false, false>(dw, x, dz, rows, p.i.units * p.i.run_length(),
                                         p.j.units * p.j.run_length(), stages);
    }
    // Nobody reads the tile: the product has begun with a barrier.
    places.store(dw, tile, !of_right && p.j.run_length() % 2 == 0);
    const auto other = lines_at<T, TileT, kSide, false>(
        of.other, bond, [&](int line) { return of_right ? line_of_left(i, j, line) : line_of_right(i, j, line); },
        Adjacent{of.b - bond}, p.vector_b);
    block_gemm<T, TileT, true, false>(sum, Resident<T, true>(tile, Tiles::kStride), other, inner_lines, kSide,
                                      of.b - bond, stages);
  }
  const auto [i, j] = tiles_of(0);
  const int64_t part = int64_t(of.experts) * of.i[2] * of.j[2] * of.b * blockIdx.y;
  sum.for_each([&](int row, int column, float& value) {
    const int64_t line = of_right ? line_of_right(i, j, row) : line_of_left(i, j, row);
    if (line < 0 || bond + column >= of.b) return;
    if (of_right) {
      static_cast<float*>(of.out)[part + line + bond + column] = value;
    } else {
      static_cast<T*>(of.out)[line + bond + column] = dev::from_float<T>(value);
    }
  });
}

template <class T>
void launch(const GradientArguments& p, dim3 grid, cudaStream_t stream);

}  // namespace mpoe::cuda
