// The fused contraction in bfloat16 and in float32, whose blocks are small enough for the thread sanitizer, forward and
// backward; and products that every expert has for itself. See sweep.h.
#include "emulator/sweep.h"

#include <algorithm>
#include <string>
#include <vector>

#include "cuda/linear/gradient.cuh"
#include "cuda/linear/grouped.cuh"
#include "cuda/linear/rebuilt.cuh"
#include "native/cpp/truth.h"

#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

namespace mpoe::cuda {

// Other dtypes take minutes to compile with sanitizers and have the same digits, pipeline and epilogue.
[[noreturn]] void not_here() { throw std::logic_error("bfloat16 and float32 only"); }
template <>
void launch<dev::fp16>(const RebuiltArguments&, int, cudaStream_t) {
  not_here();
}
template <>
void launch<dev::fp16>(const GradientArguments&, dim3, cudaStream_t) {
  not_here();
}
template <>
void launch<dev::fp16>(const GroupedRows&, cudaStream_t) {
  not_here();
}
template <>
void launch<dev::fp16>(const GroupedBlocks&, cudaStream_t) {
  not_here();
}

namespace {

using check::Array;

struct Case {
  const char* name;
  mpoe::BlockDims dims;  // iL, jL, a, iC, jC, b, iR, jR, in_features, out_features
  std::vector<int64_t> offsets;
  int64_t slots, tokens;  // tokens 0: no gather
  mpoe::Activation activation;
  int64_t shift;  // elements by which arrays miss 64-byte alignment
};

// Asynchronous copies, several tiles in rows and columns, several steps of the pipeline.
const Case kCases[] = {
    {"wide", {8, 4, 32, 2, 3, 24, 8, 8, 128, 96},
     {0, 66, 66, 71}, 74, 40,
     mpoe::Activation::kGelu, 0},
    {"wide but not aligned", {8, 2, 16, 2, 3, 16, 8, 8, 128, 48}, {0, 9, 20}, 20, 0,
     mpoe::Activation::kNone, 3},
    {"padded", {3, 2, 5, 2, 3, 4, 3, 3, 17, 16}, {0, 3, 3, 20}, 23, 11,
     mpoe::Activation::kRelu, 1},
    {"odd", {3, 2, 5, 2, 3, 4, 3, 3, 18, 18}, {0, 3, 3, 20}, 23, 11,
     mpoe::Activation::kRelu, 1},
    {"many bonds", {8, 1, 16, 4, 4, 72, 1, 8, 32, 32}, {0, 5, 21}, 24, 0,
     mpoe::Activation::kSilu, 0},
};

void run(const Case& c, Dtype dtype) {
  check::Random random(1);
  truth::Problem p{};
  const auto& d = p.dims = c.dims;
  p.offsets = c.offsets;
  p.experts = static_cast<int64_t>(c.offsets.size()) - 1;
  p.slots = c.slots;
  p.tokens = c.tokens ? c.tokens : c.slots;
  p.activation = c.activation;
  for (int64_t s = 0; c.tokens && s < c.slots; ++s) p.row_index.push_back(random.below(c.tokens));
  const auto array = [&](int64_t count, double scale) { return Array::random(dtype, count, random, scale, c.shift); };
  const auto scale = [](int64_t sum) { return std::sqrt(3.0 / static_cast<double>(sum)); };
  const Array x = array(p.tokens * d.in_features, 1), left = array(p.experts * d.iL * d.jL * d.a, scale(d.iL)),
              central = array(d.a * d.iC * d.jC * d.b, scale(d.a * d.iC)),
              right = array(p.experts * d.b * d.iR * d.jR, scale(d.b * d.iR)), bias = array(d.out_features, 1);
  p.x = x.values();
  p.left = left.values();
  p.central = central.values();
  p.right = right.values();
  p.bias = bias.values();
  p.grad = array(c.slots * d.out_features, 1).values();
  const truth::Result truth = truth::solve(p, 0.1);
  Array dz(dtype, c.slots * d.out_features, c.shift);
  for (int64_t i = 0; i < dz.count(); ++i) dz.set(i, p.grad[i] * truth::derivative(c.activation, truth.z[i]));

  const std::vector<int> offsets(c.offsets.begin(), c.offsets.end());
  const int64_t* row_index = c.tokens ? p.row_index.data() : nullptr;
  LinearSizes sizes;
  sizes.dtype = dtype;
  const int64_t i[] = {d.iL, d.iC, d.iR}, j[] = {d.jL, d.jC, d.jR};
  std::copy_n(i, 3, sizes.i);
  std::copy_n(j, 3, sizes.j);
  sizes.a = static_cast<int>(d.a);
  sizes.b = static_cast<int>(d.b);
  sizes.in_features = static_cast<int>(d.in_features);
  sizes.out_features = static_cast<int>(d.out_features);
  sizes.experts = static_cast<int>(p.experts);
  sizes.offsets = offsets.data();
  sizes.row_index = row_index;
  sizes.slots = static_cast<int>(c.slots);
  const auto result = [&](int64_t count) { return Array(dtype, count, c.shift); };
  const double allowed = 2 * check::tolerance(dtype);

  // Runs of bonds: [E, iR, jR, b].
  Array by_bond = result(right.count());
  const int64_t pairs = d.iR * d.jR;
  for (int64_t n = 0; n < right.count(); ++n) {
    by_bond.set(n, right.get((n / (pairs * d.b) * d.b + n % d.b) * pairs + n / d.b % pairs));
  }
  const std::string what = std::string(c.name) + (dtype == Dtype::kFloat32 ? ", float32" : "");
  const Array y = result(c.slots * d.out_features), z = result(c.slots * d.out_features),
              dx = result(c.slots * d.in_features);
  RebuiltProduct forward{sizes};
  forward.rows = x.data();
  forward.left = left.data();
  forward.central = central.data();
  forward.right = by_bond.data();
  forward.out = y.data();
  forward.epilogue = {bias.data(), static_cast<int>(c.activation), z.data()};
  rebuilt_product(forward, nullptr);
  check::require_close(y, truth.y, check::tolerance(dtype), what + ": y");

  RebuiltProduct back = forward;
  back.transposed = true;
  back.rows = dz.data();
  back.row_index = nullptr;
  back.out = dx.data();
  back.epilogue = {};
  rebuilt_product(back, nullptr);
  std::vector<double> by_token(truth.dx.size());
  for (int64_t s = 0; s < c.slots; ++s) {
    const int64_t row = c.tokens ? p.row_index[s] : s;
    for (int64_t n = 0; n < d.in_features; ++n) by_token[row * d.in_features + n] += dx.get(s * d.in_features + n);
  }
  check::require(check::relative_error(by_token, truth.dx) <= allowed, what + ": dx");

  const int64_t rows = p.experts * d.iL * d.jL, columns = d.iC * d.jC * d.b, parts = 3;
  Array half = result(rows * columns);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t n = 0; n < columns; ++n) {
      double value = 0;
      for (int64_t k = 0; k < d.a; ++k) value += p.left[r * d.a + k] * p.central[k * columns + n];
      half.set(r * columns + n, value);
    }
  }
  const Array dhalf = result(rows * columns);
  std::vector<float> dright(static_cast<std::size_t>(parts * right.count()), std::nanf(""));
  GradientProduct product{sizes};
  product.x = x.data();
  product.dz = dz.data();
  product.other = by_bond.data();
  product.out = dhalf.data();
  gradient_product(product, nullptr);
  product.of_right = true;
  product.other = half.data();
  product.out = dright.data();
  product.parts = static_cast<int>(parts);
  gradient_product(product, nullptr);

