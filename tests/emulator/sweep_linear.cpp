// Every order of the grouped product in bfloat16, forward and backward. See sweep.h.
#include "emulator/sweep.h"

#include <array>
#include <map>
#include <string>
#include <vector>

#include "cuda/linear/contract.h"
#include "cuda/linear/panel.h"
#include "cuda/linear/panel_launch.cuh"
#include "cuda/linear/pointwise.h"
#include "cuda/linear/steps.h"
#include "native/cpp/truth.h"

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
constexpr float kBefore = 1.f;  // what the central gradient is added to

// What is built from blocks, and what rows are multiplied by; or the panel kernel.
struct Way {
  std::string name;
  std::vector<std::array<std::string, 3>> merges;  // result, first, second
  std::vector<std::string> order;
  std::vector<int> panel;
};
const std::array<std::string, 3> kLC{"LC", "L", "C"}, kCR{"CR", "C", "R"}, kFromLC{"W", "LC", "R"}, kFromCR{"W", "L", "CR"};
const Way kRebuildLC{"rebuild from LC", {kLC, kFromLC}, {"W"}, {}}, kRebuildCR{"rebuild from CR", {kCR, kFromCR}, {"W"}, {}},
    kHalfLeft{"half left", {kLC}, {"LC", "R"}, {}}, kHalfRight{"half right", {kCR}, {"L", "CR"}, {}},
    kChain{"chain", {}, {"L", "C", "R"}, {}};
// The panel kernel computes y and dx; the gradients of blocks are computed step by step.
Way in_panels(const Way& rebuild, std::vector<int> panel) {
  Way way = rebuild;
  way.name = "panels, " + way.name;
  way.panel = std::move(panel);
  return way;
}

struct Case {
  const char* name;
  mpoe::BlockDims dims;  // iL, jL, a, iC, jC, b, iR, jR, in_features, out_features
  std::vector<Way> ways;
  std::vector<int64_t> offsets;
  int64_t slots, tokens;  // tokens 0: no gather
  mpoe::Activation activation;
  int64_t shift;  // elements by which arrays miss 64-byte alignment
};

// Asynchronous copies, several tiles in rows and columns, several steps of the pipeline.
const Case kWide{
    "wide",
    {8, 4, 32, 2, 3, 24, 8, 8, 128, 96},
    {kRebuildLC, kRebuildCR, kHalfLeft, kHalfRight, in_panels(kRebuildLC, {2, 1, 4})},
    {0, 66, 66, 71}, 74, 40, mpoe::Activation::kGelu, 0};
const Case kNotAligned{
    "wide but not aligned", {8, 2, 16, 2, 3, 16, 8, 8, 128, 48}, {kRebuildLC}, {0, 9, 20}, 20, 0,
    mpoe::Activation::kNone, 3};
const Case kPadded{
    "padded",
    {3, 2, 5, 2, 3, 4, 3, 3, 17, 16},
    {kRebuildLC, kRebuildCR, kHalfLeft, kHalfRight, kChain, in_panels(kRebuildCR, {1, 1, 3})},
    {0, 3, 3, 20}, 23, 11, mpoe::Activation::kRelu, 1};
