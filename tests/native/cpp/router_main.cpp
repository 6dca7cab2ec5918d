// The router under sanitizers: logits, choices and gates against loops, with 1 and 3 threads.
#include <cmath>

#include "check.h"
#include "cpu/router/router.h"
#include "sorted.h"

namespace mpoe {
namespace {

using check::Array;
using check::Index;
using check::require;

Router router_of(
    const Array& x, const Array& weight, std::int64_t tokens, std::int64_t features, std::int64_t experts) {
  return {.x_dtype = x.dtype(), .weight_dtype = weight.dtype(), .tokens = tokens, .features = features,
          .experts = experts, .x = x.data(), .weight = weight.data()};
}

// Logits, choices and gates against loops in double precision; among equal logits the first expert comes first.
void check_gating(std::int64_t tokens, std::int64_t features, std::int64_t experts, std::int64_t top_k, bool raw) {
  const std::string what = "gating of " + std::to_string(tokens) + " tokens among " + std::to_string(experts);
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
        gating({.router = router_of(x, weight, tokens, features, experts), .top_k = top_k, .raw = raw,
                .logits = static_cast<float*>(logits.data()),
                .index = index.data(), .gates = static_cast<float*>(gates.data())});
        Index chosen_alone(tokens * top_k, -7);
        best_experts(static_cast<const float*>(logits.data()), tokens, experts, top_k, chosen_alone.data());
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
              if (!taken[e] && (best < 0 || logits.get(t * experts + e) > logits.get(t * experts + best))) best = e;
            taken[best] = 1;
            require(index[t * top_k + k] == best, what + ": experts");
            require(chosen_alone[t * top_k + k] == best, what + ": experts of scores");
            chosen += shares[t * top_k + k] = std::exp(products[t * experts + best]);
          }
          for (std::int64_t k = 0; k < top_k; ++k) shares[t * top_k + k] /= raw ? all : chosen;
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
  if (!mpoe::check::isa_exists()) return 77;
  for (const bool raw : {false, true}) {
    mpoe::check_gating(0, 5, 3, 1, raw);
    mpoe::check_gating(1, 1, 1, 1, raw);
    mpoe::check_gating(7, 33, 5, 2, raw);
    mpoe::check_gating(40, 130, 9, 9, raw);
    mpoe::check_gating(3, 700, 64, 8, raw);
    mpoe::check_gating(260, 77, 40, 2, raw);
  }
  return mpoe::check::finish("router");
}
