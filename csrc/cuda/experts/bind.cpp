// experts, experts_backward: allocation, and the launches of experts.h. The ops of mpoe_kernels/hidden_experts and
// neurons have checked their arguments, which are dense; gates are float32.
#include "cuda/bind.h"

#include <string>
#include <tuple>
#include <vector>

#include "cuda/experts/experts.h"

namespace mpoe::cuda {
namespace {

void fill(ExpertsInputs& in, const Tensor& x, const Tensor& gates, const Tensor& index, const Tensor& up,
          const Tensor& down, const Optional& bias, const Optional& x_gate, const Optional& up_gate,
          const std::string& activation, bool by_unit) {
  require(up.numel() / up.size(0) / up.size(1) < 1 << 30 && down.numel() / up.size(0) / up.size(1) < 1 << 30,
          "an expert's weight must have less than 2^30 elements");
  in.dtype = kernel_dtype(x);
  in.tokens = counted(x.size(0), "the number of tokens");
  in.experts = counted(up.size(0), "the number of experts");
  in.top_k = counted(index.size(1), "top_k");
  in.own = counted(up.size(1), "the number of groups");
  in.width = counted(up.size(by_unit ? 3 : 2), "the width of a group");
  in.units = counted(up.size(by_unit ? 2 : 3), "the number of hidden units");
  in.groups = counted(x.size(1), "the width of x") / in.width;
  in.columns = counted(in.groups * down.size(3), "the width of the result") / in.groups;
  in.by_unit = by_unit;
  in.activation = activation_of(activation);
  in.x = x.const_data_ptr();
  in.x_gate = data_of(x_gate);
  in.gates = gates.const_data_ptr<float>();
  in.index = index.const_data_ptr<int64_t>();
  in.up = up.const_data_ptr();
  in.up_gate = data_of(up_gate);
  in.down = down.const_data_ptr();
  in.bias = data_of(bias);
}

Tensor experts_op(const Tensor& x, const Tensor& gates, const Tensor& top_k_index, const Tensor& up, const Tensor& down,
                  const Optional& bias, const Optional& x_gate, const Optional& up_gate, bool by_unit,
                  std::string activation) {
  const OnDevice device(x);
  ExpertsForward in;
  fill(in, x, gates, top_k_index, up, down, bias, x_gate, up_gate, activation, by_unit);
  const int64_t sizes[] = {in.tokens, int64_t(in.groups) * in.columns};
  if (top_k_index.numel() == 0) return torch::stable::new_zeros(x, sizes);
  Tensor out = torch::stable::new_empty(x, sizes);
  in.out = out.mutable_data_ptr();
  Scratch scratch(x);
  experts_forward(in, scratch.memory(), device.stream());
  return out;
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Gradients of x, gates, up, down, bias, x_gate, up_gate; empty if `need` is 0 or there is no such input.
Gradients experts_backward_op(const Tensor& grad, const Tensor& x, const Tensor& gates, const Tensor& top_k_index,
                              const Tensor& up, const Tensor& down, const Optional& bias, const Optional& x_gate,
                              const Optional& up_gate, bool by_unit, std::string activation,
                              std::vector<int64_t> need) {
  const OnDevice device(x);
  ExpertsBackward in;
  fill(in, x, gates, top_k_index, up, down, bias, x_gate, up_gate, activation, by_unit);
  in.grad = grad.const_data_ptr();
  const bool none = top_k_index.numel() == 0;
  bool any = false;
  const auto place = [&](const Optional& like, std::size_t which, auto& address) {
    if (!like.has_value() || need[which] == 0) return torch::stable::new_empty(x, {0});
    if (none) return torch::stable::new_zeros(*like, like->sizes());
    Tensor result = torch::stable::new_empty(*like, like->sizes());
    address = static_cast<std::remove_reference_t<decltype(address)>>(result.mutable_data_ptr());
    any = true;
    return result;
  };
  Tensor dx = place(x, 0, in.dx), dgates = place(gates, 1, in.dgates), dup = place(up, 2, in.dup);
  Tensor ddown = place(down, 3, in.ddown), dbias = place(bias, 4, in.dbias), dx_gate = place(x_gate, 5, in.dx_gate);
  Tensor dup_gate = place(up_gate, 6, in.dup_gate);
  Scratch scratch(x);
  if (any) experts_backward(in, scratch.memory(), device.stream());
  return {dx, dgates, dup, ddown, dbias, dx_gate, dup_gate};
}

}  // namespace
}  // namespace mpoe::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(MPOE_CUDA_OPS, m) {
  m.def(
      "experts(Tensor x, Tensor gates, Tensor top_k_index, Tensor up, Tensor down, Tensor? bias, Tensor? x_gate, "
      "Tensor? up_gate, bool by_unit, str activation) -> Tensor");
  m.def(
      "experts_backward(Tensor grad, Tensor x, Tensor gates, Tensor top_k_index, Tensor up, Tensor down, Tensor? bias, "
      "Tensor? x_gate, Tensor? up_gate, bool by_unit, str activation, int[] need) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(MPOE_CUDA_OPS, MPOE_CUDA_KEY, m) {
  m.impl("experts", TORCH_BOX(&mpoe::cuda::experts_op));
  m.impl("experts_backward", TORCH_BOX(&mpoe::cuda::experts_backward_op));
}