const Case kSeparable{
    "separable", {8, 1, 16, 8, 8, 16, 1, 8, 64, 64}, {kChain}, {0, 5, 21}, 24, 0, mpoe::Activation::kSilu, 0};
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
  const int64_t* row_index = c.tokens ? p.row_index.data() : nullptr;
  Context context;
  context.dtype = kDtype;
  const int64_t sizes[] = {d.iL, d.jL, d.a, d.iC, d.jC, d.b, d.iR, d.jR};
  for (int axis = 0; axis < kAxes; ++axis) context.dims.size[axis] = static_cast<int>(sizes[axis]);
  context.dims.in_features = static_cast<int>(d.in_features);
  context.dims.out_features = static_cast<int>(d.out_features);
  context.offsets = offsets.data();
  context.experts = static_cast<int>(p.experts);
  context.slots = static_cast<int>(c.slots);
  const Dims& dims = context.dims;
  const auto result = [&](int64_t count) { return Array(kDtype, count, c.shift); };
  const auto block = [&](const std::string& name, const Array& data) {
    return named(data.data(), layout_of(name), dims, name == "C" ? 0 : dims.elements(layout_of(name)));
  };
  const auto x_rows = [&](const Array& data) { return rows_of(data.data(), {kIL, kIC, kIR}, dims, dims.in_features); };
  const auto y_rows = [&](const Array& data) { return rows_of(data.data(), {kJL, kJC, kJR}, dims, dims.out_features); };

  for (const Way& way : c.ways) {
    const std::string what = std::string(c.name) + ", " + way.name;
    const Array y = result(c.slots * d.out_features), z = result(c.slots * d.out_features);
    const Epilogue epilogue{bias.data(), static_cast<int>(c.activation), z.data()};
    const auto panels = [&](const Array& from, const Array& to, bool transposed) {
      PanelProduct product;
      product.dtype = kDtype;
      product.dims = dims;
      product.transposed = transposed;
      product.shape = {way.panel[0], way.panel[1], way.panel[2], way.merges.front() == kLC};
      product.rows = from.data();
      product.left = left.data();
      product.central = central.data();
      product.right = right.data();
      product.experts = context.experts;
      product.offsets = offsets.data();
      product.row_index = transposed ? nullptr : row_index;
      product.slots = context.slots;
      product.out = to.data();
      if (!transposed) product.epilogue = epilogue;
      panel_product(product, nullptr);
    };

    // Memory of what is built, and of rows between two operands.
    std::vector<Array> kept;
    kept.reserve(64);
    const auto scratch = [&](int64_t count) -> const Array& { return kept.emplace_back(kDtype, count); };
    const auto built = [&](const std::string& name) {
      return block(name, scratch(p.experts * dims.elements(layout_of(name))));
    };
    const auto rows_after = [&](const Named& rows, const Named& operand) {
      Axes axes;
      for (const Axis axis : rows.axes()) if (!operand.has(axis)) axes.push_back(axis);
      for (const Axis axis : operand.axes()) if (!rows.has(axis)) axes.push_back(axis);
      const int64_t size = dims.elements(axes);
      return named(scratch(size * c.slots).data(), axes, dims, size);
    };
    std::map<std::string, Named> values{{"L", block("L", left)}, {"C", block("C", central)}, {"R", block("R", right)}};
    const auto merge = [&](const Named& one, const Named& other, const Named& out) {
      const bool first = one.has(out.axes().front());
      merge_blocks(context, first ? one : other, first ? other : one, out);
    };
    for (const auto& [name, first, second] : way.merges) {
      values[name] = built(name);
      merge(values.at(first), values.at(second), values.at(name));
    }
    std::vector<Named> rows{x_rows(x)};
    for (std::size_t k = 0; k < way.order.size(); ++k) {
      const bool last = k + 1 == way.order.size();
      rows.push_back(last ? y_rows(y) : rows_after(rows[k], values.at(way.order[k])));
      if (last && !way.panel.empty()) {
        panels(x, y, false);
      } else {
        rows_times_block(context, rows[k], values.at(way.order[k]), rows[k + 1], k == 0 ? row_index : nullptr, last,
                         last ? epilogue : Epilogue{});
      }
    }
    check::require_close(y, truth.y, check::tolerance(kDtype), what + ": y");

    const Array dx = result(c.slots * d.in_features), dleft = result(left.count()), dright = result(right.count()),
                dbias = result(d.out_features), dz = result(c.slots * d.out_features);
    std::vector<float> dcentral(static_cast<std::size_t>(central.count()), kBefore);
    std::vector<float> sums(static_cast<std::size_t>(partial_elements(context.slots, dims.out_features)));
    const Array& saved = c.activation == mpoe::Activation::kRelu ? y : z;
    const bool through = c.activation != mpoe::Activation::kNone;
    activation_backward(kDtype, grad.data(), saved.data(), through ? dz.data() : nullptr, dbias.data(), sums.data(),
                        offsets.data() + p.experts, context.slots, dims.out_features, static_cast<int>(c.activation),
                        nullptr);
    const Array& from = through ? dz : grad;
    std::map<std::string, Named> gradients{{"L", block("L", dleft)}, {"R", block("R", dright)}};
    gradients["C"] = named(dcentral.data(), layout_of("C"), dims, 0);
    Named after = y_rows(from);
    for (std::size_t k = way.order.size(); k-- > 0;) {
      const std::string& name = way.order[k];
      const Named before = k == 0 ? x_rows(dx) : rows_after(after, values.at(name));
      if (k == 0 && !way.panel.empty()) {
        panels(from, dx, true);
      } else {
        rows_times_block(context, after, values.at(name), before, nullptr, k == 0);
      }
      if (!gradients.count(name)) gradients[name] = built(name);
      block_gradient(context, rows[k], after, gradients.at(name), k == 0 ? row_index : nullptr);
      after = before;
    }
    for (auto step = way.merges.rbegin(); step != way.merges.rend(); ++step) {
      const auto& [name, first, second] = *step;
      for (const auto& [wanted, other] : {std::pair{first, second}, std::pair{second, first}}) {
        if (!gradients.count(wanted)) gradients[wanted] = built(wanted);
        merge(gradients.at(name), values.at(other), gradients.at(wanted));
      }
    }

    for (float& value : dcentral) value -= kBefore;
    std::vector<double> by_token(truth.dx.size());
    for (int64_t s = 0; s < c.slots; ++s) {
      const int64_t row = c.tokens ? p.row_index[s] : s;
      for (int64_t i = 0; i < d.in_features; ++i) by_token[row * d.in_features + i] += dx.get(s * d.in_features + i);
    }
    const double allowed = 2 * check::tolerance(kDtype);
    check::require(check::relative_error(by_token, truth.dx) <= allowed, what + ": dx");
    check::require_close(dleft, truth.dleft, allowed, what + ": dleft");
    check::require(check::relative_error({dcentral.begin(), dcentral.end()}, truth.dcentral) <= allowed, what + ": dcentral");
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
