// route, dispatch, combine and combine_backward: checks, and the kernels of cpu/routing/routing.h.
// The gradient of a dispatch is a combine without gates.
#include "cpu/routing/routing.h"

#include <limits>

#include "bindings/bindings.h"

namespace mpoe {
namespace {

// index: int64 [tokens, top_k]; capacity: negative: no limit; mask: bool [tokens] or none. Results:
// offsets int32 [experts + 1], token_of_slot int64 [tokens * top_k], slot_of_token int64 [tokens,
// top_k].
void bound_route(int64_t tokens,
                 int64_t top_k,
                 int64_t experts,
                 int64_t capacity,
                 Address index,
                 Address mask,
                 Address offsets,
                 Address token_of_slot,
                 Address slot_of_token) {
  require(experts >= 1, "num_experts must be at least 1; got ", experts);
  require(top_k >= 1, "top_k_index must be [T, K] with K >= 1; got [", tokens, ", ", top_k, "]");
  require(tokens <= std::numeric_limits<int32_t>::max() / top_k,
          "top_k_index must have fewer than 2^31 entries");  // offsets are int32
  require_range(index, tokens * top_k, 0, experts - 1, "top_k_index");
  route({
      .index = index,
      .tokens = tokens,
      .top_k = top_k,
      .experts = experts,
      .capacity = capacity,
      .token_mask = mask,
      .expert_offsets = offsets,
      .token_of_slot = token_of_slot,
      .slot_of_token = slot_of_token,
  });
}

// x: `tokens` rows of row_bytes, one every stride_bytes; token_of_slot: int64 [slots]; offsets:
// [experts + 1].
void bound_dispatch(int64_t tokens,
                    int64_t slots,
                    int64_t experts,
                    int64_t row_bytes,
                    int64_t stride_bytes,
                    int64_t offset_bytes,
                    Address x,
                    Address token_of_slot,
                    Address offsets,
                    Address out) {
  require_range(token_of_slot, slots, 0, tokens - 1, "token_of_slot");
  const auto checked = checked_offsets(offsets, offset_bytes, experts, slots);
  dispatch({
      .x = x,
      .x_stride = stride_bytes,
      .width = row_bytes,
      .token_of_slot = token_of_slot,
      .slots = slots,
      .filled = checked.back(),
      .out = out,
  });
}

Combine checked_combine(std::string_view dtype,
                        const Sizes<4>& sizes,
                        Address slot_of_token,
                        Address gates) {
  const auto [tokens, top_k, slots, features] = sizes;
  require_range(slot_of_token, tokens * top_k, -1, slots - 1, "slot_of_token");
  return {dtype_named(dtype), tokens, top_k, slots, features, slot_of_token, gates};
}

// sizes: tokens, top_k, slots, features; slot_of_token: int64 [tokens, top_k]; gates: [tokens,
// top_k], float32 (float64 for float64), none: all 1; rows: [slots, features]; out: [tokens,
// features].
void bound_combine(std::string_view dtype,
                   const Sizes<4>& sizes,
                   Address slot_of_token,
                   Address gates,
                   Address rows,
                   Address out) {
  combine(checked_combine(dtype, sizes, slot_of_token, gates), rows, out);
}

// grad: [tokens, features]; drows and dgates: like rows and gates, none: not wanted.
void bound_combine_backward(std::string_view dtype,
                            const Sizes<4>& sizes,
                            Address slot_of_token,
                            Address gates,
                            Address rows,
                            Address grad,
                            Address drows,
                            Address dgates) {
  combine_backward(checked_combine(dtype, sizes, slot_of_token, gates), grad, rows, drows, dgates);
}

}  // namespace

void bind_routing(pybind11::module_& module) {
  module.def("route", bound_route, WithoutGil());
  module.def("dispatch", bound_dispatch, WithoutGil());
  module.def("combine", bound_combine, WithoutGil());
  module.def("combine_backward", bound_combine_backward, WithoutGil());
}

}  // namespace mpoe
