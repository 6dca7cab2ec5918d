// The grouped MPO linear layer under sanitizers: every strategy, forward and backward, against
// double precision. Arrays end where their allocation ends, most start at odd addresses, and
// results are NaN before they are written.
#include <functional>

#include "check.h"
#include "cpu/linear/linear.h"
#include "truth.h"

namespace mpoe {

namespace {

using check::Array;
using truth::Problem;
using truth::Result;

struct Strategy {
  const char* name;
  void (*forward)(const LinearForward&);
  void (*backward)(const LinearBackward&);
  bool separable_only;
};

const Strategy kStrategies[] = {
    {"separable", separable_forward, separable_backward, true},
    {"rebuild", rebuild_forward, rebuild_backward, false},
    {"half_left", half_left_forward, half_left_backward, false},
    {"chain", chain_forward, chain_backward, false},
};

struct Shape {
  const char* name;
  BlockDims dims;
};

// iL, jL, a, iC, jC, b, iR, jR, in_features, out_features
const Shape kShapes[] = {
    {"ones", {1, 1, 1, 1, 1, 1, 1, 1, 1, 1}},
    {"small", {2, 2, 3, 3, 2, 5, 2, 3, 12, 12}},
    {"padded", {3, 2, 5, 2, 3, 4, 3, 3, 17, 16}},
    {"wide", {5, 3, 21, 3, 5, 18, 5, 7, 74, 103}},
    {"separable", {9, 1, 9, 4, 3, 35, 1, 37, 36, 111}},
    {"separable padded", {19, 1, 7, 3, 2, 5, 1, 40, 55, 78}},
    {"no left", {1, 1, 1, 7, 9, 6, 3, 4, 21, 36}},
    {"no right", {4, 3, 10, 7, 11, 1, 1, 1, 27, 32}},
    {"segments", {2, 2, 4, 5, 4, 8, 2, 3, 20, 24}},
};

struct Load {
  const char* name;
  std::vector<std::int64_t> offsets;
  std::int64_t slots;
  bool gathered;
};

const Load kLoads[] = {
    {"nothing", {0, 0, 0}, 0, false},
    {"nobody", {0, 0, 0}, 5, true},
    {"idle and dropped", {0, 3, 3, 4, 33}, 38, true},
    {"one expert", {0, 0, 45}, 45, false},
    {"one slot", {0, 0, 1}, 1, false},
    {"few slots", {0, 2, 2, 3}, 4, true},
    {"many slots", {0, 40, 66}, 67, true},
};
const Load kTiles{
    "tiles of all heights", {0, 1, 3, 6, 10, 15, 21, 28, 36, 45, 55, 66, 78, 91, 105}, 105, true};

// Results: y, then the gradients of x, left, central, right and bias, of which `need` says which.
void run(const Strategy& strategy,
         const Problem& p,
         const truth::Operands& in,
         bool save,
         const bool (&need)[5],
         std::int64_t shift,
         std::vector<Array>& results) {
  const BlockDims& d = p.dims;
  const Dtype dtype = in.x.dtype();
  LinearInputs inputs{
      .dtype = dtype,
      .dims = d,
      .order = p.order,
      .x = in.x.data(),
      .tokens = p.tokens,
      .left = in.left.data(),
      .central = in.central.data(),
      .right = in.right.data(),
      .experts = p.experts,
      .offsets = p.offsets.data(),
      .row_index = p.row_index.empty() ? nullptr : p.row_index.data(),
      .slots = p.slots,
      .activation = p.activation,
  };
  const bool save_z =
      save && p.activation != Activation::kNone && p.activation != Activation::kRelu;
  const bool save_h = save && strategy.separable_only;
  const Array h(dtype, save_h ? p.slots * d.jC * d.b : 0, shift);
  const Array saved(dtype, save_z ? p.slots * d.out_features : 0, shift);
  LinearForward forward{};
  static_cast<LinearInputs&>(forward) = inputs;
  forward.bias = in.bias.count() > 0 ? in.bias.data() : nullptr;
  forward.y = results[0].data();
  forward.h = save_h ? h.data() : nullptr;
  forward.saved = save_z ? saved.data() : nullptr;
  strategy.forward(forward);
  if (!save)
    return;

  const auto place = [&](int k) {
    return need[k] ? results[k + 1].data() : nullptr;
  };
  LinearBackward backward{};
  static_cast<LinearInputs&>(backward) = inputs;
  backward.grad = in.grad.data();
  backward.h = save_h ? h.data() : nullptr;
  backward.saved = p.activation == Activation::kRelu ? results[0].data()
                   : save_z                          ? saved.data()
                                                     : nullptr;
  backward.dx = place(0);
  backward.dleft = place(1);
  backward.dcentral = place(2);
  backward.dright = place(3);
  backward.dbias = place(4);
  strategy.backward(backward);
}

// All orders, by number.
ProductOrder order_of(int number) {
  constexpr Operand L = Operand::kLeft, C = Operand::kCentral, R = Operand::kRight;
  constexpr std::array<Operand, 3> kChains[] = {
      {L, C, R}, {L, R, C}, {C, L, R}, {C, R, L}, {R, L, C}, {R, C, L}};
  return {kChains[number % 6], (number & 1) != 0, (number & 2) != 0};
}

void check_case(
    const Shape& shape, const Load& load, Activation activation, Dtype dtype, int number) {
  check::Random random(static_cast<std::uint64_t>(number) + 1);
  const BlockDims& d = shape.dims;
  const std::int64_t shift = number % 3;
  Problem p{};
  p.dims = d;
  p.order = order_of(number / 2);  // numbers of one dtype
  p.offsets = load.offsets;
  p.experts = static_cast<std::int64_t>(load.offsets.size()) - 1;
  p.slots = load.slots;
  p.tokens = load.gathered ? 11 : load.slots;
  p.activation = activation;
  truth::Operands m =
      truth::random_operands(p, dtype, load.gathered, number % 2 == 0, shift, random);
  const Result truth = truth::solve(p, 0.1);
  for (std::int64_t i = 0; i < m.grad.count(); ++i)
    m.grad.set(i, p.grad[i]);

  const std::vector<double>* const truths[] = {
      &truth.y, &truth.dx, &truth.dleft, &truth.dcentral, &truth.dright, &truth.dbias};
  const std::vector<check::Output> outputs{{"y", dtype, m.grad.count(), shift},
                                           {"dx", dtype, m.x.count(), shift},
                                           {"dleft", dtype, m.left.count(), shift},
                                           {"dcentral", dtype, m.central.count(), shift},
                                           {"dright", dtype, m.right.count(), shift},
                                           {"dbias", dtype, d.out_features, shift}};
  for (const Strategy& strategy : kStrategies) {
    if (strategy.separable_only && (d.jL != 1 || d.iR != 1))
      continue;
    const std::string what = std::string(strategy.name) + ", " + shape.name + ", " + load.name +
                             ", " + check::name_of(dtype) + ", activation " +
                             std::to_string(static_cast<int>(activation));
    const bool all[5] = {true, true, true, true, true},
               few[5] = {number % 2 == 1, true, false, number % 3 == 0, false};
    check::compare(what, outputs, [&](std::vector<Array>& results) {
      run(strategy, p, m, true, all, shift, results);
      for (int k = 0; k < 6; ++k)
        check::require_close(
            results[k], *truths[k], check::tolerance(dtype), what + ": " + outputs[k].name);
      // Nothing saved, fewer gradients: the same bits.
      std::vector<Array> again = check::arrays(outputs);
      run(strategy, p, m, true, few, shift, again);
      for (int k = 0; k < 5; ++k)
        check::require(!few[k] || again[k + 1].same_bits(results[k + 1]), what + ": few gradients");
      run(strategy, p, m, false, all, shift, again);
      check::require(again[0].same_bits(results[0]), what + ": nothing saved");
    });
  }
}

}  // namespace
}  // namespace mpoe

int main() {
  using namespace mpoe;
  if (!check::isa_exists())
    return 77;
  int number = 0;
  for (const Shape& shape : kShapes)
    for (const Load& load : kLoads)
      for (const Dtype dtype : {Dtype::kFloat32, Dtype::kBFloat16})
        check_case(shape, load, static_cast<Activation>(number % 5), dtype, number), ++number;
  for (const Shape& shape : kShapes)
    for (const Dtype dtype : {Dtype::kFloat32, Dtype::kBFloat16})
      check_case(shape, kTiles, static_cast<Activation>(number % 5), dtype, number), ++number;
  return check::finish("linear");
}
