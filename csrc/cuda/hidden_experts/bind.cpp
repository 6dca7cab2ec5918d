// hidden_experts, hidden_experts_backward: checks, allocation, and the launches of hidden_experts.h.
#include "cuda/bind.h"

#include <string>
#include <tuple>
#include <vector>

#include "cuda/hidden_experts/hidden_experts.h"

namespace mpoe::cuda {
namespace {

using Optional = std::optional<Tensor>;

std::optional<Tensor> dense_if_given(const Optional& tensor) {
  return tensor.has_value() ? std::optional<Tensor>(dense(*tensor)) : std::nullopt;
}
const void* data_of(const Optional& tensor) { return tensor.has_value() ? tensor->const_data_ptr() : nullptr; }

// Dense tensors behind a HiddenInputs; must outlive it.
struct Hidden {
  Tensor u, gates, index, right, left;
  Optional bias, u_gate, right_gate;

  Hidden(const Tensor& u_, const Tensor& gates_, const Tensor& index_, const Tensor& right_, const Tensor& left_,
         const Optional& bias_, const Optional& u_gate_, const Optional& right_gate_)
      : u(dense(u_)),
        gates(dense(cast(gates_, ScalarType::Float))),
        index(dense_index(index_, 2, "top_k_index")),
        right(dense(right_)),
        left(dense(left_)),
        bias(dense_if_given(bias_)),
        u_gate(dense_if_given(u_gate_)),
        right_gate(dense_if_given(right_gate_)) {
    MPOE_CHECK(u.dim() == 2 && right.dim() == 4, "u must have 2 axes and right 4; got ", u.dim(), " and ", right.dim());
    check_same_device({&u, &gates, &index, &right, &left});
    MPOE_CHECK(
        index.size(0) == u.size(0) && gates.dim() == 2 && gates.size(0) == index.size(0) && gates.size(1) == index.size(1),
        "gates and top_k_index must be [", u.size(0), ", K]");
    const int64_t size = right.size(2);
    MPOE_CHECK(
        right.size(0) > 0 && size > 0 && right.size(3) == size && u.size(1) % size == 0 &&
            (right.size(1) == 1 || right.size(1) == u.size(1) / size),
        "right must be [E, G', b, b] with b a divisor of F = ", u.size(1), " and G' = 1 or F / b");
    check_blocks(left, "left");
    MPOE_CHECK(u_gate.has_value() == right_gate.has_value(), "right_gate must be given with u_gate, and only with it");
    if (u_gate.has_value()) {
      check_blocks(*right_gate, "right_gate");
      check_rows(*u_gate, "u_gate");
    }
    if (bias.has_value()) {
      check_same_device({&u, &*bias});
      MPOE_CHECK(
          bias->dim() == 2 && bias->size(0) == right.size(0) && bias->size(1) == u.size(1) &&
              bias->scalar_type() == u.scalar_type(),
          "bias must be [", right.size(0), ", ", u.size(1), "] of the dtype of u");
    }
    MPOE_CHECK(right.scalar_type() == u.scalar_type(), "right must have the dtype of u");
  }

