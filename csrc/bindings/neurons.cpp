// neuron_experts and neuron_experts_backward: checks, and the kernels of cpu/neurons/neurons.h.
#include "cpu/neurons/neurons.h"

#include "bindings/bindings.h"

namespace mpoe {
namespace {

// dtype: of everything except the gates; sizes: tokens, in_features, out_features, neurons, experts, top_k; inputs: x
// [tokens, in_features], gates float32 [tokens, top_k], index int64 [tokens, top_k], up [experts, neurons, in_features],
// down [experts, neurons, out_features], bias [experts, neurons] or none, gate_up like up or none.
NeuronExperts checked_inputs(
    std::string_view dtype, std::string_view activation, const Sizes<6>& sizes, const Addresses<7>& inputs) {
  NeuronExperts in{};
  in.dtype = dtype_named(dtype);
  require(in.dtype == Dtype::kFloat32 || in.dtype == Dtype::kBFloat16, "x must be float32 or bfloat16; got ", dtype);
  const auto [tokens, in_features, out_features, neurons, experts, top_k] = sizes;
  in.tokens = tokens;
  in.in_features = in_features;
  in.out_features = out_features;
  in.neurons = neurons;
  in.experts = experts;
  in.top_k = top_k;
  in.activation = activation_named(activation);
  const auto [x, gates, index, up, down, bias, gate_up] = inputs;
  in.x = x;
  in.gates = gates;
  in.index = index;
  in.up = up;
  in.down = down;
  in.bias = bias;
  in.gate_up = gate_up;
  require_range(in.index, tokens * top_k, -1, experts - 1, "top_k_index");
  return in;
}

// out: [tokens, out_features].
void bound_forward(
    std::string_view dtype, std::string_view activation, const Sizes<6>& sizes, const Addresses<7>& inputs, Address out) {
  neuron_experts(checked_inputs(dtype, activation, sizes, inputs), out);
}

// grad: [tokens, out_features]. results: like x, gates, up, down, bias and gate_up; none: not wanted.
void bound_backward(
    std::string_view dtype, std::string_view activation, const Sizes<6>& sizes, const Addresses<7>& inputs, Address grad,
    const Addresses<6>& results) {
  const auto [dx, dgates, dup, ddown, dbias, dgate_up] = results;
  neuron_experts_backward(
      checked_inputs(dtype, activation, sizes, inputs), grad, {dx, dgates, dup, ddown, dbias, dgate_up});
}

}  // namespace

void bind_neurons(pybind11::module_& module) {
  module.def("neuron_experts", bound_forward, WithoutGil());
  module.def("neuron_experts_backward", bound_backward, WithoutGil());
}

}  // namespace mpoe
