// Routing and the router under sanitizers, with 1 and 3 threads. The sort is that of loops; logits,
// choices and gates, dispatch, combine and its gradients are written whole and have the same bits
// (what they are is tested from Python: tests/kernels/test_routing.py, tests/layers/test_router.py).

#include "check.h"
#include "cpu/router/router.h"
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
    {0, 1, 3, -1, false, false},
    {1, 1, 1, -1, false, false},
    {17, 2, 4, -1, true, false},
    {23, 3, 5, 6, true, false},
    {19, 1, 6, 1, false, true},
    {40'000, 1, 5, -1, true, false},
    {9'000, 2, 3, 5'000, false, false},
    {20'000, 2, 2, 7'000, true, true},
};

void check_rows(const Case& c,
                const Sorted& sorted,
                Dtype dtype,
                std::int64_t features,
                check::Random& random) {
  const std::string what =
      std::string(check::name_of(dtype)) + " rows of " + std::to_string(features);
  const std::int64_t slots = c.tokens * c.top_k, shift = features % 3, apart = features + 3;
  const Dtype gate_dtype = dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32;
  // The last row of x ends where its memory ends.
  const Array x =
      Array::random(dtype, c.tokens == 0 ? 0 : (c.tokens - 1) * apart + features, random, 1, shift);
  const Array rows = Array::random(dtype, slots * features, random, 1, shift);
  const Array grad = Array::random(dtype, c.tokens * features, random, 1, shift);
  const Array gates = Array::random(gate_dtype, slots, random);
  const std::int64_t filled = sorted.offsets.back(), width = features * size_of(dtype);
  const Combine arguments{.dtype = dtype,
                          .tokens = c.tokens,
                          .top_k = c.top_k,
                          .slots = slots,
                          .features = features,
                          .slot_of_token = sorted.slot_of_token.data(),
                          .gates = gates.data()};
  const std::vector<check::Output> outputs{{"dispatch", dtype, rows.count(), shift},
                                           {"combine", dtype, grad.count(), shift},
                                           {"drows", dtype, rows.count(), shift},
                                           {"dgates", gate_dtype, slots, shift},
                                           {"combine without gates", dtype, grad.count(), shift}};
  check::compare(what, outputs, [&](std::vector<Array>& results) {
    dispatch({.x = x.data(),
              .x_stride = apart * size_of(dtype),
              .width = width,
              .token_of_slot = sorted.token_of_slot.data(),
              .slots = slots,
              .filled = filled,
              .out = results[0].data()});
    combine(arguments, rows.data(), results[1].data());
    combine_backward(arguments, grad.data(), rows.data(), results[2].data(), results[3].data());
    Combine ungated = arguments;
    ungated.gates = nullptr;
    combine(ungated, rows.data(), results[4].data());
  });
}

void check_case(const Case& c, int number) {
  check::Random random(static_cast<std::uint64_t>(number) + 1);
  const std::int64_t pairs = c.tokens * c.top_k;
  Index index(pairs);
  for (std::int64_t& e : index)
    e = c.all_to_one ? c.experts - 1 : random.below(c.experts);
  std::vector<char> kept(c.tokens);  // as bool
  for (char& keep : kept)
    keep = random.below(4) != 0;
  const bool* mask = c.masked ? reinterpret_cast<const bool*>(kept.data()) : nullptr;
  require(first_outside(index.data(), pairs, 0, c.experts - 1) == -1,
          "first_outside finds nothing");
  if (pairs > 0)
    require(first_outside(index.data(), pairs, 0, -1) == 0, "first_outside finds the first");
  const Sorted expected =
      check::sort_by_loops(c.tokens, c.top_k, c.experts, c.capacity, index, mask);
  for (const int threads : {1, 3}) {
    set_threads(threads);
    Sorted sorted{std::vector<std::int32_t>(c.experts + 1, -7), Index(pairs, -7), Index(pairs, -7)};
    route({.index = index.data(),
           .tokens = c.tokens,
           .top_k = c.top_k,
           .experts = c.experts,
           .capacity = c.capacity,
           .token_mask = mask,
           .expert_offsets = sorted.offsets.data(),
           .token_of_slot = sorted.token_of_slot.data(),
           .slot_of_token = sorted.slot_of_token.data()});
    require(sorted == expected, "route of case " + std::to_string(number));
  }
  for (const Dtype dtype : {Dtype::kFloat32, Dtype::kFloat64, Dtype::kBFloat16, Dtype::kFloat16})
    for (const std::int64_t features : {1, 7, 33, 100})
      if (c.tokens < 1000 || features == 33)
        check_rows(c, expected, dtype, features, random);
}

Router router_of(const Array& x,
                 const Array& weight,
                 std::int64_t tokens,
                 std::int64_t features,
                 std::int64_t experts) {
  return {.x_dtype = x.dtype(),
          .weight_dtype = weight.dtype(),
          .tokens = tokens,
          .features = features,
          .experts = experts,
          .x = x.data(),
          .weight = weight.data()};
}

// Logits, choices and gates; choices of the same scores alone are the same.
void check_gating(std::int64_t tokens,
                  std::int64_t features,
                  std::int64_t experts,
                  std::int64_t top_k,
                  bool raw) {
  const std::string what =
      "gating of " + std::to_string(tokens) + " tokens among " + std::to_string(experts);
  check::Random random(static_cast<std::uint64_t>(tokens * 100 + experts));
  for (const Dtype x_dtype : {Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16})
    for (const Dtype weight_dtype : {Dtype::kFloat32, Dtype::kBFloat16}) {
      const Array x = Array::random(x_dtype, tokens * features, random);
      const Array weight = Array::random(weight_dtype, experts * features, random);
      const std::vector<check::Output> outputs{{"logits", Dtype::kFloat32, tokens * experts},
                                               {"gates", Dtype::kFloat32, tokens * top_k}};
      check::compare(what, outputs, [&](std::vector<Array>& results) {
        Index index(tokens * top_k, -7), of_scores(tokens * top_k, -7);
        auto* const logits = static_cast<float*>(results[0].data());
        gating({.router = router_of(x, weight, tokens, features, experts),
                .top_k = top_k,
                .raw = raw,
                .logits = logits,
                .index = index.data(),
                .gates = static_cast<float*>(results[1].data())});
        best_experts(logits, tokens, experts, top_k, of_scores.data());
        require(index == of_scores, what + ": experts of scores");
      });
    }
}

}  // namespace
}  // namespace mpoe

int main() {
  if (!mpoe::check::isa_exists())
    return 77;
  int number = 0;
  for (const auto& c : mpoe::kCases)
    mpoe::check_case(c, number++);
  for (const bool raw : {false, true}) {
    mpoe::check_gating(0, 5, 3, 1, raw);
    mpoe::check_gating(1, 1, 1, 1, raw);
    mpoe::check_gating(7, 33, 5, 2, raw);
    mpoe::check_gating(40, 130, 9, 9, raw);
    mpoe::check_gating(3, 700, 64, 8, raw);
    mpoe::check_gating(260, 77, 40, 2, raw);
  }
  return mpoe::check::finish("routing");
}
