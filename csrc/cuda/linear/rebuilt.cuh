// Rows times weights that are rebuilt tile by tile in shared memory. For a tile of 64 rows of W and
// some columns, with one digit of the central core each,
//
//   half[(k, n), b] = sum over a of left[k, n, a] central[a, b]
//   W[(k, r), (n, s)] = sum over b of half[(k, n), b] right[r, s, b]
//   out += x[.., (k, r)] W
//
// 64 of b at a time; k, n are digits of left, in W's rows and columns, r, s those of right. The
// product with W transposed is the same kernel with the roles of i and j exchanged.
#pragma once
#include <type_traits>

#include "cuda/linear/tiles.cuh"

namespace mpoe::cuda {

constexpr int kDepth = 64;  // of a tile: summed columns; also pairs (k, n), and bonds at once

// Columns of a tile of the result.
constexpr int kNarrowTile = 64;
constexpr int kWideTile = 128;  // of 16-bit types alone

struct RebuiltArguments {
  Digits k;  // of the columns that are summed
  Digits n;  // of the result's
  // Elements per digit.
  int left_k = 0;
  int left_n = 0;
  int central_k = 0;
  int central_n = 0;
  int right_k = 0;
  int right_n = 0;
  // 16 bytes at a time.
  bool vector_rows = false;
  bool vector_a = false;
  bool vector_b = false;
  bool vector_out = false;
  bool pairs = false;  // see Places
  RebuiltProduct product;
};

// Tiles of the three products, for `kColumns` columns of the result: 8 warps, 4 for 32-bit types.
template <class T, int kColumns>
struct RebuiltTiles {
  template <class Two, class Four>
  using BySize = std::conditional_t<sizeof(T) == 2, Two, Four>;
  using Half = BySize<Tile<T, kDepth, 64, 16, 32>, Tile<T, kDepth, 64, 32, 32>>;
  using Weight = std::conditional_t<kColumns == 64, Half, Tile<T, kDepth, 128, 32, 32>>;
  using Out = BySize<Tile<T, 128, kColumns, 32, kColumns / 2>, Tile<T, 64, 64, 32, 32>>;

