// mpoe_neuron_experts and its gradient: checks, and the kernels of cpu/neurons/neurons.h.
#include "cpu/neurons/neurons.h"

#include "refusal.h"

namespace {

using namespace mpoe;

NeuronExperts checked_inputs(const MpoeNeurons& call) {
  NeuronExperts in{};
  in.dtype = dtype_named(call.dtype);
  require(in.dtype == Dtype::kFloat32 || in.dtype == Dtype::kBFloat16, "x must be float32 or bfloat16; got ", call.dtype);
  in.tokens = call.tokens;
  in.in_features = call.in_features;
  in.out_features = call.out_features;
  in.neurons = call.neurons;
  in.experts = call.experts;
  in.top_k = call.top_k;
  require_range(call.index, in.tokens * in.top_k, -1, in.experts - 1, "top_k_index");
  in.activation = activation_named(call.activation);
  in.x = call.x;
  in.gates = call.gates;
  in.index = call.index;
  in.up = call.up;
  in.down = call.down;
  in.bias = call.bias;
  in.gate_up = call.gate_up;
  return in;
}

}  // namespace

extern "C" {

int mpoe_neuron_experts(const MpoeNeurons* call) {
  return answered([&] { neuron_experts(checked_inputs(*call), call->out); });
}

int mpoe_neuron_experts_backward(const MpoeNeurons* call) {
  return answered([&] {
    neuron_experts_backward(
        checked_inputs(*call), call->grad,
        {call->dx, static_cast<float*>(call->dgates), call->dup, call->ddown, call->dbias, call->dgate_up});
  });
}

}  // extern "C"
