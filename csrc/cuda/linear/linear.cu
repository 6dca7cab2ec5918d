// Host side of the fused contraction: cuts the weight W of an expert into tiles, chooses the
// cheapest cut, and launches the kernels of rebuilt.cuh and gradient.cuh.
//
// A column of W, and a row alike, has three digits, one of each block:
//   column = (left * central digits + central) * right digits + right
// A tile takes `units` digits of left, one digit of central and a run of adjacent digits of right,
// which are adjacent in memory too. For example, 3, 2 and 4 digits, cut into 2 units and runs of 4
// (the last tiles may have less):
//
//               central = 0            central = 1
//   left = 0     0  1  2  3  tile 0     4  5  6  7  tile 1
//   left = 1     8  9 10 11  tile 0    12 13 14 15  tile 1
//   left = 2    16 17 18 19  tile 2    20 21 22 23  tile 3
//
// A tile of W is a tile of its rows by one of its columns, each with one digit of central. So it can
// be regrouped as pairs of digits of left (a row's and a column's) by pairs of digits of right, and
// is then two small matrix products: left times central, and that times right.
#include "cuda/linear/linear.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "cuda/dispatch.h"
#include "cuda/linear/gradient.cuh"
#include "cuda/linear/rebuilt.cuh"

namespace mpoe::cuda {
namespace {

// Costs are estimates, relative to one another.
constexpr int kElementwiseCost = 3;  // of a tile whose elements are copied one by one; else 1
constexpr double kWideCost = 1.5;    // of a tile of kWideTile columns; of kNarrowTile: 1

// Most of a tile of W. Its rows have digits k and its columns digits n, or the other way round in a
// product with W transposed.
struct TileLimits {
  int k_columns;    // units times run of k: columns of x
  int n_columns;    // units times run of n: columns of the result, or of dz
  int left_pairs;   // units of k times units of n: rows of the regrouped tile
  int right_pairs;  // run of k times run of n: its columns
};

// Both cut into tiles, and what all tiles cost together.
struct Cut {
  Digits k;
  Digits n;
  int64_t cost;
};

// Elements of a vector copy of 16 bytes.
int chunk_of(Dtype dtype) {
  return 16 / size_of(dtype);
}

Digits cut_into(Digits digits, int units, int run) {
  digits.units = units;
  digits.run = FastDiv(static_cast<uint32_t>(run));
  return digits;
}

// Lengths of runs to try: all digits of right if a tile may have them, and powers of two below.
std::vector<int> runs_to_try(const Digits& digits, int most) {
  std::vector<int> runs;
  if (digits.size[2] <= most)
    runs.push_back(digits.size[2]);
  for (int run = 1; run < digits.size[2] && run <= most; run *= 2)
    runs.push_back(run);
  return runs;
}

// The number of tiles, weighted: runs that are not whole chunks are copied one element at a time.
int64_t cost_of(const Digits& digits, int chunk) {
  const int64_t tiles = int64_t(digits.left_tiles()) * digits.right_tiles();
  return digits.run_length() % chunk == 0 ? tiles : kElementwiseCost * tiles;
}

// The cheapest cut within the limits, of equally cheap ones the first. Candidates are all pairs of
// runs to try that fit together; for each of them the most units of k that fit, half as many, and
// so on; and for each of these the most units of n. One unit of each always fits.
Cut cheapest_cut(const Digits& k, const Digits& n, const TileLimits& limits, int chunk) {
  Cut cheapest{k, n, INT64_MAX};
  for (const int run_k : runs_to_try(k, limits.k_columns)) {
    for (const int run_n : runs_to_try(n, limits.n_columns)) {
      if (run_k * run_n > limits.right_pairs)
        continue;
      for (int units_k = std::min(k.size[0], limits.k_columns / run_k); units_k > 0; units_k /= 2) {
        const int units_n =
            std::min({n.size[0], limits.n_columns / run_n, limits.left_pairs / units_k});
        const Digits cut_k = cut_into(k, units_k, run_k);
        const Digits cut_n = cut_into(n, units_n, run_n);
        const int64_t cost = cost_of(cut_k, chunk) * cost_of(cut_n, chunk);
        if (cost < cheapest.cost)
          cheapest = {cut_k, cut_n, cost};
      }
    }
  }
  return cheapest;
}

// Cuts k and n; returns the columns of a tile of the result.
int choose_tiles(RebuiltArguments& p, int chunk) {
  // The kernel has room for kDepth x columns of W, regrouped or not.
  const auto cut_to = [&](int columns) {
    return cheapest_cut(
        p.k,
        p.n,
        {.k_columns = kDepth, .n_columns = columns, .left_pairs = kDepth, .right_pairs = columns},
        chunk);
  };
  int columns = kNarrowTile;
  Cut cut = cut_to(kNarrowTile);
  if (size_of(p.product.dtype) == 2) {
    const Cut wide = cut_to(kWideTile);
    if (kWideCost * wide.cost < cut.cost) {
      columns = kWideTile;
      cut = wide;
    }
  }
  p.k = cut.k;
  p.n = cut.n;
  return columns;
}

// Elements from a digit of k, or of n, to the next one in every block. left is [iL, jL, a]: one
// digit of i is jL * a elements, one of j is a. central [.., iC, jC, b] and right [iR, jR, b] are
// alike with b. k are digits of i and n of j; transposed, the other way round.
void set_digit_strides(RebuiltArguments& p) {
  const RebuiltProduct& product = p.product;
  const auto set = [&](int& of_k, int& of_n, int size_j, int bond) {
    of_k = size_j * bond;
    of_n = bond;
    if (product.transposed)
      std::swap(of_k, of_n);
  };
  set(p.left_k, p.left_n, product.j[0], product.a);
  set(p.central_k, p.central_n, product.j[1], product.b);
  set(p.right_k, p.right_n, product.j[2], product.b);
}

// Whether runs of a tile are whole chunks in these arrays of rows: every row and every run begins
// at a multiple of 16 bytes.
bool can_copy_runs(int chunk, const Digits& digits, std::initializer_list<const void*> arrays) {
  return can_copy_16_bytes(chunk, {digits.columns, digits.size[2], digits.run_length()}, arrays);
}

// What is copied 16 bytes, or stored two elements, at a time.
void set_vector_copies(RebuiltArguments& p, int chunk) {
  const RebuiltProduct& product = p.product;
  p.vector_rows = can_copy_runs(chunk, p.k, {product.rows});
  p.vector_out = can_copy_runs(chunk, p.n, {product.out, product.epilogue.pre_activation});
  p.vector_a = can_copy_16_bytes(chunk, {product.a}, {product.left});
  p.vector_b = can_copy_16_bytes(chunk, {product.b}, {product.central, product.right});
  p.pairs = p.n.run_length() % 2 == 0;
}

}  // namespace

void rebuilt_product(const RebuiltProduct& product, cudaStream_t stream) {
  if (product.slots == 0)
    return;
  const int chunk = chunk_of(product.dtype);
  RebuiltArguments p;
  p.product = product;
  p.k = Digits(product.i, product.in_features);
  p.n = Digits(product.j, product.out_features);
  if (product.transposed)
    std::swap(p.k, p.n);
  set_digit_strides(p);
  const int columns = choose_tiles(p, chunk);
  set_vector_copies(p, chunk);
  with_type(product.dtype, [&](auto zero) { launch<decltype(zero)>(p, columns, stream); });
}

void gradient_product(const GradientProduct& product, cudaStream_t stream) {
  const int chunk = chunk_of(product.dtype);
  const Cut cut = cheapest_cut(
      Digits(product.i, product.in_features),
      Digits(product.j, product.out_features),
      {.k_columns = kSide, .n_columns = kSide, .left_pairs = kSide, .right_pairs = kSide},
      chunk);
  GradientArguments p;
  p.product = product;
  p.i = cut.k;
  p.j = cut.n;
  p.vector_x = can_copy_runs(chunk, p.i, {product.x});
  p.vector_dz = can_copy_runs(chunk, p.j, {product.dz});
  p.vector_b = can_copy_16_bytes(chunk, {product.b}, {product.other});
  // The result has lines of pairs of left, or of right; the sum is over tiles of the others.
  const int left_tiles = p.i.left_tiles() * p.j.left_tiles();
  const int right_tiles = p.i.right_tiles() * p.j.right_tiles();
  const int result_tiles = product.of_right ? right_tiles : left_tiles;
  const int summed_tiles = product.of_right ? left_tiles : right_tiles;
  p.tiles_per_part = (summed_tiles + product.parts - 1) / product.parts;
  const int bond_tiles = (product.b + kSide - 1) / kSide;
  // x: tiles of the result, those of b adjacent; y: parts of the sum; z: experts, of which
  // mpoe_kernels/linear/cuda.py refuses what CUDA has no blocks for.
  const dim3 grid = grid_of(result_tiles * bond_tiles, product.parts, product.experts);
  with_type(product.dtype, [&](auto zero) { launch<decltype(zero)>(p, grid, stream); });
}

}  // namespace mpoe::cuda
