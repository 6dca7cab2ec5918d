// mpoe_route, mpoe_dispatch, mpoe_combine and its gradients: checks, and the kernels of
// cpu/routing/routing.h. The gradient of a dispatch is a combine without gates.
#include "cpu/routing/routing.h"

#include <limits>

#include "refusal.h"

namespace {

using namespace mpoe;

Combine checked_combine(const MpoeCombine& call) {
  require_range(call.slot_of_token, call.tokens * call.top_k, -1, call.slots - 1, "slot_of_token");
  return {
      .dtype = dtype_named(call.dtype),
      .tokens = call.tokens,
      .top_k = call.top_k,
      .slots = call.slots,
      .features = call.features,
      .slot_of_token = call.slot_of_token,
      .gates = call.gates,
  };
}

}  // namespace

extern "C" {

int mpoe_route(const MpoeRoute* call) {
  return answered([&] {
    require(call->experts >= 1, "num_experts must be at least 1; got ", call->experts);
    require(call->top_k >= 1, "top_k_index must be [T, K] with K >= 1; got [", call->tokens, ", ", call->top_k, "]");
    require(
        call->tokens <= std::numeric_limits<std::int32_t>::max() / call->top_k,
        "top_k_index must have fewer than 2^31 entries");  // expert_offsets are int32
    require_range(call->index, call->tokens * call->top_k, 0, call->experts - 1, "top_k_index");
    route({
        .index = call->index,
        .tokens = call->tokens,
        .top_k = call->top_k,
        .experts = call->experts,
        .capacity = call->capacity,
        .token_mask = call->token_mask,
        .expert_offsets = call->offsets,
        .token_of_slot = call->token_of_slot,
        .slot_of_token = call->slot_of_token,
    });
  });
}

int mpoe_dispatch(const MpoeDispatch* call) {
  return answered([&] {
    require_range(call->token_of_slot, call->slots, 0, call->tokens - 1, "token_of_slot");
    const auto offsets = checked_offsets(call->offsets, call->offset_bytes, call->experts, call->slots);
    dispatch({
        .x = call->x,
        .x_stride = call->stride_bytes,
        .width = call->row_bytes,
        .token_of_slot = call->token_of_slot,
        .slots = call->slots,
        .filled = offsets.back(),
        .out = call->out,
    });
  });
}

int mpoe_combine(const MpoeCombine* call) {
  return answered([&] { combine(checked_combine(*call), call->rows, call->out); });
}

int mpoe_combine_backward(const MpoeCombine* call) {
  return answered(
      [&] { combine_backward(checked_combine(*call), call->grad, call->rows, call->drows, call->dgates); });
}

}  // extern "C"
