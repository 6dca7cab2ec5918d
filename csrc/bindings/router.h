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
// What sizes arrays by top_k asks this first.
void require_top_k(int64_t top_k, int64_t experts);

}  // namespace mpoe
