// Gradients of the blocks, without a weight gradient in memory: the gradient x^T dz of a tile of an
// expert's weight is computed in registers, regrouped in shared memory and multiplied at once,
//
//   out[outer, b] = sum of dw[outer, inner] other[inner, b]
//
// over `inner` and, of right, a part of the tiles. `outer` are pairs of digits of left and central
// (iL, jL), `inner` those of right, and `other` is right; or the other way round, and `other` is
// left times central. No atomics, the same bits on every run.
#pragma once
#include "cuda/linear/tiles.cuh"

namespace mpoe::cuda {

constexpr int kSide = 64;          // of the tiles
constexpr int kRowsAtOnce = 1024;  // whose places are looked up together

struct GradientArguments {
  Digits i;
  Digits j;
  bool vector_x = false;
  bool vector_dz = false;
  bool vector_b = false;
  int tiles_per_part = 1;  // of inner
  GradientProduct product;
};

template <class T>
struct GradientTiles {
  using Out = Tile<T, kSide, kSide, 32, 32>;
  static constexpr int kStride = padded_stride<T>(kSide);
  static constexpr int kStageElements = 2 * Out::kK * padded_stride<T>(kSide);
  static constexpr int kElements = kSide * kStride + kStages * kStageElements;
};

// What a block of threads computes. Grid: (tiles of outer and of b, parts, experts).
struct GradientBlock {
  const GradientArguments& p;
  int expert;
  int begin;  // slots
  int end;
  int bond;
  int outer;
  int first;  // tiles of inner
  int last;
  int inner_lines;

  __device__ __forceinline__ explicit GradientBlock(const GradientArguments& arguments)
      : p(arguments) {
    expert = blockIdx.z;
    begin = p.product.offsets[expert];
    end = p.product.offsets[expert + 1];
    const int bond_tiles = (p.product.b + kSide - 1) / kSide;
    bond = blockIdx.x % bond_tiles * kSide;
    outer = blockIdx.x / bond_tiles;
    int inner = p.i.right_tiles() * p.j.right_tiles();
    inner_lines = p.i.run_length() * p.j.run_length();
    if (p.product.of_right) {
      inner = p.i.left_tiles() * p.j.left_tiles();
      inner_lines = p.i.units * p.j.units;
    }
    first = p.tiles_per_part * static_cast<int>(blockIdx.y);
    last = first + p.tiles_per_part < inner ? first + p.tiles_per_part : inner;
  }

  struct Tiles {
    DigitTile i;
    DigitTile j;
  };
  __device__ __forceinline__ Tiles tiles(int step) const {
    const bool of_right = p.product.of_right;
    const DigitPair left(of_right ? step : outer, p.j.left_tiles());
    const DigitPair right(of_right ? outer : step, p.j.right_tiles());
    return {DigitTile(p.i, left.x, right.x), DigitTile(p.j, left.y, right.y)};
  }

  // Elements before a line of half or of right, of all experts; negative: it is not in the tiles.
  __device__ __forceinline__ int64_t line_of_half(const Tiles& t, int line) const {
    const DigitPair digits(line, p.j.units);
    if (digits.x >= t.i.units || digits.y >= t.j.units)
      return -1;
    const int64_t row = int64_t(expert) * p.product.i[0] + t.i.left + digits.x;
    const int64_t left = row * p.product.j[0] + t.j.left + digits.y;
    return ((left * p.product.i[1] + t.i.centre) * p.product.j[1] + t.j.centre) * p.product.b;
  }
  __device__ __forceinline__ int64_t line_of_right(const Tiles& t, int line) const {
    const DigitPair digits(line, p.j.run_length());
    if (digits.x >= t.i.run || digits.y >= t.j.run)
      return -1;
    const int64_t row = int64_t(expert) * p.product.i[2] + t.i.right + digits.x;
    return (row * p.product.j[2] + t.j.right + digits.y) * p.product.b;
  }