  std::vector<double> dleft(truth.dleft.size()), dcentral(truth.dcentral.size()), sum(truth.dright.size());
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t k = 0; k < d.a; ++k) {
      for (int64_t n = 0; n < columns; ++n) {
        dleft[r * d.a + k] += dhalf.get(r * columns + n) * p.central[k * columns + n];
        dcentral[k * columns + n] += p.left[r * d.a + k] * dhalf.get(r * columns + n);
      }
    }
  }
  for (std::size_t n = 0; n < dright.size(); ++n) {
    const int64_t at = static_cast<int64_t>(n % sum.size());
    sum[(at / (pairs * d.b) * d.b + at % d.b) * pairs + at / d.b % pairs] += dright[n];
  }
  check::require(check::relative_error(dleft, truth.dleft) <= allowed, what + ": dleft");
  check::require(check::relative_error(dcentral, truth.dcentral) <= allowed, what + ": dcentral");
  check::require(check::relative_error(sum, truth.dright) <= allowed, what + ": dright");
}

struct Block {
  const char* name;
  int of_slot, m, n;
  bool turned, both;  // both: gradients of rows from the same reading
};
const Block kBlocks[] = {
    {"chunks", 8, 40, 64, false, true},           {"turned chunks", 8, 40, 48, true, true},
    {"odd", 3, 5, 7, false, true},                {"turned odd", 3, 5, 7, true, true},
    {"several tiles", 1, 72, 136, false, false},  {"turned tiles", 3, 72, 65, true, false},
};

