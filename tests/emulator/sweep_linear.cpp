// The fused contraction in bfloat16, forward and backward. See sweep.h.
#include "emulator/sweep.h"

#include <array>
#include <string>
#include <vector>

#include "cuda/linear/gradient.h"
#include "cuda/linear/launch.cuh"
#include "cuda/linear/panel.h"
#include "native/cpp/truth.h"

#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

namespace mpoe::cuda {

// Other dtypes take minutes to compile with sanitizers and have the same index maps, pipeline and epilogue.
[[noreturn]] void bfloat16_only() { throw std::logic_error("bfloat16 only"); }
void launch_panel_float(const PanelArguments&, const PanelLaunch&, cudaStream_t) { bfloat16_only(); }
void launch_panel_tf32(const PanelArguments&, const PanelLaunch&, cudaStream_t) { bfloat16_only(); }
void launch_panel_float16(const PanelArguments&, const PanelLaunch&, cudaStream_t) { bfloat16_only(); }
void launch_gradient_float(const GradientArguments&, dim3, bool, cudaStream_t) { bfloat16_only(); }
void launch_gradient_tf32(const GradientArguments&, dim3, bool, cudaStream_t) { bfloat16_only(); }
void launch_gradient_float16(const GradientArguments&, dim3, bool, cudaStream_t) { bfloat16_only(); }

namespace {

using check::Array;

constexpr Dtype kDtype = Dtype::kBFloat16;

struct Case {
  const char* name;
  mpoe::BlockDims dims;  // iL, jL, a, iC, jC, b, iR, jR, in_features, out_features
  std::vector<PanelShape> panels;  // of j; those of i are whole
  std::array<int, 4> tile;         // of the gradient kernel; without, the features are padded
  std::vector<int64_t> offsets;
  int64_t slots, tokens;  // tokens 0: no gather
  mpoe::Activation activation;
  int64_t shift;  // elements by which arrays miss 64-byte alignment
};

// Asynchronous copies, several tiles in rows and columns, several steps of the pipeline.
const Case kCases[] = {
    {"wide", {8, 4, 32, 2, 3, 24, 8, 8, 128, 96}, {{4, 3, 4, true}, {2, 1, 4, false}}, {4, 2, 8, 8},
     {0, 66, 66, 71}, 74, 40,
     mpoe::Activation::kGelu, 0},
    {"wide but not aligned", {8, 2, 16, 2, 3, 16, 8, 8, 128, 48}, {{2, 3, 8, true}}, {8, 2, 8, 8}, {0, 9, 20}, 20, 0,
     mpoe::Activation::kNone, 3},
    {"padded", {3, 2, 5, 2, 3, 4, 3, 3, 17, 16}, {{1, 1, 3, false}}, {}, {0, 3, 3, 20}, 23, 11,
     mpoe::Activation::kRelu, 1},
    {"odd", {3, 2, 5, 2, 3, 4, 3, 3, 18, 18}, {{2, 3, 1, true}}, {3, 1, 3, 3}, {0, 3, 3, 20}, 23, 11,
     mpoe::Activation::kRelu, 1},
    {"many bonds", {8, 1, 16, 4, 4, 72, 1, 8, 32, 32}, {{1, 4, 8, true}}, {8, 1, 1, 8}, {0, 5, 21}, 24, 0,
     mpoe::Activation::kSilu, 0},
};

void run(const Case& c) {
  check::Random random(1);
  truth::Problem p{};
  const auto& d = p.dims = c.dims;
  p.offsets = c.offsets;
  p.experts = static_cast<int64_t>(c.offsets.size()) - 1;
  p.slots = c.slots;
  p.tokens = c.tokens ? c.tokens : c.slots;
  p.activation = c.activation;
  for (int64_t s = 0; c.tokens && s < c.slots; ++s) p.row_index.push_back(random.below(c.tokens));
  const auto array = [&](int64_t count, double scale) { return Array::random(kDtype, count, random, scale, c.shift); };
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
  Array dz(kDtype, c.slots * d.out_features, c.shift);
  for (int64_t i = 0; i < dz.count(); ++i) dz.set(i, p.grad[i] * truth::derivative(c.activation, truth.z[i]));

  const std::vector<int> offsets(c.offsets.begin(), c.offsets.end());
  const int64_t* row_index = c.tokens ? p.row_index.data() : nullptr;
  Dims dims;
  const int64_t sizes[] = {d.iL, d.jL, d.a, d.iC, d.jC, d.b, d.iR, d.jR};
  for (int axis = 0; axis < kAxes; ++axis) dims.size[axis] = static_cast<int>(sizes[axis]);
  dims.in_features = static_cast<int>(d.in_features);
  dims.out_features = static_cast<int>(d.out_features);
  const auto result = [&](int64_t count) { return Array(kDtype, count, c.shift); };
  const double allowed = 2 * check::tolerance(kDtype);

  for (const PanelShape& shape : c.panels) {
    const std::string what = std::string(c.name) + (shape.left_first ? ", left first" : ", right first");
    const Array y = result(c.slots * d.out_features), z = result(c.slots * d.out_features),
                dx = result(c.slots * d.in_features);
    PanelProduct product;
    product.dtype = kDtype;
    product.dims = dims;
    product.shape = shape;
    product.rows = x.data();
    product.left = left.data();
    product.central = central.data();
    product.right = right.data();
    product.experts = static_cast<int>(p.experts);
    product.offsets = offsets.data();
    product.row_index = row_index;
    product.slots = static_cast<int>(c.slots);
    product.out = y.data();
    product.epilogue = {bias.data(), static_cast<int>(c.activation), z.data()};
    panel_product(product, nullptr);
    check::require_close(y, truth.y, check::tolerance(kDtype), what + ": y");

    product.transposed = true;
    product.shape = {1, dims.size[kIC], dims.size[kIR], shape.left_first};
    product.rows = dz.data();
    product.row_index = nullptr;
    product.out = dx.data();
    product.epilogue = {};
    panel_product(product, nullptr);
    std::vector<double> by_token(truth.dx.size());
    for (int64_t s = 0; s < c.slots; ++s) {
      const int64_t row = c.tokens ? p.row_index[s] : s;
      for (int64_t i = 0; i < d.in_features; ++i) by_token[row * d.in_features + i] += dx.get(s * d.in_features + i);
    }
    check::require(check::relative_error(by_token, truth.dx) <= allowed, what + ": dx");
  }
  if (!c.tile[0]) return;

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
  GradientProduct product;
  product.dtype = kDtype;
  product.dims = dims;
  std::copy(c.tile.begin(), c.tile.end(), product.tile);
  product.x = x.data();
  product.dz = dz.data();
  product.experts = static_cast<int>(p.experts);
  product.offsets = offsets.data();
  product.row_index = row_index;
  product.other = right.data();
  product.out = dhalf.data();
  product.parts = static_cast<int>(d.iC * d.jC);
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
  for (std::size_t i = 0; i < dright.size(); ++i) sum[i % sum.size()] += dright[i];
  const std::string what = c.name;
  check::require(check::relative_error(dleft, truth.dleft) <= allowed, what + ": dleft");
  check::require(check::relative_error(dcentral, truth.dcentral) <= allowed, what + ": dcentral");
  check::require(check::relative_error(sum, truth.dright) <= allowed, what + ": dright");
}

}  // namespace
}  // namespace mpoe::cuda

int main(int count, char** words) {
  return emu::sweep(count, words, [] {
    for (const auto& c : mpoe::cuda::kCases) mpoe::cuda::run(c);
  });
}
