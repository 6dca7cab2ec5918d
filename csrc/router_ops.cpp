// mpoe_gating, mpoe_router_logits and its gradients: checks, and the kernels of cpu/router/router.h.
#include "cpu/router/router.h"

#include "refusal.h"

namespace {

using namespace mpoe;

Router checked_router(const MpoeRouter& call) {
  const Dtype x_dtype = dtype_named(call.dtype), weight_dtype = dtype_named(call.weight_dtype);
  require(x_dtype != Dtype::kFloat64 && weight_dtype != Dtype::kFloat64, "x and weight must not be float64");
  return {
      .x_dtype = x_dtype,
      .weight_dtype = weight_dtype,
      .tokens = call.tokens,
      .features = call.features,
      .experts = call.experts,
      .x = call.x,
      .weight = call.weight,
  };
}

}  // namespace

namespace mpoe {

Gating checked_gating(const MpoeRouter& call) {
  require(call.top_k >= 1 && call.top_k <= call.experts, "top_k must lie in 1..", call.experts, "; got ", call.top_k);
  return {
      .router = checked_router(call),
      .top_k = call.top_k,
      .raw = call.raw != 0,
      .logits = call.logits,
      .index = call.index,
      .gates = call.gates,
  };
}

}  // namespace mpoe

extern "C" {

int mpoe_gating(const MpoeRouter* call) {
  return answered([&] { gating(checked_gating(*call)); });
}

int mpoe_router_logits(const MpoeRouter* call) {
  return answered([&] { router_logits(checked_router(*call), call->logits); });
}

int mpoe_router_logits_backward(const MpoeRouter* call) {
  return answered([&] {
    const Router router = checked_router(*call);
    require(
        router.x_dtype != Dtype::kFloat16 && router.weight_dtype != Dtype::kFloat16,
        "x and weight must be float32 or bfloat16; got ", call->dtype, " and ", call->weight_dtype);
    router_logits_backward(router, call->grad, call->dx, call->dweight);
  });
}

}  // extern "C"
