// neuron_experts, neuron_experts_backward and routed_neurons: checks, and the kernels of cpu/neurons/neurons.h.
#include "cpu/neurons/neurons.h"

#include "bindings/router.h"
#include "common/buffer.h"

namespace mpoe {
namespace {

// dtype: of everything except the gates; sizes: tokens, in_features, out_features, neurons, experts, top_k; network: x
// [tokens, in_features], up [experts, neurons, in_features], down [experts, neurons, out_features], bias [experts,
// neurons] or none, gate_up like up or none; gates: float32 [tokens, top_k]; index: int64 [tokens, top_k].
NeuronExperts checked_inputs(
    std::string_view dtype, std::string_view activation, const Sizes<6>& sizes, const Addresses<5>& network,
    const float* gates, const std::int64_t* index) {
  const auto [tokens, in_features, out_features, neurons, experts, top_k] = sizes;
  const auto [x, up, down, bias, gate_up] = network;
  const Dtype type = dtype_named(dtype);
  require(type == Dtype::kFloat32 || type == Dtype::kBFloat16, "x must be float32 or bfloat16; got ", dtype);
  const Activation function = activation_named(activation);
  require_range(index, tokens * top_k, -1, experts - 1, "top_k_index");
  return {type, tokens, in_features, out_features, neurons, experts, top_k, function, x,
          gates, index, up, down, bias, gate_up};
}

// out: [tokens, out_features].
void bound_neurons(
    std::string_view dtype, std::string_view activation, const Sizes<6>& sizes, const Addresses<5>& network,
    Address gates, Address index, Address out) {
  neuron_experts(checked_inputs(dtype, activation, sizes, network, gates, index), out);
}

// grad: [tokens, out_features]. results: like x, gates, up, down, bias and gate_up; none: not wanted.
void bound_neurons_backward(
    std::string_view dtype, std::string_view activation, const Sizes<6>& sizes, const Addresses<5>& network,
    Address gates, Address index, Address grad, const Addresses<6>& results) {
  const auto [dx, dgates, dup, ddown, dbias, dgate_up] = results;
  neuron_experts_backward(
      checked_inputs(dtype, activation, sizes, network, gates, index), grad,
      {dx, dgates, dup, ddown, dbias, dgate_up});
}

// The forward of tokens that are not routed yet. routed: the router's x [tokens, features] and weight [experts,
// features], of weight_dtype, and a mask bool [tokens] or none, of tokens that have experts; raw: as in checked_gating;
// scale: of the gates.
void routed_neurons(
    std::string_view dtype, std::string_view weight_dtype, std::string_view activation, const Sizes<6>& sizes,
    std::int64_t features, bool raw, float scale, const Addresses<3>& routed, const Addresses<5>& network,
    Address out) {
  const std::int64_t tokens = sizes[0], experts = sizes[4], top_k = sizes[5];
  const auto [x, weight, mask] = routed;
  const bool* const has_experts = mask;
  Buffer<float> logits(tokens * experts), gates(tokens * top_k);
  Buffer<std::int64_t> index(tokens * top_k);
  const Router router = checked_router(dtype, weight_dtype, {tokens, features, experts}, x, weight);
  gating(checked_gating(router, top_k, raw, logits.get(), index.get(), gates.get()));
  for (std::int64_t s = 0; s < tokens * top_k; ++s) {
    gates.get()[s] *= scale;
    if (mask.is_given() && !has_experts[s / top_k]) index.get()[s] = -1;
  }
  neuron_experts(checked_inputs(dtype, activation, sizes, network, gates.get(), index.get()), out);
}

}  // namespace

void bind_neurons(pybind11::module_& module) {
  module.def("neuron_experts", bound_neurons, WithoutGil());
  module.def("neuron_experts_backward", bound_neurons_backward, WithoutGil());
  module.def("routed_neurons", routed_neurons, WithoutGil());
}

}  // namespace mpoe
