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
using truth::Values;

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

// Arrays of one call. Every run allocates new results.
struct Memory {
  Array x, left, central, right, bias, grad;
  Array y, h, saved, dx, dleft, dcentral, dright, dbias;
};

void run(const Strategy& strategy,
         const Problem& p,
         Dtype dtype,
         Memory& m,
         bool with_bias,
         bool save,
         const bool (&need)[5],
         std::int64_t shift) {
  const BlockDims& d = p.dims;
  const auto empty = [&](std::int64_t count) {
    return Array(dtype, count, shift);
  };
  LinearInputs inputs{
      .dtype = dtype,
      .dims = d,
      .order = p.order,
      .x = m.x.data(),
      .tokens = p.tokens,
      .left = m.left.data(),
      .central = m.central.data(),
      .right = m.right.data(),
      .experts = p.experts,
      .offsets = p.offsets.data(),
      .row_index = p.row_index.empty() ? nullptr : p.row_index.data(),
      .slots = p.slots,
      .activation = p.activation,
  };
  const bool save_z =
      save && p.activation != Activation::kNone && p.activation != Activation::kRelu;
  const bool save_h = save && strategy.separable_only;
  m.y = empty(p.slots * d.out_features);
  m.h = empty(save_h ? p.slots * d.jC * d.b : 0);
  m.saved = empty(save_z ? p.slots * d.out_features : 0);
  LinearForward forward{};
  static_cast<LinearInputs&>(forward) = inputs;
  forward.bias = with_bias ? m.bias.data() : nullptr;
  forward.y = m.y.data();
  forward.h = save_h ? m.h.data() : nullptr;
  forward.saved = save_z ? m.saved.data() : nullptr;
  strategy.forward(forward);
  if (!save)
    return;

  const std::int64_t counts[5] = {
      m.x.count(), m.left.count(), m.central.count(), m.right.count(), d.out_features};
  Array* const results[5] = {&m.dx, &m.dleft, &m.dcentral, &m.dright, &m.dbias};
  void* places[5];
  for (int k = 0; k < 5; ++k) {
    *results[k] = empty(need[k] ? counts[k] : 0);
    places[k] = need[k] ? results[k]->data() : nullptr;
  }
  LinearBackward backward{};
  static_cast<LinearInputs&>(backward) = inputs;
  backward.grad = m.grad.data();
  backward.h = save_h ? m.h.data() : nullptr;
  backward.saved = p.activation == Activation::kRelu ? m.y.data()
                   : save_z                          ? m.saved.data()
                                                     : nullptr;
  backward.dx = places[0];
  backward.dleft = places[1];
  backward.dcentral = places[2];
  backward.dright = places[3];
  backward.dbias = places[4];
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
  const std::int64_t experts = static_cast<std::int64_t>(load.offsets.size()) - 1,
                     shift = number % 3;
  Problem p{};
  p.dims = d;
  p.order = order_of(number / 2);  // numbers of one dtype
  p.offsets = load.offsets;
  p.experts = experts;
  p.slots = load.slots;
  p.tokens = load.gathered ? 11 : load.slots;
  p.activation = activation;
  if (load.gathered)
    for (std::int64_t s = 0; s < load.slots; ++s)
      p.row_index.push_back(random.below(p.tokens));

  const auto array = [&](std::int64_t count, double scale) {
    return Array::random(dtype, count, random, scale, shift);
  };
  const bool with_bias = number % 2 == 0;
  Memory m;
  m.x = array(p.tokens * d.in_features, 1);
  m.left = array(experts * d.iL * d.jL * d.a, std::sqrt(3.0 / static_cast<double>(d.iL)));
  m.central = array(d.a * d.iC * d.jC * d.b, std::sqrt(3.0 / static_cast<double>(d.a * d.iC)));
  m.right = array(experts * d.b * d.iR * d.jR, std::sqrt(3.0 / static_cast<double>(d.b * d.iR)));
  m.bias = array(with_bias ? d.out_features : 0, 1);
  p.x = m.x.values();
  p.left = m.left.values();
  p.central = m.central.values();
  p.right = m.right.values();
  p.bias = m.bias.values();
  m.grad = array(load.slots * d.out_features, 1);
  p.grad = m.grad.values();
  const Result truth = truth::solve(p, 0.1);
  for (std::int64_t i = 0; i < m.grad.count(); ++i)
    m.grad.set(i, p.grad[i]);

  for (const Strategy& strategy : kStrategies) {
    if (strategy.separable_only && (d.jL != 1 || d.iR != 1))
      continue;
    const std::string what = std::string(strategy.name) + ", " + shape.name + ", " + load.name +
                             ", " + check::name_of(dtype) + ", activation " +
                             std::to_string(static_cast<int>(activation));
    const double allowed = check::tolerance(dtype);
    const bool all[5] = {true, true, true, true, true},
               few[5] = {number % 2 == 1, true, false, number % 3 == 0, false};
    const auto same = [&](const Array& a, const Array& b) {
      check::require(a.same_bits(b), what + ": other bits");
    };

    set_threads(1);
    run(strategy, p, dtype, m, with_bias, true, all, shift);
    check::require_close(m.y, truth.y, allowed, what + ": y");
    Array y = std::move(m.y), dx = std::move(m.dx), dleft = std::move(m.dleft),
          dcentral = std::move(m.dcentral), dright = std::move(m.dright),
          dbias = std::move(m.dbias);
    check::require_close(dx, truth.dx, allowed, what + ": dx");
    check::require_close(dleft, truth.dleft, allowed, what + ": dleft");
    check::require_close(dcentral, truth.dcentral, allowed, what + ": dcentral");
    check::require_close(dright, truth.dright, allowed, what + ": dright");
    check::require_close(dbias, truth.dbias, allowed, what + ": dbias");
    // More threads, nothing saved, fewer gradients: the same bits.
    set_threads(3);
    run(strategy, p, dtype, m, with_bias, true, all, shift);
    same(m.y, y);
    for (const auto& [a, b] : {std::pair(&m.dx, &dx),
                               {&m.dleft, &dleft},
                               {&m.dcentral, &dcentral},
                               {&m.dright, &dright},
                               {&m.dbias, &dbias}})
      same(*a, *b);
    run(strategy, p, dtype, m, with_bias, true, few, shift);
    same(m.dleft, dleft);
    if (few[0])
      same(m.dx, dx);
    if (few[3])
      same(m.dright, dright);
    run(strategy, p, dtype, m, with_bias, false, all, shift);
    same(m.y, y);
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
