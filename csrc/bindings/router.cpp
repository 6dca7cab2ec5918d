// gating, router_logits and best_experts: checks, and the kernels of cpu/router/router.h.
#include "bindings/router.h"

namespace mpoe {

Router checked_router(std::string_view x_dtype,
                      std::string_view weight_dtype,
                      const Sizes<3>& sizes,
                      Address x,
                      Address weight) {
  const Dtype x_type = dtype_named(x_dtype), weight_type = dtype_named(weight_dtype);
  require(x_type != Dtype::kFloat64 && weight_type != Dtype::kFloat64,
          "x and weight must not be float64");
  return {x_type, weight_type, sizes[0], sizes[1], sizes[2], x, weight};
}

void require_top_k(int64_t top_k, int64_t experts) {
  require(top_k >= 1 && top_k <= experts, "top_k must lie in 1..", experts, "; got ", top_k);
}

namespace {

// raw: gates are probabilities, otherwise they sum to 1. Results: logits float32 [tokens, experts],
// index int64 [tokens, top_k], gates float32 [tokens, top_k].
void bound_gating(std::string_view x_dtype,
                  std::string_view weight_dtype,
                  const Sizes<3>& sizes,
                  int64_t top_k,
                  bool raw,
                  Address x,
                  Address weight,
                  Address logits,
                  Address index,
                  Address gates) {
  const Router router = checked_router(x_dtype, weight_dtype, sizes, x, weight);
  require_top_k(top_k, router.experts);
  gating({router, top_k, raw, logits, index, gates});
}

void bound_logits(std::string_view x_dtype,
                  std::string_view weight_dtype,
                  const Sizes<3>& sizes,
                  Address x,
                  Address weight,
                  Address logits) {
  router_logits(checked_router(x_dtype, weight_dtype, sizes, x, weight), logits);
}

// sizes: tokens, experts, top_k; scores: float32 [tokens, experts]; index: int64 [tokens, top_k].
void bound_best(const Sizes<3>& sizes, Address scores, Address index) {
  const auto [tokens, experts, top_k] = sizes;
  require_top_k(top_k, experts);
  best_experts(scores, tokens, experts, top_k, index);
}

}  // namespace

void bind_router(pybind11::module_& module) {
  module.def("gating", bound_gating, WithoutGil());
  module.def("router_logits", bound_logits, WithoutGil());
  module.def("best_experts", bound_best, WithoutGil());
}

}  // namespace mpoe
