// mpoe_native::route, dispatch, combine and their gradients: checks, allocation, and the kernels of cpu/routing.h.
#include <tuple>

#include "binding.h"
#include "cpu/routing.h"

namespace {

using namespace mpoe;

// Slots and tokens are addresses: a wrong one must not reach memory.
void check_range(const Tensor& index, int64_t low, int64_t high, const char* name) {
  const int64_t* values = index.const_data_ptr<int64_t>();
  const int64_t bad = first_outside(values, index.numel(), low, high);
  MPOE_CHECK(bad < 0, name, " must lie in ", low, "..", high, "; got ", values[bad]);
}

// expert_offsets, token_of_slot, slot_of_token, and the position in top_k_index of an entry outside 0..E-1 (or -1; then
// the others are empty).
std::tuple<Tensor, Tensor, Tensor, int64_t> route_cpu(
    const Tensor& top_k_index, int64_t num_experts, std::optional<int64_t> capacity,
    const std::optional<Tensor>& token_mask) {
  const Tensor index = dense_index(top_k_index, 2, "top_k_index");
  const int64_t tokens = index.size(0), top_k = index.size(1);
  MPOE_CHECK(top_k > 0, "top_k_index must be [T, K] with K >= 1; got [", tokens, ", 0]");
  MPOE_CHECK(num_experts > 0, "num_experts must be at least 1; got ", num_experts);
  const int64_t* values = index.const_data_ptr<int64_t>();
  const int64_t bad = first_outside(values, index.numel(), 0, num_experts - 1);
  const int64_t pairs = bad < 0 ? tokens * top_k : 0;
  Tensor expert_offsets = torch::stable::new_empty(index, {num_experts + 1}, ScalarType::Int);
  Tensor token_of_slot = torch::stable::new_empty(index, {pairs});
  Tensor slot_of_token = torch::stable::new_empty(index, {bad < 0 ? tokens : 0, top_k});
  if (bad >= 0) return {expert_offsets, token_of_slot, slot_of_token, bad};
  std::optional<Tensor> mask;
  if (token_mask.has_value()) {
    MPOE_CHECK(
        token_mask->scalar_type() == ScalarType::Bool && token_mask->dim() == 1 && token_mask->size(0) == tokens,
        "token_mask must be bool [", tokens, "]");
    mask = dense(*token_mask);
  }
  route({
      .index = values,
      .tokens = tokens,
      .top_k = top_k,
      .experts = num_experts,
      .capacity = capacity.value_or(-1),
      .token_mask = mask.has_value() ? mask->const_data_ptr<bool>() : nullptr,
      .expert_offsets = expert_offsets.mutable_data_ptr<int32_t>(),
      .token_of_slot = token_of_slot.mutable_data_ptr<int64_t>(),
      .slot_of_token = slot_of_token.mutable_data_ptr<int64_t>(),
  });
  return {expert_offsets, token_of_slot, slot_of_token, bad};
}

int64_t last_offset(const Tensor& expert_offsets) {
  const Tensor offsets = dense_index(expert_offsets, 1, "expert_offsets");
  MPOE_CHECK(offsets.size(0) > 0, "expert_offsets must be [E + 1]; got [0]");
  return offsets.const_data_ptr<int64_t>()[offsets.size(0) - 1];
}

Tensor dispatch_cpu(const Tensor& x, const Tensor& expert_offsets, const Tensor& token_of_slot) {
  const int64_t element = size_of(dtype_of(x, "x"));
  MPOE_CHECK(x.dim() == 2, "x must have 2 axes; got ", x.dim());
  const Tensor source = x.stride(1) == 1 || x.size(1) == 1 ? x : dense(x);  // rows may lie apart, even overlap
  const Tensor index = dense_index(token_of_slot, 1, "token_of_slot");
  check_range(index, 0, x.size(0) - 1, "token_of_slot");
  Tensor out = torch::stable::new_empty(x, {index.size(0), x.size(1)});
  dispatch({
      .x = source.const_data_ptr(),
      .x_stride = source.stride(0) * element,
      .width = x.size(1) * element,
      .token_of_slot = index.const_data_ptr<int64_t>(),
      .slots = index.size(0),
      .filled = last_offset(expert_offsets),
      .out = out.mutable_data_ptr(),
  });
  return out;
}

// The arguments that combine, its gradient and dispatch's gradient share; `index` and `gates` must outlive them.
Combine combine_arguments(const Tensor& index, const Tensor* gates, Dtype dtype, int64_t slots, int64_t features) {
  check_range(index, -1, slots - 1, "slot_of_token");
  return {
      .dtype = dtype,
      .tokens = index.size(0),
      .top_k = index.size(1),
      .slots = slots,
      .features = features,
      .slot_of_token = index.const_data_ptr<int64_t>(),
      .gates = gates == nullptr ? nullptr : gates->const_data_ptr(),
  };
}

Tensor dense_gates(const Tensor& gates, const Tensor& index, Dtype dtype) {
  MPOE_CHECK(
      gates.dim() == 2 && gates.size(0) == index.size(0) && gates.size(1) == index.size(1),
      "top_k_weights must be [", index.size(0), ", ", index.size(1), "]");
  return dense(cast(gates, dtype == Dtype::kFloat64 ? ScalarType::Double : ScalarType::Float));
}

Tensor dispatch_backward_cpu(const Tensor& grad, const Tensor& slot_of_token) {
  MPOE_CHECK(grad.dim() == 2, "grad must have 2 axes; got ", grad.dim());
  const Tensor rows = dense(grad), index = dense_index(slot_of_token, 2, "slot_of_token");
  Tensor dx = torch::stable::new_empty(rows, {index.size(0), rows.size(1)});
  combine(
      combine_arguments(index, nullptr, dtype_of(rows, "grad"), rows.size(0), rows.size(1)), rows.const_data_ptr(),
      dx.mutable_data_ptr());
  return dx;
}

Tensor combine_cpu(const Tensor& y_sorted, const Tensor& slot_of_token, const Tensor& top_k_weights) {
  const Dtype dtype = dtype_of(y_sorted, "y_sorted");
  MPOE_CHECK(y_sorted.dim() == 2, "y_sorted must have 2 axes; got ", y_sorted.dim());
  const Tensor rows = dense(y_sorted), index = dense_index(slot_of_token, 2, "slot_of_token");
  const Tensor gates = dense_gates(top_k_weights, index, dtype);
  Tensor y = torch::stable::new_empty(rows, {index.size(0), rows.size(1)});
  combine(
      combine_arguments(index, &gates, dtype, rows.size(0), rows.size(1)), rows.const_data_ptr(), y.mutable_data_ptr());
  return y;
}

std::tuple<Tensor, Tensor> combine_backward_cpu(
    const Tensor& grad, const Tensor& y_sorted, const Tensor& slot_of_token, const Tensor& top_k_weights, bool need_y,
    bool need_weights) {
  const Dtype dtype = dtype_of(y_sorted, "y_sorted");
  MPOE_CHECK(grad.scalar_type() == y_sorted.scalar_type(), "grad must have the dtype of y_sorted");
  MPOE_CHECK(
      grad.dim() == 2 && y_sorted.dim() == 2 && grad.size(1) == y_sorted.size(1) &&
          grad.size(0) == slot_of_token.size(0),
      "grad must be [", slot_of_token.size(0), ", ", y_sorted.size(1), "]");
  const Tensor rows = dense(y_sorted), outer = dense(grad), index = dense_index(slot_of_token, 2, "slot_of_token");
  const Tensor gates = dense_gates(top_k_weights, index, dtype);
  Tensor drows = torch::stable::new_empty(rows, {need_y ? rows.size(0) : 0, rows.size(1)});
  Tensor dgates = torch::stable::new_empty(gates, {need_weights ? index.size(0) : 0, index.size(1)});
  combine_backward(
      combine_arguments(index, &gates, dtype, rows.size(0), rows.size(1)), outer.const_data_ptr(),
      rows.const_data_ptr(), need_y ? drows.mutable_data_ptr() : nullptr,
      need_weights ? dgates.mutable_data_ptr() : nullptr);
  return {drows, cast(dgates, top_k_weights.scalar_type())};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mpoe_native, m) {
  m.def("route(Tensor top_k_index, int num_experts, int? capacity, Tensor? token_mask) -> (Tensor, Tensor, Tensor, int)");
  m.def("dispatch(Tensor x, Tensor expert_offsets, Tensor token_of_slot) -> Tensor");
  m.def("dispatch_backward(Tensor grad, Tensor slot_of_token) -> Tensor");
  m.def("combine(Tensor y_sorted, Tensor slot_of_token, Tensor top_k_weights) -> Tensor");
  m.def(
      "combine_backward(Tensor grad, Tensor y_sorted, Tensor slot_of_token, Tensor top_k_weights, bool need_y, "
      "bool need_weights) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(mpoe_native, CPU, m) {
  m.impl("route", TORCH_BOX(&route_cpu));
  m.impl("dispatch", TORCH_BOX(&dispatch_cpu));
  m.impl("dispatch_backward", TORCH_BOX(&dispatch_backward_cpu));
  m.impl("combine", TORCH_BOX(&combine_cpu));
  m.impl("combine_backward", TORCH_BOX(&combine_backward_cpu));
}
