// gate, route, dispatch, combine and their gradients: allocation, and the launches of routing.h. The ops of
// mpoe_kernels/routing have checked their arguments.
#include "cuda/bind.h"

#include <algorithm>
#include <tuple>

#include "cuda/routing/routing.h"

namespace mpoe::cuda {
namespace {

// Weights and index [T, K] of the most probable experts.
std::tuple<Tensor, Tensor> gate_op(const Tensor& logits, int64_t top_k, bool renormalize) {
  const OnDevice device(logits);
  const Tensor in = dense(logits);
  const int64_t tokens = in.size(0), experts = in.size(1);
  Tensor weights = torch::stable::new_empty(in, {tokens, top_k}, ScalarType::Float);
  Tensor index = torch::stable::new_empty(in, {tokens, top_k}, ScalarType::Long);
  gate(kernel_dtype(in), in.const_data_ptr(), weights.mutable_data_ptr<float>(),
       index.mutable_data_ptr<int64_t>(), counted(tokens, "the number of tokens"),
       counted(experts, "the number of experts"), counted(top_k, "top_k"), renormalize, device.stream());
  return {weights, index};
}

std::tuple<Tensor, Tensor, Tensor> route_op(const Tensor& top_k_index, int64_t num_experts,
                                            std::optional<int64_t> capacity, const Optional& token_mask) {
  const OnDevice device(top_k_index);
  const Tensor index = dense_index(top_k_index);
  const int64_t tokens = index.size(0), top_k = index.size(1);
  const Optional mask = dense(token_mask);
  Tensor offsets = torch::stable::new_empty(index, {num_experts + 1}, ScalarType::Int);
  Tensor token_of_slot = torch::stable::new_empty(index, {tokens * top_k});
  Tensor slot_of_token = torch::stable::new_empty(index, {tokens, top_k});
  Route in;
  in.index = index.const_data_ptr<int64_t>();
  in.token_mask = data_of<bool>(mask);
  in.tokens = counted(tokens, "the number of tokens");
  in.top_k = counted(top_k, "top_k");
  in.experts = counted(num_experts, "the number of experts");
  // A capacity above the number of pairs drops none; the launcher takes at most 2^31 - 1.
  in.capacity = -1;
  if (capacity.has_value()) in.capacity = counted(std::min(*capacity, tokens * top_k), "capacity");
  in.offsets = offsets.mutable_data_ptr<int>();
  in.token_of_slot = token_of_slot.mutable_data_ptr<int64_t>();
  in.slot_of_token = slot_of_token.mutable_data_ptr<int64_t>();
  Scratch scratch(index);
  route(in, scratch.memory(), device.stream());
  return {offsets, token_of_slot, slot_of_token};
}

Tensor dispatch_op(const Tensor& x, const Tensor& expert_offsets, const Tensor& token_of_slot) {
  const OnDevice device(x);
  const Tensor source = x.stride(1) == 1 || x.size(1) == 1 ? x : dense(x);  // rows may have gaps, or even overlap
  const Tensor index = dense_index(token_of_slot);
  const Tensor offsets = dense(cast(expert_offsets, ScalarType::Int));
  Tensor out = torch::stable::new_empty(x, {index.size(0), x.size(1)});
  combine(kernel_dtype(x), source.const_data_ptr(), source.stride(0), index.const_data_ptr<int64_t>(), nullptr,
          offsets.const_data_ptr<int>() + offsets.size(0) - 1, out.mutable_data_ptr(),
          counted(index.size(0), "the number of slots"), 1, counted(x.size(1), "columns"), device.stream());
  return out;
}

Tensor dense_gates(const Tensor& gates) { return dense(cast(gates, ScalarType::Float)); }

// Without gates, all are 1: this is dispatch's gradient.
Tensor combine_op(const Tensor& y_sorted, const Tensor& slot_of_token, const Optional& top_k_weights) {
  const OnDevice device(y_sorted);
  const Tensor rows = dense(y_sorted), index = dense_index(slot_of_token);
  const Optional gates = top_k_weights.has_value() ? Optional(dense_gates(*top_k_weights)) : std::nullopt;
  Tensor y = torch::stable::new_empty(rows, {index.size(0), rows.size(1)});
  combine(kernel_dtype(rows), rows.const_data_ptr(), rows.size(1), index.const_data_ptr<int64_t>(),
          data_of<float>(gates), nullptr, y.mutable_data_ptr(), counted(index.size(0), "the number of tokens"),
          counted(index.size(1), "top_k"), counted(rows.size(1), "columns"), device.stream());
  return y;
}

std::tuple<Tensor, Tensor> combine_backward_op(
    const Tensor& grad, const Tensor& y_sorted, const Tensor& token_of_slot, const Tensor& slot_of_token,
    const Tensor& top_k_weights, bool need_y, bool need_weights) {
  const OnDevice device(grad);
  const Tensor rows = dense(y_sorted), outer = dense(grad), tokens = dense_index(token_of_slot);
  const Tensor index = dense_index(slot_of_token);
  const Tensor gates = dense_gates(top_k_weights);
  Tensor drows = torch::stable::new_empty(rows, {need_y ? rows.size(0) : 0, rows.size(1)});
  Tensor dgates = torch::stable::new_empty(gates, {need_weights ? index.size(0) : 0, index.size(1)});
  combine_backward(kernel_dtype(rows), outer.const_data_ptr(), rows.const_data_ptr(),
                   tokens.const_data_ptr<int64_t>(), index.const_data_ptr<int64_t>(), gates.const_data_ptr<float>(),
                   need_y ? drows.mutable_data_ptr() : nullptr,
                   need_weights ? dgates.mutable_data_ptr<float>() : nullptr,
                   counted(rows.size(0), "the number of slots"), counted(index.size(1), "top_k"),
                   counted(rows.size(1), "columns"), device.stream());
  return {drows, cast(dgates, top_k_weights.scalar_type())};
}

}  // namespace
}  // namespace mpoe::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(MPOE_CUDA_OPS, m) {
  m.def("gate(Tensor logits, int top_k, bool renormalize) -> (Tensor, Tensor)");
  m.def("route(Tensor top_k_index, int num_experts, int? capacity, Tensor? token_mask) -> (Tensor, Tensor, Tensor)");
  m.def("dispatch(Tensor x, Tensor expert_offsets, Tensor token_of_slot) -> Tensor");
  m.def("combine(Tensor y_sorted, Tensor slot_of_token, Tensor? top_k_weights) -> Tensor");
  m.def(
      "combine_backward(Tensor grad, Tensor y_sorted, Tensor token_of_slot, Tensor slot_of_token, "
      "Tensor top_k_weights, bool need_y, bool need_weights) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(MPOE_CUDA_OPS, MPOE_CUDA_KEY, m) {
  m.impl("gate", TORCH_BOX(&mpoe::cuda::gate_op));
  m.impl("route", TORCH_BOX(&mpoe::cuda::route_op));
  m.impl("dispatch", TORCH_BOX(&mpoe::cuda::dispatch_op));
  m.impl("combine", TORCH_BOX(&mpoe::cuda::combine_op));
  m.impl("combine_backward", TORCH_BOX(&mpoe::cuda::combine_backward_op));
}
