// Routing and the router under sanitizers, against loops, with 1 and 3 threads: logits, choices and
// gates; sort, dispatch, combine and its gradients.
#include <cmath>

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

  std::vector<double> dispatched(slots * features), drows(slots * features), dgates(slots);
  std::vector<double> mixed(c.tokens * features), summed(c.tokens * features);
  for (std::int64_t s = 0; s < filled; ++s)
    for (std::int64_t f = 0; f < features; ++f)
      dispatched[s * features + f] = x.get(sorted.token_of_slot[s] * apart + f);
  for (std::int64_t p = 0; p < slots; ++p) {
    const std::int64_t s = sorted.slot_of_token[p], t = p / c.top_k;
    for (std::int64_t f = 0; s >= 0 && f < features; ++f) {
      mixed[t * features + f] += gates.get(p) * rows.get(s * features + f);
      summed[t * features + f] += rows.get(s * features + f);
      drows[s * features + f] = gates.get(p) * grad.get(t * features + f);
      dgates[p] += rows.get(s * features + f) * grad.get(t * features + f);
    }
  }
  const Combine arguments{.dtype = dtype,
                          .tokens = c.tokens,
                          .top_k = c.top_k,
                          .slots = slots,
                          .features = features,
                          .slot_of_token = sorted.slot_of_token.data(),
                          .gates = gates.data()};
  const double allowed = check::tolerance(dtype);
  const std::vector<check::Wanted> wanted{{"dispatch", dtype, dispatched, 0, shift},
                                          {"combine", dtype, mixed, allowed, shift},
                                          {"drows", dtype, drows, allowed, shift},
                                          {"dgates", gate_dtype, dgates, allowed, shift},
                                          {"combine without gates", dtype, summed, allowed, shift}};
  check::compare(what, wanted, [&](std::vector<Array>& found) {
    dispatch({.x = x.data(),
              .x_stride = apart * size_of(dtype),
              .width = width,
              .token_of_slot = sorted.token_of_slot.data(),
              .slots = slots,
              .filled = filled,
              .out = found[0].data()});
    combine(arguments, rows.data(), found[1].data());
    combine_backward(arguments, grad.data(), rows.data(), found[2].data(), found[3].data());
    Combine ungated = arguments;
    ungated.gates = nullptr;
    combine(ungated, rows.data(), found[4].data());
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

// Logits, choices and gates against loops in double precision; among equal logits the first expert
// comes first.
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
      std::vector<Array> before;
      for (const int threads : {1, 3}) {
        set_threads(threads);
        Array logits(Dtype::kFloat32, tokens * experts), gates(Dtype::kFloat32, tokens * top_k);
        Index index(tokens * top_k, -7);
        gating({.router = router_of(x, weight, tokens, features, experts),
                .top_k = top_k,
                .raw = raw,
                .logits = static_cast<float*>(logits.data()),
                .index = index.data(),
                .gates = static_cast<float*>(gates.data())});
        Index chosen_alone(tokens * top_k, -7);
        best_experts(
            static_cast<const float*>(logits.data()), tokens, experts, top_k, chosen_alone.data());
        std::vector<double> products(tokens * experts), shares(tokens * top_k);
        for (std::int64_t t = 0; t < tokens; ++t) {
          double all = 0, chosen = 0;
          std::vector<char> taken(experts);
          for (std::int64_t e = 0; e < experts; ++e) {
            for (std::int64_t i = 0; i < features; ++i)
              products[t * experts + e] += x.get(t * features + i) * weight.get(e * features + i);
            all += std::exp(products[t * experts + e]);
          }
          for (std::int64_t k = 0; k < top_k; ++k) {
            std::int64_t best = -1;
            for (std::int64_t e = 0; e < experts; ++e)
              if (!taken[e] &&
                  (best < 0 || logits.get(t * experts + e) > logits.get(t * experts + best)))
                best = e;
            taken[best] = 1;
            require(index[t * top_k + k] == best, what + ": experts");
            require(chosen_alone[t * top_k + k] == best, what + ": experts of scores");
            chosen += shares[t * top_k + k] = std::exp(products[t * experts + best]);
          }
          for (std::int64_t k = 0; k < top_k; ++k)
            shares[t * top_k + k] /= raw ? all : chosen;
        }
        check::require_close(logits, products, 1e-5, what + ": logits");
        check::require_close(gates, shares, 1e-5, what + ": gates");
        if (threads == 1) {
          before.push_back(std::move(logits));
          before.push_back(std::move(gates));
          continue;
        }
        require(logits.same_bits(before[0]) && gates.same_bits(before[1]), what + ": other bits");
      }
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
