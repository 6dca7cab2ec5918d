// How a router is given to the bindings.
#pragma once

#include "bindings/bindings.h"
#include "cpu/router/router.h"

namespace mpoe {

// sizes: tokens, features, experts; x: [tokens, features] and weight: [experts, features], with
// dtypes of their own.
Router checked_router(std::string_view x_dtype,
                      std::string_view weight_dtype,
                      const Sizes<3>& sizes,
                      Address x,
                      Address weight);
// raw: gates are probabilities, otherwise they sum to 1. Results: logits float32 [tokens, experts],
// index int64 [tokens, top_k], gates float32 [tokens, top_k].
Gating checked_gating(
    const Router& router, int64_t top_k, bool raw, float* logits, int64_t* index, float* gates);

}  // namespace mpoe
