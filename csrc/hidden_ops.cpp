// mpoe_native::hidden_experts and its gradient: checks, allocation, and the kernels of cpu/hidden_experts.h.
#include <string>
#include <tuple>

#include "binding.h"
#include "cpu/hidden_experts.h"
#include "cpu/routing.h"

namespace {

using namespace mpoe;

Activation activation_named(const std::string& name) {
  if (name == "none") return Activation::kNone;
  if (name == "relu") return Activation::kRelu;
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_tanh" || name == "gelu_new") return Activation::kGeluTanh;
  MPOE_CHECK(name == "silu", "no native activation ", name);
  return Activation::kSilu;
}

// Dense arguments, kept alive beside the pointers into them.
struct Operands {
  Tensor u, gates, index, right, left;
  std::optional<Tensor> bias, u_gate, right_gate;
  HiddenExperts in{};

  Operands(
      const Tensor& u_, const Tensor& gates_, const Tensor& index_, const Tensor& right_, const Tensor& left_,
      const std::optional<Tensor>& bias_, const std::optional<Tensor>& u_gate_,
      const std::optional<Tensor>& right_gate_, const std::string& activation)
      : u(dense(u_)), gates(dense(cast(gates_, ScalarType::Float))), index(dense_index(index_, 2, "top_k_index")),
        right(dense(right_)), left(dense(left_)) {
    MPOE_CHECK(u.dim() == 2 && right.dim() == 4 && left.dim() == 4, "u must have 2 axes, right and left 4");
    in.dtype = dtype_of(u, "u");
    MPOE_CHECK(in.dtype == Dtype::kFloat32 || in.dtype == Dtype::kBFloat16, "u must be float32 or bfloat16");
    in.tokens = u.size(0), in.features = u.size(1), in.top_k = index.size(1);
    in.experts = right.size(0), in.own_groups = right.size(1), in.block = right.size(2);
    MPOE_CHECK(in.block > 0 && in.features % in.block == 0, "right must have blocks that divide ", in.features);
    MPOE_CHECK(in.own_groups == 1 || in.own_groups == in.groups(), "right must have 1 or ", in.groups(), " groups");
    MPOE_CHECK(index.size(0) == in.tokens && gates.numel() == index.numel(), "gates and top_k_index must be [T, K]");
    const int64_t bad = first_outside(index.const_data_ptr<int64_t>(), index.numel(), -1, in.experts - 1);
    MPOE_CHECK(bad < 0, "top_k_index must lie in -1..", in.experts - 1);
    const int64_t numbers = in.experts * in.own_groups * in.block * in.block;
    const auto take = [&](const Tensor& tensor, int64_t size, const char* name) {
      MPOE_CHECK(
          tensor.numel() == size && tensor.scalar_type() == u.scalar_type(), name, " must have ", size,
          " elements of the dtype of u");
      return tensor.const_data_ptr();
    };
    in.activation = activation_named(activation);
    in.u = u.const_data_ptr();
    in.gates = gates.const_data_ptr<float>();
    in.index = index.const_data_ptr<int64_t>();
    in.right = take(right, numbers, "right");
    in.left = take(left, numbers, "left");
    if (bias_.has_value()) {
      bias = dense(*bias_);
      in.bias = take(*bias, in.experts * in.features, "bias");
    }
    if (u_gate_.has_value()) {
      MPOE_CHECK(right_gate_.has_value(), "right_gate must be given with u_gate");
      u_gate = dense(*u_gate_), right_gate = dense(*right_gate_);
      in.u_gate = take(*u_gate, u.numel(), "u_gate");
      in.right_gate = take(*right_gate, numbers, "right_gate");
    }
  }
};

Tensor hidden_forward_cpu(
    const Tensor& u, const Tensor& gates, const Tensor& index, const Tensor& right, const Tensor& left,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& u_gate, const std::optional<Tensor>& right_gate,
    std::string activation) {
  const Operands operands(u, gates, index, right, left, bias, u_gate, right_gate, activation);
  Tensor out = torch::stable::new_empty(u, u.sizes());
  hidden_experts(operands.in, out.mutable_data_ptr());
  return out;
}

// `need`: which of du, dgates, dright, dleft, dbias, du_gate, dright_gate (bit 0, 1, ...); the others come back empty.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> hidden_backward_cpu(
    const Tensor& grad, const Tensor& u, const Tensor& gates, const Tensor& index, const Tensor& right,
    const Tensor& left, const std::optional<Tensor>& bias, const std::optional<Tensor>& u_gate,
    const std::optional<Tensor>& right_gate, std::string activation, int64_t need) {
  const Operands operands(u, gates, index, right, left, bias, u_gate, right_gate, activation);
  MPOE_CHECK(
      grad.dim() == 2 && grad.size(0) == operands.in.tokens && grad.size(1) == operands.in.features &&
          grad.scalar_type() == u.scalar_type(),
      "grad must be like u");
  const Tensor dense_grad = dense(grad);
  int64_t bit = 1;
  const auto result = [&](const std::optional<Tensor>& like, bool exists) {
    const bool wanted = exists && (need & bit) != 0;
    bit <<= 1;
    return wanted ? torch::stable::new_empty(*like, like->sizes()) : torch::stable::new_empty(u, {0});
  };
  const auto data = [](Tensor& tensor) { return tensor.numel() == 0 ? nullptr : tensor.mutable_data_ptr(); };
  Tensor du = result(operands.u, true), dgates = result(operands.gates, true);
  Tensor dright = result(operands.right, true), dleft = result(operands.left, true);
  Tensor dbias = result(operands.bias, operands.bias.has_value());
  Tensor du_gate = result(operands.u_gate, operands.u_gate.has_value());
  Tensor dright_gate = result(operands.right_gate, operands.right_gate.has_value());
  hidden_experts_backward(
      operands.in, dense_grad.const_data_ptr(),
      {data(du), static_cast<float*>(data(dgates)), data(dright), data(dleft), data(dbias), data(du_gate),
       data(dright_gate)});
  return {du, dgates, dright, dleft, dbias, du_gate, dright_gate};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mpoe_native, m) {
  m.def(
      "hidden_experts(Tensor u, Tensor gates, Tensor top_k_index, Tensor right, Tensor left, Tensor? bias, "
      "Tensor? u_gate, Tensor? right_gate, str activation) -> Tensor");
  m.def(
      "hidden_experts_backward(Tensor grad, Tensor u, Tensor gates, Tensor top_k_index, Tensor right, Tensor left, "
      "Tensor? bias, Tensor? u_gate, Tensor? right_gate, str activation, int need) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(mpoe_native, CPU, m) {
  m.impl("hidden_experts", TORCH_BOX(&hidden_forward_cpu));
  m.impl("hidden_experts_backward", TORCH_BOX(&hidden_backward_cpu));
}
