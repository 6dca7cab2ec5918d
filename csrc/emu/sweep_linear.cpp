// Every order of the grouped product in bfloat16, forward and backward. See sweep.h.
#include "emu/sweep.h"

#include "cuda/contract.h"
#include "cuda/linear.h"
#include "cuda/panel_launch.cuh"
#include "tests/truth.h"

#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

namespace mpoe::cuda {

// Other dtypes take minutes to compile with sanitizers and have the same index maps, pipeline and epilogue.
[[noreturn]] void bfloat16_only() { throw std::logic_error("bfloat16 only"); }
void contract_float(const ContractArguments&, cudaStream_t) { bfloat16_only(); }
void contract_tf32(const ContractArguments&, cudaStream_t) { bfloat16_only(); }
void contract_float16(const ContractArguments&, cudaStream_t) { bfloat16_only(); }
void launch_panel_float(const PanelArguments&, const PanelLaunch&, cudaStream_t) { bfloat16_only(); }
void launch_panel_tf32(const PanelArguments&, const PanelLaunch&, cudaStream_t) { bfloat16_only(); }
void launch_panel_float16(const PanelArguments&, const PanelLaunch&, cudaStream_t) { bfloat16_only(); }

namespace {

using check::Array;

constexpr Dtype kDtype = Dtype::kBFloat16;

struct Case {
  const char* name;
  mpoe::BlockDims dims;  // iL, jL, a, iC, jC, b, iR, jR, in_features, out_features
  std::vector<const char*> programs;
  std::vector<int64_t> offsets;
  int64_t slots, tokens;  // tokens 0: no gather
  mpoe::Activation activation;
  int64_t shift;  // elements by which arrays miss an address of 64 bytes
};

// Asynchronous copies, several tiles in rows and columns, several steps of the pipeline.
const Case kWide{
    "wide",
    {8, 4, 32, 2, 3, 24, 8, 8, 128, 96},
    {"LC W | W", "CR W | W", "LC | LC R", "CR | L CR", "panel 2 1 4 LC W | W", "few 2 1 4 4 | L C R"},
    {0, 66, 66, 71}, 74, 40, mpoe::Activation::kGelu, 0};
const Case kNotAligned{
    "wide but not aligned", {8, 2, 16, 2, 3, 16, 8, 8, 128, 48}, {"LC W | W"}, {0, 9, 20}, 20, 0,
    mpoe::Activation::kNone, 3};
const Case kPadded{
    "padded",
    {3, 2, 5, 2, 3, 4, 3, 3, 17, 16},
    {"LC W | W", "CR W | W", "LC | LC R", "CR | L CR", "| L C R", "panel 1 1 3 CR W | W", "few 1 3 1 2 | L C R"},
    {0, 3, 3, 20}, 23, 11, mpoe::Activation::kRelu, 1};
const Case kSeparable{
    "separable", {8, 1, 16, 8, 8, 16, 1, 8, 64, 64}, {"| L C R"}, {0, 5, 21}, 24, 0, mpoe::Activation::kSilu, 0};
const Case* const kCases[] = {&kWide, &kNotAligned, &kPadded, &kSeparable};

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
  Array grad = array(c.slots * d.out_features, 1);
  p.x = x.values();
  p.left = left.values();
  p.central = central.values();
  p.right = right.values();
  p.bias = bias.values();
  p.grad = grad.values();
  const truth::Result truth = truth::solve(p, 0.1);
  for (int64_t i = 0; i < grad.count(); ++i) grad.set(i, p.grad[i]);

  const std::vector<int> offsets(c.offsets.begin(), c.offsets.end());
  LinearInputs in;
  in.dtype = kDtype;
  const int64_t sizes[] = {d.iL, d.jL, d.a, d.iC, d.jC, d.b, d.iR, d.jR};
  for (int axis = 0; axis < kAxes; ++axis) in.dims.size[axis] = static_cast<int>(sizes[axis]);
  in.dims.in_features = static_cast<int>(d.in_features);
  in.dims.out_features = static_cast<int>(d.out_features);
  in.x = x.data();
  in.left = left.data();
  in.central = central.data();
  in.right = right.data();
  in.experts = static_cast<int>(p.experts);
  in.offsets = offsets.data();
  in.row_index = c.tokens ? p.row_index.data() : nullptr;
  in.slots = static_cast<int>(c.slots);
  in.activation = static_cast<int>(c.activation);
  for (const char* program : c.programs) {
    const std::string what = std::string(c.name) + ", " + program;
    in.program = program;
    const auto result = [&](int64_t count) { return Array(kDtype, count, c.shift); };
    const Array y = result(c.slots * d.out_features), z = result(c.slots * d.out_features);
    LinearForward forward;
    static_cast<LinearInputs&>(forward) = in;
    forward.bias = bias.data();
    forward.y = y.data();
    forward.saved = z.data();
    const Array scratch(kDtype, static_cast<int64_t>(workspace_bytes(forward) / 2));
    linear_forward(forward, scratch.data(), nullptr);
    check::require_close(y, truth.y, check::tolerance(kDtype), what + ": y");
    if (std::string(program).starts_with("few")) continue;  // has no backward

    const Array dx = result(c.slots * d.in_features), dleft = result(left.count()), dcentral = result(central.count()),
                dright = result(right.count()), dbias = result(d.out_features);
    LinearBackward backward;
    static_cast<LinearInputs&>(backward) = in;
    backward.grad = grad.data();
    backward.saved = c.activation == mpoe::Activation::kRelu ? y.data() : z.data();
    backward.dx = dx.data();
    backward.dleft = dleft.data();
    backward.dcentral = dcentral.data();
    backward.dright = dright.data();
    backward.dbias = dbias.data();
    const Array more(kDtype, static_cast<int64_t>(workspace_bytes(backward) / 2));
    linear_backward(backward, more.data(), nullptr);
    std::vector<double> by_token(truth.dx.size());
    for (int64_t s = 0; s < c.slots; ++s) {
      const int64_t row = c.tokens ? p.row_index[s] : s;
      for (int64_t i = 0; i < d.in_features; ++i) by_token[row * d.in_features + i] += dx.get(s * d.in_features + i);
    }
    const double allowed = 2 * check::tolerance(kDtype);
    check::require(check::relative_error(by_token, truth.dx) <= allowed, what + ": dx");
    check::require_close(dleft, truth.dleft, allowed, what + ": dleft");
    check::require_close(dcentral, truth.dcentral, allowed, what + ": dcentral");
    check::require_close(dright, truth.dright, allowed, what + ": dright");
    check::require_close(dbias, truth.dbias, allowed, what + ": dbias");
  }
}

}  // namespace
}  // namespace mpoe::cuda

int main(int count, char** words) {
  return emu::sweep(count, words, [] {
    for (const auto* c : mpoe::cuda::kCases) mpoe::cuda::run(*c);
  });
}
