// Routing under sanitizers: sort, dispatch, combine and its gradients against loops, with 1 and 3 threads.
#include "check.h"
#include "cpu/routing/routing.h"
#include "sorted.h"

namespace mpoe {
namespace {

using check::Array;
using check::Index;
using check::require;
using check::Sorted;

struct Case {
  std::int64_t tokens, top_k, experts, capacity;
  bool masked, all_to_one;
};

const Case kCases[] = {
    {0, 1, 3, -1, false, false}, {1, 1, 1, -1, false, false},     {17, 2, 4, -1, true, false},
    {23, 3, 5, 6, true, false},  {19, 1, 6, 1, false, true},      {40'000, 1, 5, -1, true, false},
    {9'000, 2, 3, 5'000, false, false}, {20'000, 2, 2, 7'000, true, true},
};

void check_rows(const Case& c, const Sorted& sorted, Dtype dtype, std::int64_t features, check::Random& random) {
  const std::string what = std::string(check::name_of(dtype)) + " rows of " + std::to_string(features);
  const std::int64_t slots = c.tokens * c.top_k, shift = features % 3, apart = features + 3;
  const Dtype gate_dtype = dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32;
  // The last row of x ends where its memory ends.
  const Array x = Array::random(dtype, c.tokens == 0 ? 0 : (c.tokens - 1) * apart + features, random, 1, shift);
  const Array rows = Array::random(dtype, slots * features, random, 1, shift);
  const Array grad = Array::random(dtype, c.tokens * features, random, 1, shift);
  const Array gates = Array::random(gate_dtype, slots, random);
  const std::int64_t filled = sorted.offsets.back(), width = features * size_of(dtype);

  std::vector<double> dispatched(slots * features), mixed(c.tokens * features), drows(slots * features), dgates(slots);
  for (std::int64_t s = 0; s < filled; ++s)
    for (std::int64_t f = 0; f < features; ++f)
      dispatched[s * features + f] = x.get(sorted.token_of_slot[s] * apart + f);
  for (std::int64_t p = 0; p < slots; ++p) {
    const std::int64_t s = sorted.slot_of_token[p], t = p / c.top_k;
    for (std::int64_t f = 0; s >= 0 && f < features; ++f) {
      mixed[t * features + f] += gates.get(p) * rows.get(s * features + f);
      drows[s * features + f] = gates.get(p) * grad.get(t * features + f);
      dgates[p] += rows.get(s * features + f) * grad.get(t * features + f);
    }
  }
  const Combine arguments{
      .dtype = dtype, .tokens = c.tokens, .top_k = c.top_k, .slots = slots, .features = features,
      .slot_of_token = sorted.slot_of_token.data(), .gates = gates.data()};
  std::vector<Array> before;
  for (const int threads : {1, 3}) {
    set_threads(threads);
    std::vector<Array> found;
    found.emplace_back(dtype, slots * features, shift);
    dispatch({.x = x.data(), .x_stride = apart * size_of(dtype), .width = width,
              .token_of_slot = sorted.token_of_slot.data(), .slots = slots, .filled = filled, .out = found[0].data()});
    found.emplace_back(dtype, c.tokens * features, shift);
    combine(arguments, rows.data(), found[1].data());
    found.emplace_back(dtype, slots * features, shift);
    found.emplace_back(gate_dtype, slots, shift);
    combine_backward(arguments, grad.data(), rows.data(), found[2].data(), found[3].data());
    Combine ungated = arguments;
    ungated.gates = nullptr;
    found.emplace_back(dtype, c.tokens * features, shift);
    combine(ungated, rows.data(), found[4].data());
    if (threads == 1) {
      const double allowed = check::tolerance(dtype);
      check::require_close(found[0], dispatched, 0, what + ": dispatch");
      check::require_close(found[1], mixed, allowed, what + ": combine");
      check::require_close(found[2], drows, allowed, what + ": drows");
      check::require_close(found[3], dgates, allowed, what + ": dgates");
      before = std::move(found);
      continue;
    }
    for (std::size_t k = 0; k < found.size(); ++k) require(found[k].same_bits(before[k]), what + ": other bits");
  }
}

void check_case(const Case& c, int number) {
  check::Random random(static_cast<std::uint64_t>(number) + 1);
  const std::int64_t pairs = c.tokens * c.top_k;
  Index index(pairs);
  for (std::int64_t& e : index) e = c.all_to_one ? c.experts - 1 : random.below(c.experts);
  std::vector<char> kept(c.tokens);  // as bool
  for (char& keep : kept) keep = random.below(4) != 0;
  const bool* mask = c.masked ? reinterpret_cast<const bool*>(kept.data()) : nullptr;
  require(first_outside(index.data(), pairs, 0, c.experts - 1) == -1, "first_outside finds nothing");
  if (pairs > 0) require(first_outside(index.data(), pairs, 0, -1) == 0, "first_outside finds the first");
  const Sorted expected = check::sort_by_loops(c.tokens, c.top_k, c.experts, c.capacity, index, mask);
  for (const int threads : {1, 3}) {
    set_threads(threads);
    Sorted sorted{std::vector<std::int32_t>(c.experts + 1, -7), Index(pairs, -7), Index(pairs, -7)};
    route({.index = index.data(), .tokens = c.tokens, .top_k = c.top_k, .experts = c.experts, .capacity = c.capacity,
           .token_mask = mask, .expert_offsets = sorted.offsets.data(), .token_of_slot = sorted.token_of_slot.data(),
           .slot_of_token = sorted.slot_of_token.data()});
    require(sorted == expected, "route of case " + std::to_string(number));
  }
  for (const Dtype dtype : {Dtype::kFloat32, Dtype::kFloat64, Dtype::kBFloat16, Dtype::kFloat16})
    for (const std::int64_t features : {1, 7, 33, 100})
      if (c.tokens < 1000 || features == 33) check_rows(c, expected, dtype, features, random);
}

}  // namespace
}  // namespace mpoe

int main() {
  if (!mpoe::check::isa_exists()) return 77;
  int number = 0;
  for (const auto& c : mpoe::kCases) mpoe::check_case(c, number++);
  return mpoe::check::finish("routing");
}