  // Where a row (iL, iR) or a column (jL, jR) of a weight's tile goes, in outer and inner.
  __device__ __forceinline__ int place(
      const Digits& of, int number, int of_left, int of_run, int stride) const {
    const DigitPair digits(number, of.run_length());
    if (digits.x >= of.units)
      return kNowhere;
    const int left = digits.x * of_left;
    const int right = digits.y * of_run;
    return p.product.of_right ? right * stride + left : left * stride + right;
  }
};

template <class T>
__global__ void __launch_bounds__(GradientTiles<T>::Out::kThreads)
    gradient_kernel(const __grid_constant__ GradientArguments p) {
  using Tiles = GradientTiles<T>;
  using TileT = typename Tiles::Out;
  DYN_SHARED(T, tile);
  SHARED_ARRAY(int64_t, from, kRowsAtOnce);
  T* const stages = tile + kSide * Tiles::kStride;
  const GradientProduct& product = p.product;
  const GradientBlock block(p);
  const int begin = block.begin;
  const int end = block.end;
  const Places<TileT> places(
      [&](int row) { return block.place(p.i, row, p.j.units, p.j.run_length(), Tiles::kStride); },
      [&](int column) { return block.place(p.j, column, 1, 1, Tiles::kStride); });
  for (int i = threadIdx.x; i < kSide * Tiles::kStride; i += TileT::kThreads) {
    tile[i] = dev::from_float<T>(0.f);  // what only completes a tile
  }

  Accumulator<TileT> sum;
  sum.clear();
  ROLLED
  for (int step = block.first; begin < end && step < block.last; ++step) {
    const auto tiles = block.tiles(step);
    Accumulator<TileT> dw;
    dw.clear();
    ROLLED
    for (int slot = begin; slot < end; slot += kRowsAtOnce) {
      const int rows = end - slot < kRowsAtOnce ? end - slot : kRowsAtOnce;
      if (step == block.first || end - begin > kRowsAtOnce) {
        __syncthreads();  // nobody reads the rows before
        for (int s = threadIdx.x; s < rows; s += TileT::kThreads) {
          const int64_t row = product.row_index ? product.row_index[slot + s] : slot + s;
          from[s] =
              row * product.in_features;  // known at the barrier with which the product begins
        }
      }
      const auto x_line = [&](int s) {
        return s < rows ? from[s] : -1;
      };
      const auto dz_line = [&](int s) {
        return s < rows ? int64_t(slot + s) * product.out_features : -1;
      };
      const auto x =
          lines_at<T, TileT, kSide, false>(product.x, tiles.i.first(), x_line, tiles.i, p.vector_x);
      const auto dz = lines_at<T, TileT, kSide, false>(
          product.dz, tiles.j.first(), dz_line, tiles.j, p.vector_dz);
      const int rows_of_w = p.i.units * p.i.run_length();
      const int columns_of_w = p.j.units * p.j.run_length();
      block_gemm<T, TileT, false, false>(dw, x, dz, rows, rows_of_w, columns_of_w, stages);
    }
    // Nobody reads the tile: the product has begun with a barrier.
    places.store(dw, tile, !product.of_right && p.j.run_length() % 2 == 0);
    const auto other_line = [&](int line) {
      return product.of_right ? block.line_of_half(tiles, line) : block.line_of_right(tiles, line);
    };
    const int bonds = product.b - block.bond;
    const auto other = lines_at<T, TileT, kSide, false>(
        product.other, block.bond, other_line, Adjacent{bonds}, p.vector_b);
    const Resident<T, true> weight(tile, Tiles::kStride);
    block_gemm<T, TileT, true, false>(sum, weight, other, block.inner_lines, kSide, bonds, stages);
  }
  const auto tiles = block.tiles(0);
  const int64_t part =
      int64_t(product.experts) * product.i[2] * product.j[2] * product.b * blockIdx.y;
  sum.for_each([&](int row, int column, float& value) {
    const int64_t line =
        product.of_right ? block.line_of_right(tiles, row) : block.line_of_half(tiles, row);
    if (line < 0 || block.bond + column >= product.b)
      return;
    const int64_t at = line + block.bond + column;
    if (product.of_right) {
      static_cast<float*>(product.out)[part + at] = value;
    } else {
      static_cast<T*>(product.out)[at] = dev::from_float<T>(value);
    }
  });
}

template <class T>
void launch(const GradientArguments& p, dim3 grid, cudaStream_t stream);

}  // namespace mpoe::cuda
