// The fused contraction in bfloat16 and in float32, whose blocks are small enough for the thread
// sanitizer, forward and backward. See sweep.h.
#include "emulator/sweep.h"

#include <algorithm>
#include <string>
#include <vector>

#include "cuda/linear/gradient.cuh"
#include "cuda/linear/rebuilt.cuh"
#include "native/cpp/truth.h"

namespace mpoe::cuda {

// Other dtypes take minutes to compile with sanitizers and have the same digits, pipeline and
// epilogue.
[[noreturn]] void not_here() {
  throw std::logic_error("bfloat16 and float32 only");
}
template <>
void launch<dev::fp16>(const RebuiltArguments&, int, cudaStream_t) {
  not_here();
}
template <>
void launch<dev::fp16>(const GradientArguments&, dim3, cudaStream_t) {
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
    {"wide",
     {8, 4, 32, 2, 3, 24, 8, 8, 128, 96},
     {0, 66, 66, 71},
     74,
     40,
     mpoe::Activation::kGelu,
     0},
    {"wide but not aligned",
     {8, 2, 16, 2, 3, 16, 8, 8, 128, 48},
     {0, 9, 20},
     20,
     0,
     mpoe::Activation::kNone,
     3},
    {"padded", {3, 2, 5, 2, 3, 4, 3, 3, 17, 16}, {0, 3, 3, 20}, 23, 11, mpoe::Activation::kRelu, 1},
    {"odd", {3, 2, 5, 2, 3, 4, 3, 3, 18, 18}, {0, 3, 3, 20}, 23, 11, mpoe::Activation::kRelu, 1},
    {"many bonds",
     {8, 1, 16, 4, 4, 72, 1, 8, 32, 32},
     {0, 5, 21},
     24,
     0,
     mpoe::Activation::kSilu,
     0},
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
  const truth::Operands in = truth::random_operands(p, dtype, c.tokens != 0, true, c.shift, random);
  const truth::Result truth = truth::solve(p, 0.1);
  Array dz(dtype, c.slots * d.out_features, c.shift);
  for (int64_t i = 0; i < dz.count(); ++i)
    dz.set(i, p.grad[i] * truth::derivative(c.activation, truth.z[i]));

  const std::vector<int> offsets(c.offsets.begin(), c.offsets.end());
  const int64_t* row_index = c.tokens ? p.row_index.data() : nullptr;
  LinearSizes sizes;
  sizes.dtype = dtype;
  const int64_t i[] = {d.iL, d.iC, d.iR};
  const int64_t j[] = {d.jL, d.jC, d.jR};
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
  const auto result = [&](int64_t count) {
    return Array(dtype, count, c.shift);
  };
  const double allowed = 2 * check::tolerance(dtype);

  // Runs of bonds: [E, iR, jR, b].
  Array by_bond = result(in.right.count());
  const int64_t pairs = d.iR * d.jR;
  for (int64_t n = 0; n < in.right.count(); ++n) {
    by_bond.set(n, in.right.get((n / (pairs * d.b) * d.b + n % d.b) * pairs + n / d.b % pairs));
  }
  const std::string what = std::string(c.name) + (dtype == Dtype::kFloat32 ? ", float32" : "");
  const Array y = result(c.slots * d.out_features);
  const Array z = result(c.slots * d.out_features);
  const Array dx = result(c.slots * d.in_features);
  RebuiltProduct forward{sizes};
  forward.rows = in.x.data();
  forward.left = in.left.data();
  forward.central = in.central.data();
  forward.right = by_bond.data();
  forward.out = y.data();
  forward.epilogue = {in.bias.data(), static_cast<int>(c.activation), z.data()};
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
    for (int64_t n = 0; n < d.in_features; ++n)
      by_token[row * d.in_features + n] += dx.get(s * d.in_features + n);
  }
  check::require(check::relative_error(by_token, truth.dx) <= allowed, what + ": dx");

  const int64_t rows = p.experts * d.iL * d.jL;
  const int64_t columns = d.iC * d.jC * d.b;
  const int64_t parts = 3;
  Array half = result(rows * columns);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t n = 0; n < columns; ++n) {
      double value = 0;
      for (int64_t k = 0; k < d.a; ++k)
        value += p.left[r * d.a + k] * p.central[k * columns + n];
      half.set(r * columns + n, value);
    }
  }
  const Array dhalf = result(rows * columns);
  std::vector<float> dright(static_cast<std::size_t>(parts * in.right.count()), std::nanf(""));
  GradientProduct product{sizes};
  product.x = in.x.data();
  product.dz = dz.data();
  product.other = by_bond.data();
  product.out = dhalf.data();
  gradient_product(product, nullptr);
  product.of_right = true;
  product.other = half.data();
  product.out = dright.data();
  product.parts = static_cast<int>(parts);
  gradient_product(product, nullptr);

  std::vector<double> dleft(truth.dleft.size()), dcentral(truth.dcentral.size()),
      sum(truth.dright.size());
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

}  // namespace
}  // namespace mpoe::cuda

int main(int count, char** words) {
  return emu::sweep(count, words, [] {
    for (const auto& c : mpoe::cuda::kCases) {
      mpoe::cuda::run(c, mpoe::Dtype::kBFloat16);
      mpoe::cuda::run(c, mpoe::Dtype::kFloat32);
    }
  });
}