// Rows, and gradients through a ReLU, of four experts, one without slots; the last slots have no expert.
template <class T>
void run(const Block& c, Dtype dtype) {
  check::Random random(2);
  const int offsets[] = {0, 9, 9, 34, 40}, experts = 4, slots = 73, tokens = 20, parts = 2, p = c.of_slot;
  std::vector<int64_t> row_index(slots);
  for (int64_t& row : row_index) row = random.below(tokens);
  const Array x = Array::random(dtype, tokens * p * c.m, random), g = Array::random(dtype, slots * p * c.n, random),
              b = Array::random(dtype, experts * c.m * c.n, random, std::sqrt(3.0 / c.m));
  const auto at = [&](int64_t line, int i, int j, int columns) {
    return line * p * columns + (c.turned ? j * p + i : i * columns + j);
  };
  std::vector<double> y(slots * p * c.n), dx(slots * p * c.m), db(experts * c.m * c.n);
  for (int e = 0; e < experts; ++e) {
    for (int s = offsets[e]; s < offsets[e + 1]; ++s) {
      for (int i = 0; i < p; ++i) {
        for (int n = 0; n < c.n; ++n) {
          double& sum = y[at(s, i, n, c.n)];
          for (int m = 0; m < c.m; ++m) sum += x.get(at(row_index[s], i, m, c.m)) * b.get((e * c.m + m) * c.n + n);
          if (c.both && sum <= 0) continue;
          for (int m = 0; m < c.m; ++m) {
            dx[at(s, i, m, c.m)] += g.get(at(s, i, n, c.n)) * b.get((e * c.m + m) * c.n + n);
            db[(e * c.m + m) * c.n + n] += g.get(at(s, i, n, c.n)) * x.get(at(row_index[s], i, m, c.m));
          }
        }
      }
    }
  }
  const int chunk = 16 / static_cast<int>(sizeof(T));
  const auto rows = [&](const Array& data, int columns) {
    return SlotRows{data.data(), columns, c.turned ? p : columns, int64_t(p) * columns,
                    (c.turned ? p : columns) % chunk == 0};
  };
  Grouped common;
  common.dtype = dtype;
  common.experts = experts;
  common.slots = slots;
  common.offsets = offsets;
  common.row_index = row_index.data();
  common.turned = c.turned;
  common.of_slot = p;
  common.rows = rows(x, c.m);
  common.blocks = b.data();
  const Array out(dtype, slots * p * c.n), again(dtype, slots * p * c.n), drows(dtype, slots * p * c.m);
  GroupedRows forward;
  static_cast<Grouped&>(forward) = common;
  forward.columns = c.n;
  forward.out = out.data();
  forward.vector_blocks = c.n % chunk == 0;
  forward.vector_out = (c.turned ? p : c.n) % chunk == 0;
  launch<T>(forward, nullptr);
  check::require_close(out, y, check::tolerance(dtype), std::string(c.name) + ": rows");

  std::vector<float> found(parts * db.size(), std::nanf(""));
  GroupedBlocks back;
  static_cast<Grouped&>(back) = common;
  back.grads = rows(g, c.n);
  back.tiles = ((c.m + 63) / 64) * ((c.n + 63) / 64);
  back.parts = parts;
  back.out = found.data();
  if (c.both) {
    back.activation = kRelu;
    back.drows = drows.data();
    back.again = again.data();
  } else {
    back.blocks = nullptr;
  }
  launch<T>(back, nullptr);
  std::vector<double> sums(db.size());
  for (std::size_t i = 0; i < found.size(); ++i) sums[i % sums.size()] += found[i];
  check::require(check::relative_error(sums, db) <= check::tolerance(dtype), std::string(c.name) + ": blocks");
  if (!c.both) return;
  check::require_close(again, y, check::tolerance(dtype), std::string(c.name) + ": again");
  check::require_close(drows, dx, check::tolerance(dtype), std::string(c.name) + ": gradients of rows");
}

}  // namespace
}  // namespace mpoe::cuda

int main(int count, char** words) {
  return emu::sweep(count, words, [] {
    for (const auto& c : mpoe::cuda::kCases) {
      mpoe::cuda::run(c, mpoe::Dtype::kBFloat16);
      mpoe::cuda::run(c, mpoe::Dtype::kFloat32);
    }
    for (const auto& c : mpoe::cuda::kBlocks) {
      mpoe::cuda::run<dev::bf16>(c, mpoe::Dtype::kBFloat16);
      mpoe::cuda::run<float>(c, mpoe::Dtype::kFloat32);
    }
  });
}
