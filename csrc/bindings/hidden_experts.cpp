// hidden_experts, routed_hidden_experts and hidden_experts_backward: checks, and the kernels of
// cpu/hidden_experts/hidden_experts.h.
#include "cpu/hidden_experts/hidden_experts.h"

#include "bindings/router.h"

namespace mpoe {
namespace {

// dtype: of everything except the gates; sizes: tokens, features, block, experts, own_groups, top_k; inputs: u [tokens,
// features], u_gate like u or none, gates float32 [tokens, top_k], index int64 [tokens, top_k], right and left
// [experts, own_groups, block, block], right_gate like right with u_gate, bias [experts, features] or none.
HiddenExperts checked_inputs(
    std::string_view dtype, std::string_view activation, const Sizes<6>& sizes, const Addresses<8>& inputs) {
  const auto [tokens, features, block, experts, own_groups, top_k] = sizes;
  const auto [u, u_gate, gates, index, right, left, right_gate, bias] = inputs;
  const Dtype type = dtype_named(dtype);
  require(type == Dtype::kFloat32 || type == Dtype::kBFloat16, "u must be float32 or bfloat16; got ", dtype);
  require(block > 0 && features % block == 0, "right must have blocks that divide ", features);
  const HiddenExperts in{
      type, tokens, features, block, experts, own_groups, top_k, activation_named(activation), u,
      // An empty u_gate has no address: right_gate stands in for it, and none of its rows is read.
      tokens == 0 ? right_gate : u_gate, gates, index, right, left, right_gate, bias};
  require(own_groups == 1 || own_groups == in.groups(), "right must have 1 or ", in.groups(), " groups");
  require((in.u_gate == nullptr) == (in.right_gate == nullptr), "right_gate must be given with u_gate");
  return in;
}

void require_experts(const HiddenExperts& in) {
  require_range(in.index, in.tokens * in.top_k, -1, in.experts - 1, "top_k_index");
}

// out: like u; may be u.
void bound_hidden(
    std::string_view dtype, std::string_view activation, const Sizes<6>& sizes, const Addresses<8>& inputs,
    Address out) {
  const HiddenExperts in = checked_inputs(dtype, activation, sizes, inputs);
  require_experts(in);
  hidden_experts(in, out);
}

// The same, after a router of `router_features` has chosen the experts: it writes gates, index and, like `gating`,
// logits.
void bound_routed_hidden(
    std::string_view x_dtype, std::string_view weight_dtype, std::int64_t router_features, bool raw, Address x,
    Address weight, Address logits, std::string_view dtype, std::string_view activation, const Sizes<6>& sizes,
    const Addresses<8>& inputs, Address out) {
  const HiddenExperts in = checked_inputs(dtype, activation, sizes, inputs);
  const Router router = checked_router(x_dtype, weight_dtype, {in.tokens, router_features, in.experts}, x, weight);
  gating(checked_gating(router, in.top_k, raw, logits, inputs[3], inputs[2]));
  hidden_experts(in, out);
}

// grad: like u. results: like u, gates, right, left, bias, u_gate and right_gate; none: not wanted.
void bound_hidden_backward(
    std::string_view dtype, std::string_view activation, const Sizes<6>& sizes, const Addresses<8>& inputs,
    Address grad, const Addresses<7>& results) {
  const HiddenExperts in = checked_inputs(dtype, activation, sizes, inputs);
  require_experts(in);
  const auto [du, dgates, dright, dleft, dbias, du_gate, dright_gate] = results;
  hidden_experts_backward(in, grad, {du, dgates, dright, dleft, dbias, du_gate, dright_gate});
}

}  // namespace

void bind_hidden_experts(pybind11::module_& module) {
  module.def("hidden_experts", bound_hidden, WithoutGil());
  module.def("routed_hidden_experts", bound_routed_hidden, WithoutGil());
  module.def("hidden_experts_backward", bound_hidden_backward, WithoutGil());
}

}  // namespace mpoe
