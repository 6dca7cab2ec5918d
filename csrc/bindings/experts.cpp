// The kernels of cpu/experts/experts.h for both forms of experts, as Python's hidden_experts and
// neuron_experts: forward, backward, and the forward of tokens that are not routed yet.
#include "cpu/experts/experts.h"

#include "bindings/router.h"
#include "common/buffer.h"

namespace mpoe {
namespace {

void set_sizes(HiddenExperts& in, const Sizes<3>& sizes) {
  const auto [features, block, own_groups] = sizes;
  require(block > 0 && features % block == 0, "right must have blocks that divide ", features);
  in.features = features;
  in.block = block;
  in.own_groups = own_groups;
  require(
      in.shared() || own_groups == in.groups(), "right must have 1 or ", in.groups(), " groups");
  // An empty x_gate has no address.
  require(in.tokens == 0 || in.gated() == (in.x_gate != nullptr),
          "right_gate must be given with u_gate");
}

void set_sizes(NeuronExperts& in, const Sizes<3>& sizes) {
  in.in_features = sizes[0];
  in.out_features = sizes[1];
  in.neurons = sizes[2];
}

// dtype: of everything except the gates; counts: tokens, experts, top_k; sizes: features, block and
// own_groups of hidden-side experts; in_features, out_features and neurons of neurons. inputs: x,
// gates float32 [tokens, top_k], index int64 [tokens, top_k], right, left, bias or none, x_gate and
// right_gate or none.
template <class Form>
Form checked_experts(std::string_view dtype,
                     std::string_view activation,
                     const Sizes<3>& counts,
                     const Sizes<3>& sizes,
                     const Addresses<8>& inputs) {
  Form in{};
  in.dtype = dtype_named(dtype);
  require(in.dtype == Dtype::kFloat32 || in.dtype == Dtype::kBFloat16,
          "x must be float32 or bfloat16; got ",
          dtype);
  in.activation = activation_named(activation);
  in.tokens = counts[0];
  in.experts = counts[1];
  in.top_k = counts[2];
  in.x = inputs[0];
  in.gates = inputs[1];
  in.index = inputs[2];
  in.right = inputs[3];
  in.left = inputs[4];
  in.bias = inputs[5];
  in.x_gate = inputs[6];
  in.right_gate = inputs[7];
  set_sizes(in, sizes);
  return in;
}

void require_experts(const Experts& in) {
  require_range(in.index, in.tokens * in.top_k, -1, in.experts - 1, "top_k_index");
}

// out: [tokens, features] or [tokens, out_features]; of hidden-side experts it may be x.
template <class Form>
void forward(std::string_view dtype,
             std::string_view activation,
             const Sizes<3>& counts,
             const Sizes<3>& sizes,
             const Addresses<8>& inputs,
             Address out) {
  const Form in = checked_experts<Form>(dtype, activation, counts, sizes, inputs);
  require_experts(in);
  experts_forward(in, out);
}

// grad: like out. results: like x, gates, right, left, bias, x_gate and right_gate; none: not
// wanted.
template <class Form>
void backward(std::string_view dtype,
              std::string_view activation,
              const Sizes<3>& counts,
              const Sizes<3>& sizes,
              const Addresses<8>& inputs,
              Address grad,
              const Addresses<7>& results) {
  const Form in = checked_experts<Form>(dtype, activation, counts, sizes, inputs);
  require_experts(in);
  const auto [dx, dgates, dright, dleft, dbias, dx_gate, dright_gate] = results;
  experts_backward(in, grad, {dx, dgates, dright, dleft, dbias, dx_gate, dright_gate});
}

// `forward` after a router has chosen the experts: it reads router_x [tokens, features] and weight
// [experts, features], and writes logits, gates and index, or memory of its own where they are not
// given. scale: of the gates, whose kind `raw` tells as in checked_gating. mask: bool [tokens] or
// none: the tokens that have experts.
template <class Form>
void routed(std::string_view dtype,
            std::string_view activation,
            const Sizes<3>& counts,
            const Sizes<3>& sizes,
            const Addresses<8>& inputs,
            std::string_view x_dtype,
            std::string_view weight_dtype,
            std::int64_t features,
            bool raw,
            float scale,
            const Addresses<4>& router_inputs,
            Address out) {
  Form in = checked_experts<Form>(dtype, activation, counts, sizes, inputs);
  const auto [router_x, weight, mask, given_logits] = router_inputs;
  const Router router =
      checked_router(x_dtype, weight_dtype, {in.tokens, features, in.experts}, router_x, weight);
  const std::int64_t pairs = in.tokens * in.top_k;
  Buffer<float> own_logits, own_gates;
  Buffer<std::int64_t> own_index;
  float* logits = given_logits;
  float* gates = inputs[1];
  std::int64_t* index = inputs[2];
  if (logits == nullptr) {
    own_logits = Buffer<float>(in.tokens * in.experts);
    own_gates = Buffer<float>(pairs);
    own_index = Buffer<std::int64_t>(pairs);
    logits = own_logits.get();
    gates = own_gates.get();
    index = own_index.get();
  }
  gating(checked_gating(router, in.top_k, raw, logits, index, gates));
  const bool* const has_experts = mask;
  for (std::int64_t s = 0; s < pairs; ++s) {
    gates[s] *= scale;
    if (mask.is_given() && !has_experts[s / in.top_k])
      index[s] = -1;
  }
  in.gates = gates;
  in.index = index;
  experts_forward(in, out);
}

template <class Form>
void bind_form(pybind11::module_& module, const std::string& name) {
  module.def(name.c_str(), forward<Form>, WithoutGil());
  module.def((name + "_backward").c_str(), backward<Form>, WithoutGil());
  module.def(("routed_" + name).c_str(), routed<Form>, WithoutGil());
}

}  // namespace

void bind_experts(pybind11::module_& module) {
  bind_form<HiddenExperts>(module, "hidden_experts");
  bind_form<NeuronExperts>(module, "neuron_experts");
}

}  // namespace mpoe
