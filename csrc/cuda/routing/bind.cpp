// route, dispatch, combine and their gradients: allocation, and the launches of routing.h. The ops
// of mpoe_kernels/routing have checked their arguments, which are dense but for the rows to
// combine; gates are float32.
#include "cuda/bind.h"

#include <algorithm>
#include <tuple>

#include "cuda/routing/routing.h"

namespace mpoe::cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor> route_op(const Tensor& index,
                                            int64_t num_experts,
                                            std::optional<int64_t> capacity,
                                            const Optional& token_mask) {
  const OnDevice device(index);
  const int64_t tokens = index.size(0);
  const int64_t top_k = index.size(1);
  Tensor offsets = torch::stable::new_empty(index, {num_experts + 1}, ScalarType::Int);
  Tensor token_of_slot = torch::stable::new_empty(index, {tokens * top_k});
  Tensor slot_of_token = torch::stable::new_empty(index, {tokens, top_k});
  Route in;
  in.index = index.const_data_ptr<int64_t>();
  in.token_mask = data_of<bool>(token_mask);
  in.tokens = counted(tokens, "the number of tokens");
  in.top_k = counted(top_k, "top_k");
  in.experts = counted(num_experts, "the number of experts");
  // A capacity above the number of pairs drops none; the launcher takes at most 2^31 - 1.
  in.capacity = -1;
  if (capacity.has_value())
    in.capacity = counted(std::min(*capacity, tokens * top_k), "capacity");
  in.offsets = offsets.mutable_data_ptr<int>();
  in.token_of_slot = token_of_slot.mutable_data_ptr<int64_t>();
  in.slot_of_token = slot_of_token.mutable_data_ptr<int64_t>();
  Scratch scratch(index);
  route(in, scratch.memory(), device.stream());
  return {offsets, token_of_slot, slot_of_token};
}

// Without gates, all are 1. filled: int32, how many tokens have rows; without it all.
Tensor combine_op(const Tensor& rows,
                  const Tensor& slot_of_token,
                  const Optional& gates,
                  const Optional& filled) {
  const OnDevice device(rows);
  Tensor y = torch::stable::new_empty(rows, {slot_of_token.size(0), rows.size(1)});
  combine(kernel_dtype(rows),
          rows.const_data_ptr(),
          rows.stride(0),
          slot_of_token.const_data_ptr<int64_t>(),
          data_of<float>(gates),
          data_of<int>(filled),
          y.mutable_data_ptr(),
          counted(slot_of_token.size(0), "the number of tokens"),
          counted(slot_of_token.size(1), "top_k"),
          counted(rows.size(1), "columns"),
          device.stream());
  return y;
}

std::tuple<Tensor, Tensor> combine_backward_op(const Tensor& grad,
                                               const Tensor& rows,
                                               const Tensor& token_of_slot,
                                               const Tensor& slot_of_token,
                                               const Tensor& gates,
                                               bool need_y,
                                               bool need_weights) {
  const OnDevice device(grad);
  Tensor drows = torch::stable::new_empty(rows, {need_y ? rows.size(0) : 0, rows.size(1)});
  Tensor dgates =
      torch::stable::new_empty(gates, {need_weights ? gates.size(0) : 0, gates.size(1)});
  combine_backward(kernel_dtype(rows),
                   grad.const_data_ptr(),
                   rows.const_data_ptr(),
                   token_of_slot.const_data_ptr<int64_t>(),
                   slot_of_token.const_data_ptr<int64_t>(),
                   gates.const_data_ptr<float>(),
                   need_y ? drows.mutable_data_ptr() : nullptr,
                   need_weights ? dgates.mutable_data_ptr<float>() : nullptr,
                   counted(rows.size(0), "the number of slots"),
                   counted(gates.size(1), "top_k"),
                   counted(rows.size(1), "columns"),
                   device.stream());
  return {drows, dgates};
}

}  // namespace
}  // namespace mpoe::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(MPOE_CUDA_OPS, m) {
  m.def(
      "route(Tensor top_k_index, int num_experts, int? capacity, Tensor? token_mask) -> (Tensor, "
      "Tensor, Tensor)");
  m.def(
      "combine(Tensor y_sorted, Tensor slot_of_token, Tensor? top_k_weights, Tensor? filled) -> "
      "Tensor");
  m.def(
      "combine_backward(Tensor grad, Tensor y_sorted, Tensor token_of_slot, Tensor slot_of_token, "
      "Tensor top_k_weights, bool need_y, bool need_weights) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(MPOE_CUDA_OPS, MPOE_CUDA_KEY, m) {
  m.impl("route", TORCH_BOX(&mpoe::cuda::route_op));
  m.impl("combine", TORCH_BOX(&mpoe::cuda::combine_op));
  m.impl("combine_backward", TORCH_BOX(&mpoe::cuda::combine_backward_op));
}