  static constexpr int kHalfStride = padded_stride<T>(64);
  static constexpr int kWeightStride = padded_stride<T>(kColumns);
  // Elements of all stages: of each product, and of runs of the result.
  static constexpr int kLine = padded_stride<T>(Out::kK);
  static constexpr int kHalfStages = kStages * (kDepth * kLine + Half::kK * padded_stride<T>(64));
  static constexpr int kOutStages = kStages * kLine * (Out::kM > kColumns ? Out::kM : kColumns);
  static constexpr int kRuns = run_elements<T, Out>();
  static constexpr int kStaged = kHalfStages > kOutStages ? kHalfStages : kOutStages;
  static constexpr int kStageElements = kStaged > kRuns ? kStaged : kRuns;
  // Of shared memory.
  static constexpr int kElements = kStageElements + kDepth * (kHalfStride + kWeightStride);
};

// Grid: tiles of rows, of experts and of slots without one, times tiles of columns.
template <class T, int kColumns>
__global__ void __launch_bounds__(RebuiltTiles<T, kColumns>::Out::kThreads)
    rebuilt_kernel(const __grid_constant__ RebuiltArguments p) {
  using Tiles = RebuiltTiles<T, kColumns>;
  using Half = typename Tiles::Half;
  using Weight = typename Tiles::Weight;
  using Out = typename Tiles::Out;
  DYN_SHARED(T, weight);
  SHARED_ARRAY(int64_t, from, Out::kM);
  T* const half = weight + kDepth * Tiles::kWeightStride;
  T* const stages = half + kDepth * Tiles::kHalfStride;
  const RebuiltProduct& product = p.product;
  const int columns = p.n.left_tiles() * p.n.right_tiles();
  const int tile = blockIdx.x / columns;
  const int column_tile = blockIdx.x - tile * columns;
  const int thread = threadIdx.x;
  const RowTile t(product, tile, Out::kM);
  if (t.rows <= 0)
    return;
  const DigitTile n(p.n, column_tile / p.n.right_tiles(), column_tile % p.n.right_tiles());
  for (int i = thread; i < Out::kM; i += Out::kThreads) {
    const int slot = t.begin + i;
    from[i] = -1;
    if (i < t.rows)
      from[i] = (product.row_index ? product.row_index[slot] : slot) * p.k.columns;
  }
  for (int i = thread; i < kDepth * Tiles::kWeightStride; i += Out::kThreads) {
    weight[i] = dev::from_float<T>(0.f);  // what only completes a tile
  }
  // (k, n) and (r, s) -> (k, r) and (n, s)
  const int run_k = p.k.run_length();
  const int run_n = p.n.run_length();
  const Places<Weight> places(
      [&](int row) {
        const DigitPair left(row, p.n.units);
        if (left.x >= p.k.units)
          return kNowhere;
        return left.x * run_k * Tiles::kWeightStride + left.y * run_n;
      },
      [&](int column) {
        const DigitPair right(column, run_n);
        return right.x < run_k ? right.x * Tiles::kWeightStride + right.y : kNowhere;
      });
  const int64_t left_of = int64_t(p.k.size[0]) * p.n.size[0] * product.a * t.expert;
  const int64_t right_of = int64_t(p.k.size[2]) * p.n.size[2] * product.b * t.expert;
  const int central_line = p.k.size[1] * p.n.size[1] * product.b;

  Accumulator<Out> sum;
  sum.clear();
  const int depth = t.owned ? p.k.left_tiles() * p.k.right_tiles() : 0;
  ROLLED
  for (int step = 0; step < depth; ++step) {
    const DigitTile k(p.k, step / p.k.right_tiles(), step % p.k.right_tiles());
    const auto left_line = [&](int line) -> int64_t {
      const DigitPair digits(line, p.n.units);
      if (digits.x >= k.units || digits.y >= n.units)
        return -1;
      return (k.left + digits.x) * p.left_k + (n.left + digits.y) * p.left_n;
    };
    const auto central_row = [&](int line) -> int64_t {
      return line < product.a ? int64_t(line) * central_line : -1;
    };
    const auto right_line = [&](int line) -> int64_t {
      const DigitPair digits(line, run_n);
      if (digits.x >= k.run || digits.y >= n.run)
        return -1;
      return (k.right + digits.x) * p.right_k + (n.right + digits.y) * p.right_n;
    };
    const auto left = lines_at<T, Half, kDepth, true>(
        product.left, left_of, left_line, Adjacent{product.a}, p.vector_a);
    const int centre = k.centre * p.central_k + n.centre * p.central_n;
    Accumulator<Weight> w;
    w.clear();
    ROLLED
    for (int b = 0; b < product.b; b += 64) {
      const int bonds = product.b - b < 64 ? product.b - b : 64;
      const auto central = lines_at<T, Half, 64, false>(
          product.central, centre + b, central_row, Adjacent{bonds}, p.vector_b);
      Accumulator<Half> part;
      part.clear();
      block_gemm<T, Half, true, false>(part, left, central, product.a, kDepth, bonds, stages);
      part.for_each_pair([&](int row, int column, float v0, float v1) {
        *reinterpret_cast<dev::Pack<T, 2>*>(half + row * Tiles::kHalfStride + column) = {
            {dev::from_float<T>(v0), dev::from_float<T>(v1)}};
      });
      const auto right = lines_at<T, Weight, Weight::kN, true>(
          product.right, right_of + b, right_line, Adjacent{bonds}, p.vector_b);
      const Resident<T, true> halves(half, Tiles::kHalfStride);
      block_gemm<T, Weight, true, true>(w, halves, right, bonds, kDepth, run_k * run_n, stages);
    }
    // Nobody reads the tile before: the products have begun with barriers.
    places.store(w, weight, p.pairs);
    const auto x_line = [&](int row) {
      return from[row];
    };
    const auto x =
        lines_at<T, Out, Out::kM, true>(product.rows, k.first(), x_line, k, p.vector_rows);
    const Resident<T, false> weights(weight, Tiles::kWeightStride);
    const int size = k.units * run_k;
    block_gemm<T, Out, true, false>(sum, x, weights, size, t.rows, n.units * run_n, stages);
  }

  const auto place = [&](int row, int column) {
    const Run run = n(column);
    return Place{t.begin + row, n.first() + run.offset, run.count};
  };
  const OutRows rows{product.out, p.n.columns, p.vector_out, product.epilogue};
  finish(sum, stages, t.rows, n.units * run_n, t.owned, rows, place);
}

// columns: kNarrowTile or kWideTile. Compiled in a file per type.
template <class T>
void launch(const RebuiltArguments& p, int columns, cudaStream_t stream);

}  // namespace mpoe::cuda