  void check_blocks(const Tensor& blocks, const char* name) const {
    check_same_device({&u, &blocks});
    bool same = blocks.dim() == 4 && blocks.scalar_type() == u.scalar_type();
    for (int64_t axis = 0; same && axis < 4; ++axis) same = blocks.size(axis) == right.size(axis);
    MPOE_CHECK(same, name, " must have the shape of right and the dtype of u");
  }
  void check_rows(const Tensor& rows, const char* name) const {
    check_same_device({&u, &rows});
    MPOE_CHECK(
        rows.dim() == 2 && rows.size(0) == u.size(0) && rows.size(1) == u.size(1) && rows.scalar_type() == u.scalar_type(),
        name, " must be [", u.size(0), ", ", u.size(1), "] of the dtype of u");
  }
  void fill(HiddenInputs& in, const std::string& activation, bool tf32) const {
    in.dtype = kernel_dtype(u, "u");
    in.tf32 = tf32;
    in.tokens = counted(u.size(0), "the number of tokens");
    in.features = counted(u.size(1), "the number of hidden units");
    in.block = counted(right.size(2), "the size of a block");
    in.own = counted(right.size(1), "the number of groups");
    in.experts = counted(right.size(0), "the number of experts");
    in.top_k = counted(index.size(1), "top_k");
    in.activation = activation_of(activation);
    in.u = u.const_data_ptr();
    in.u_gate = data_of(u_gate);
    in.gates = gates.const_data_ptr<float>();
    in.index = index.const_data_ptr<int64_t>();
    in.right = right.const_data_ptr();
    in.right_gate = data_of(right_gate);
    in.left = left.const_data_ptr();
    in.bias = data_of(bias);
  }
};

Tensor hidden_experts_op(const Tensor& u, const Tensor& gates, const Tensor& top_k_index, const Tensor& right,
                         const Tensor& left, const Optional& bias, const Optional& u_gate, const Optional& right_gate,
                         std::string activation, bool tf32) {
  const OnDevice device(u);
  const Hidden tensors(u, gates, top_k_index, right, left, bias, u_gate, right_gate);
  HiddenForward in;
  tensors.fill(in, activation, tf32);
  Tensor out = torch::stable::new_empty(tensors.u, tensors.u.sizes());
  in.out = out.mutable_data_ptr();
  if (out.numel() > 0) hidden_forward(in, device.stream());
  return out;
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Gradients of u, gates, right, left, bias, u_gate, right_gate; empty if `need` is 0 or there is no such input.
Gradients hidden_experts_backward_op(const Tensor& grad, const Tensor& u, const Tensor& gates, const Tensor& top_k_index,
                                     const Tensor& right, const Tensor& left, const Optional& bias,
                                     const Optional& u_gate, const Optional& right_gate, std::string activation,
                                     std::vector<int64_t> need, bool tf32) {
  const OnDevice device(u);
  const Hidden tensors(u, gates, top_k_index, right, left, bias, u_gate, right_gate);
  MPOE_CHECK(need.size() == 7, "need must have 7 entries; got ", need.size());
  HiddenBackward in;
  tensors.fill(in, activation, tf32);
  const Tensor rows = dense(grad);
  tensors.check_rows(rows, "grad");
  in.grad = rows.const_data_ptr();
  const auto place = [&](const Tensor* like, std::size_t which, auto& address) {
    const bool wanted = like != nullptr && need[which] != 0;
    Tensor result = wanted ? torch::stable::new_empty(*like, like->sizes()) : torch::stable::new_empty(tensors.u, {0});
    if (wanted) address = static_cast<std::remove_reference_t<decltype(address)>>(result.mutable_data_ptr());
    return result;
  };
  const auto given = [](const Optional& tensor) { return tensor.has_value() ? &*tensor : nullptr; };
  Tensor du = place(&tensors.u, 0, in.du), dgates = place(&tensors.gates, 1, in.dgates);
  Tensor dright = place(&tensors.right, 2, in.dright), dleft = place(&tensors.left, 3, in.dleft);
  Tensor dbias = place(given(tensors.bias), 4, in.dbias), du_gate = place(given(tensors.u_gate), 5, in.du_gate);
  Tensor dright_gate = place(given(tensors.right_gate), 6, in.dright_gate);
  const Scratch scratch(tensors.u, workspace_bytes(in));
  hidden_backward(in, scratch.data(), device.stream());
  return {du, need[1] != 0 ? cast(dgates, gates.scalar_type()) : dgates, dright, dleft, dbias, du_gate, dright_gate};
}

}  // namespace
}  // namespace mpoe::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(MPOE_CUDA_OPS, m) {
  m.def(
      "hidden_experts(Tensor u, Tensor gates, Tensor top_k_index, Tensor right, Tensor left, Tensor? bias, "
      "Tensor? u_gate, Tensor? right_gate, str activation, bool tf32) -> Tensor");
  m.def(
      "hidden_experts_backward(Tensor grad, Tensor u, Tensor gates, Tensor top_k_index, Tensor right, Tensor left, "
      "Tensor? bias, Tensor? u_gate, Tensor? right_gate, str activation, int[] need, bool tf32) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(MPOE_CUDA_OPS, MPOE_CUDA_KEY, m) {
  m.impl("hidden_experts", TORCH_BOX(&mpoe::cuda::hidden_experts_op));
  m.impl("hidden_experts_backward", TORCH_BOX(&mpoe::cuda::hidden_experts_backward_op));
}
