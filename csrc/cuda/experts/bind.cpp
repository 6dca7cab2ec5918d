// experts, experts_backward: allocation, and the launches of experts.h. The ops of mpoe_kernels/hidden_experts and
// neurons have checked their arguments.
#include "cuda/bind.h"

#include <string>
#include <tuple>
#include <vector>

#include "cuda/experts/experts.h"

namespace mpoe::cuda {
namespace {

// Dense tensors behind an ExpertsInputs, which they must outlive.
struct Experts {
  Tensor x, gates, index, up, down;
  Optional bias, x_gate, up_gate;

  Experts(const Tensor& x_, const Tensor& gates_, const Tensor& index_, const Tensor& up_, const Tensor& down_,
          const Optional& bias_, const Optional& x_gate_, const Optional& up_gate_)
      : x(dense(x_)), gates(dense(cast(gates_, ScalarType::Float))), index(dense(index_)), up(dense(up_)),
        down(dense(down_)), bias(dense(bias_)), x_gate(dense(x_gate_)), up_gate(dense(up_gate_)) {}

  void fill(ExpertsInputs& in, const std::string& activation, bool by_unit) const {
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
};

Tensor experts_op(const Tensor& x, const Tensor& gates, const Tensor& top_k_index, const Tensor& up, const Tensor& down,
                  const Optional& bias, const Optional& x_gate, const Optional& up_gate, bool by_unit,
                  std::string activation) {
  const OnDevice device(x);
  const Experts tensors(x, gates, top_k_index, up, down, bias, x_gate, up_gate);
  ExpertsForward in;
  tensors.fill(in, activation, by_unit);
  const int64_t sizes[] = {in.tokens, int64_t(in.groups) * in.columns};
  if (tensors.index.numel() == 0) return torch::stable::new_zeros(tensors.x, sizes);
  Tensor out = torch::stable::new_empty(tensors.x, sizes);
  in.out = out.mutable_data_ptr();
  Scratch scratch(tensors.x);
  experts_forward(in, scratch.memory(), device.stream());
  return out;
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Gradients of x, gates, up, down, bias, x_gate, up_gate; empty if `need` is 0 or there is no such input.
Gradients experts_backward_op(const Tensor& grad, const Tensor& x, const Tensor& gates, const Tensor& top_k_index,
                              const Tensor& up, const Tensor& down, const Optional& bias, const Optional& x_gate,
                              const Optional& up_gate, bool by_unit, std::string activation, std::vector<int64_t> need) {
  const OnDevice device(x);
  const Experts tensors(x, gates, top_k_index, up, down, bias, x_gate, up_gate);
  ExpertsBackward in;
  tensors.fill(in, activation, by_unit);
  const Tensor rows = dense(grad);
  in.grad = rows.const_data_ptr();
  const bool none = tensors.index.numel() == 0;
  bool any = false;
  const auto place = [&](const Optional& like, std::size_t which, auto& address) {
    if (!like.has_value() || need[which] == 0) return torch::stable::new_empty(tensors.x, {0});
    if (none) return torch::stable::new_zeros(*like, like->sizes());
    Tensor result = torch::stable::new_empty(*like, like->sizes());
    address = static_cast<std::remove_reference_t<decltype(address)>>(result.mutable_data_ptr());
    any = true;
    return result;
  };
  Tensor dx = place(tensors.x, 0, in.dx), dgates = place(tensors.gates, 1, in.dgates);
  Tensor dup = place(tensors.up, 2, in.dup), ddown = place(tensors.down, 3, in.ddown);
  Tensor dbias = place(tensors.bias, 4, in.dbias), dx_gate = place(tensors.x_gate, 5, in.dx_gate);
  Tensor dup_gate = place(tensors.up_gate, 6, in.dup_gate);
  Scratch scratch(tensors.x);
  if (any) experts_backward(in, scratch.memory(), device.stream());
  return {dx, need[1] != 0 ? cast(dgates, gates.scalar_type()) : dgates, dup, ddown, dbias, dx_gate, dup_gate};
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
