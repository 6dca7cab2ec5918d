#include "cuda/linear/linear.h"

#include <algorithm>
#include <limits>
#include <utility>
#include <vector>

#include "cuda/dispatch.h"
#include "cuda/linear/gradient.cuh"
#include "cuda/linear/rebuilt.cuh"

namespace mpoe::cuda {
namespace {

// Most of a tile: columns of k and of n, and pairs of digits of left and of right.
struct TileLimits {
  int rows;
  int columns;
  int units;
  int run;
};

Digits cut(const Digits& whole_digits, int units, int run) {
  Digits digits = whole_digits;
  digits.units = units;
  digits.run = FastDiv(static_cast<uint32_t>(run));
  return digits;
}

// Lengths of runs that a tile may have.
std::vector<int> runs_of(const Digits& digits, int most) {
  std::vector<int> runs;
  if (digits.size[2] <= most)
    runs.push_back(digits.size[2]);
  for (int run = 1; run < digits.size[2] && run <= most; run *= 2)
    runs.push_back(run);
  return runs;
}

// A tile whose runs are not whole chunks of 16 bytes counts three times: its elements are copied
// one by one.
int64_t cost_of(const Digits& digits, int chunk) {
  const int64_t tiles = int64_t(digits.left_tiles()) * digits.right_tiles();
  return digits.run_length() % chunk == 0 ? tiles : 3 * tiles;
}

// Cuts both into the fewest tiles within the limits; gives the cost.
int64_t choose(Digits& k, Digits& n, const TileLimits& most, int chunk) {
  int64_t least = std::numeric_limits<int64_t>::max();
  const Digits all_k = k;
  const Digits all_n = n;
  for (const int run_k : runs_of(all_k, most.rows)) {
    for (const int run_n : runs_of(all_n, most.columns)) {
      if (run_k * run_n > most.run)
        continue;
      for (int units = std::min(all_k.size[0], most.rows / run_k); units > 0; units /= 2) {
        const int units_n = std::min({all_n.size[0], most.columns / run_n, most.units / units});
        if (units_n < 1)
          continue;
        const Digits cut_k = cut(all_k, units, run_k);
        const Digits cut_n = cut(all_n, units_n, run_n);
        const int64_t cost = cost_of(cut_k, chunk) * cost_of(cut_n, chunk);
        if (cost >= least)
          continue;
        least = cost;
        k = cut_k;
        n = cut_n;
      }
    }
  }
  return least;
}

// Whether what a tile has of rows can be moved 16 bytes at a time.
bool whole_tiles(int chunk, const Digits& digits, std::initializer_list<const void*> arrays) {
  return whole(chunk, {digits.columns, digits.size[2], digits.run_length()}, arrays);
}

}  // namespace

void rebuilt_product(const RebuiltProduct& product, cudaStream_t stream) {
  if (product.slots == 0)
    return;
  const bool transposed = product.transposed;
  const int chunk = 16 / static_cast<int>(size_of(product.dtype));
  const int a = product.a;
  const int b = product.b;
  RebuiltArguments p;
  p.of = product;
  p.k = Digits(product.i, product.in_features);
  p.n = Digits(product.j, product.out_features);
  if (transposed)
    std::swap(p.k, p.n);
  const auto steps = [&](int& of_k, int& of_n, int size_j, int step) {
    of_k = transposed ? step : size_j * step;
    of_n = transposed ? size_j * step : step;
  };
  steps(p.left_k, p.left_n, product.j[0], a);
  steps(p.central_k, p.central_n, product.j[1], b);
  steps(p.right_k, p.right_n, product.j[2], b);
  int columns = 64;
  Digits wide_k = p.k;
  Digits wide_n = p.n;
  const int64_t narrow = choose(p.k, p.n, {kDepth, 64, kDepth, 64}, chunk);
  const int64_t wide = choose(wide_k, wide_n, {kDepth, 128, kDepth, 128}, chunk);
  // Twice the columns in less than twice the time.
  if (chunk == 8 && 3 * wide < 2 * narrow) {
    columns = 128;
    p.k = wide_k;
    p.n = wide_n;
  }
  p.vector_rows = whole_tiles(chunk, p.k, {product.rows});
  p.vector_out = whole_tiles(chunk, p.n, {product.out, product.epilogue.pre_activation});
  p.vector_a = whole(chunk, {a}, {product.left});
  p.vector_b = whole(chunk, {b}, {product.central, product.right});
  p.pairs = p.n.run_length() % 2 == 0;
  with_type(product.dtype, [&](auto zero) { launch<decltype(zero)>(p, columns, stream); });
}

void gradient_product(const GradientProduct& product, cudaStream_t stream) {
  const int chunk = 16 / static_cast<int>(size_of(product.dtype));
  GradientArguments p;
  p.of = product;
  p.i = Digits(product.i, product.in_features);
  p.j = Digits(product.j, product.out_features);
  choose(p.i, p.j, {kSide, kSide, kSide, kSide}, chunk);
  p.vector_x = whole_tiles(chunk, p.i, {product.x});
  p.vector_dz = whole_tiles(chunk, p.j, {product.dz});
  p.vector_b = whole(chunk, {product.b}, {product.other});
  const int left = p.i.left_tiles() * p.j.left_tiles();
  const int right = p.i.right_tiles() * p.j.right_tiles();
  const int outer = product.of_right ? right : left;
  const int inner = product.of_right ? left : right;
  p.share = (inner + product.parts - 1) / product.parts;
  const int bond_tiles = (product.b + kSide - 1) / kSide;
  const dim3 grid(static_cast<unsigned>(outer * bond_tiles),
                  static_cast<unsigned>(product.parts),
                  static_cast<unsigned>(product.experts));
  with_type(product.dtype, [&](auto zero) { launch<decltype(zero)>(p, grid, stream); });
}

}  // namespace mpoe::cuda
