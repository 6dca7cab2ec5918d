// Rows times weights that are rebuilt tile by tile in shared memory. For a tile of 64 rows of W and some columns, with
// one digit of the central core each,
//
//   half[(k, n), b] = sum over a of left[k, n, a] central[a, b]     k, n: digits of left, in W's rows and columns
//   W[(k, r), (n, s)] = sum over b of half[(k, n), b] right[r, s, b]     r, s: digits of right
//   out += x[.., (k, r)] W
//
// 64 of b at a time. The product with W transposed is the same kernel with the roles of i and j exchanged.
#pragma once
#include <type_traits>

#include "cuda/linear/tiles.cuh"

namespace mpoe::cuda {

constexpr int kDepth = 64;  // of a tile: summed columns; also pairs (k, n), and bonds at once

struct RebuiltArguments {
  Digits k, n;  // of the columns that are summed, and of the result's
  int left_k = 0, left_n = 0, central_k = 0, central_n = 0, right_k = 0, right_n = 0;  // elements per digit
  bool vector_rows = false, vector_a = false, vector_b = false, vector_out = false;  // 16 bytes at a time
  bool pairs = false;                                                                // see Places
  RebuiltProduct of;
};

// Tiles of the three products, for `kColumns` columns of the result: 8 warps, 4 for 32-bit types.
template <class T, int kColumns>
struct RebuiltTiles {
  template <class Two, class Four>
  using BySize = std::conditional_t<sizeof(T) == 2, Two, Four>;
  using Half = BySize<Tile<T, kDepth, 64, 16, 32>, Tile<T, kDepth, 64, 32, 32>>;
  using Weight = std::conditional_t<kColumns == 64, Half, Tile<T, kDepth, 128, 32, 32>>;
  using Out = BySize<Tile<T, 128, kColumns, 32, kColumns / 2>, Tile<T, 64, 64, 32, 32>>;

  static constexpr int kHalfStride = padded_stride<T>(64), kWeightStride = padded_stride<T>(kColumns);
  // Elements of all stages: of each product, and of runs of the result.
  static constexpr int kLine = padded_stride<T>(Out::kK);
  static constexpr int kHalfStages = kStages * (kDepth * kLine + Half::kK * padded_stride<T>(64));
  static constexpr int kOutStages = kStages * kLine * (Out::kM > kColumns ? Out::kM : kColumns);
  static constexpr int kRuns = run_elements<T, Out>();
  static constexpr int kStaged = kHalfStages > kOutStages ? kHalfStages : kOutStages;
  static constexpr int kElements =
      (kStaged > kRuns ? kStaged : kRuns) + kDepth * (kHalfStride + kWeightStride);  // of shared memory
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
  const RebuiltProduct& of = p.of;
  const int columns = p.n.left_tiles() * p.n.right_tiles();
  const int tile = blockIdx.x / columns, column_tile = blockIdx.x - tile * columns, thread = threadIdx.x;
  const RowTile t(of, 1, tile, Out::kM);
  if (t.rows <= 0) return;
  const DigitTile n(p.n, column_tile / p.n.right_tiles(), column_tile % p.n.right_tiles());
  for (int i = thread; i < Out::kM; i += Out::kThreads) {
    from[i] = i < t.rows ? (of.row_index ? of.row_index[t.begin + i] : t.begin + i) * p.k.columns : -1;
  }
  for (int i = thread; i < kDepth * Tiles::kWeightStride; i += Out::kThreads) {
    weight[i] = dev::from_float<T>(0.f);  // what only completes a tile
  }
  // (k, n) and (r, s) -> (k, r) and (n, s)
  const int run_k = p.k.run_length(), run_n = p.n.run_length();
  const Places<Weight> places(
      [&](int row) {
        const DigitPair own(row, p.n.units);
        return own.x < p.k.units ? own.x * run_k * Tiles::kWeightStride + own.y * run_n : kNowhere;
      },
      [&](int column) {
        const DigitPair own(column, run_n);
        return own.x < run_k ? own.x * Tiles::kWeightStride + own.y : kNowhere;
      });
  const int64_t left_of = int64_t(p.k.size[0]) * p.n.size[0] * of.a * t.expert;
  const int64_t right_of = int64_t(p.k.size[2]) * p.n.size[2] * of.b * t.expert;
  const int central_line = p.k.size[1] * p.n.size[1] * of.b;

  Accumulator<Out> sum;
  sum.clear();
  const int depth = t.owned ? p.k.left_tiles() * p.k.right_tiles() : 0;
  ROLLED
  for (int step = 0; step < depth; ++step) {
    const DigitTile k(p.k, step / p.k.right_tiles(), step % p.k.right_tiles());
    const auto left = lines_at<T, Half, kDepth, true>(of.left, left_of, [&](int line) -> int64_t {
      const DigitPair own(line, p.n.units);
      const bool there = own.x < k.units && own.y < n.units;
      return there ? (k.left + own.x) * p.left_k + (n.left + own.y) * p.left_n : -1;
    }, Adjacent{of.a}, p.vector_a);
    Accumulator<Weight> w;
    w.clear();
    ROLLED
    for (int b = 0; b < of.b; b += 64) {
      const int bonds = of.b - b < 64 ? of.b - b : 64;
      const auto central = lines_at<T, Half, 64, false>(
          of.central, k.centre * p.central_k + n.centre * p.central_n + b,
          [&](int line) -> int64_t { return line < of.a ? int64_t(line) * central_line : -1; }, Adjacent{bonds},
          p.vector_b);
      Accumulator<Half> part;
      part.clear();
      block_gemm<T, Half, true, false>(part, left, central, of.a, kDepth, bonds, stages);
      part.for_each_pair([&](int row, int column, float v0, float v1) {
        *reinterpret_cast<dev::Pack<T, 2>*>(half + row * Tiles::kHalfStride + column) = {
            {dev::from_float<T>(v0), dev::from_float<T>(v1)}};
      });
      const auto right = lines_at<T, Weight, Weight::kN, true>(of.right, right_of + b, [&](int line) -> int64_t {
        const DigitPair own(line, run_n);
        const bool there = own.x < k.run && own.y < n.run;
        return there ? (k.right + own.x) * p.right_k + (n.right + own.y) * p.right_n : -1;
      }, Adjacent{bonds}, p.vector_b);
      block_gemm<T, Weight, true, true>(w, Resident<T, true>(half, Tiles::kHalfStride), right, bonds, kDepth,
                                        run_k * run_n, stages);
    }
    places.store(w, weight, p.pairs);  // nobody reads the tile before: the products have begun with barriers
    const auto x = lines_at<T, Out, Out::kM, true>(
        of.rows, k.first(), [&](int row) { return from[row]; }, k, p.vector_rows);
    block_gemm<T, Out, true, false>(sum, x, Resident<T, false>(weight, Tiles::kWeightStride), k.units * run_k, t.rows,
                                    n.units * run_n, stages);
  }

  finish(sum, stages, t.rows, n.units * run_n, t.owned, p.vector_out, of.out, p.n.columns, of.epilogue,
         [&](int row, int column) {
           const Run run = n(column);
           return Place{t.begin + row, n.first() + run.offset, run.count};
         });
}

// columns: of a tile of the result, 64, or of 16-bit types 128. Compiled in a file per type, as the next one.
template <class T>
void launch(const RebuiltArguments& p, int columns, cudaStream_t stream);

}  // namespace mpoe::cuda
