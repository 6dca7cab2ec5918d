// A softmax router on raw pointers: logits, best experts, gates. T tokens of `features` numbers, E
// experts, K choices per token; all arrays dense. Arithmetic is float32, except that products of
// two bfloat16 numbers, which are exact in float32, may be summed by instructions for bfloat16.
// Results do not depend on the number of threads.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace mpoe {

struct Router {
  Dtype x_dtype, weight_dtype;  // any but kFloat64
  int64_t tokens, features, experts;
  const void* x;       // [T, features]
  const void* weight;  // [E, features]
};

// logits [T, E] = x weight^T
void router_logits(const Router& router, float* logits);

struct Gating {
  Router router;
  int64_t top_k;
  bool raw;       // gates are probabilities; otherwise these divided by their sum (1 if top_k is 1)
  float* logits;  // [T, E]
  int64_t* index;  // [T, K], best first, the lower number among equals; the first experts if a
                   // logit is NaN
  float* gates;    // [T, K]; NaN if a logit is NaN or inf, or all are -inf
};
void gating(const Gating& arguments);

// index [T, K] of the largest scores [T, E] in the order of `Gating`; NaN counts as the largest.
void best_experts(
    const float* scores, int64_t tokens, int64_t experts, int64_t top_k, int64_t* index);

}  // namespace mpoe
