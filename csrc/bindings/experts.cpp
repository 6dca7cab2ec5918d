// The kernels of cpu/experts/experts.h for both forms of experts, as Python's hidden_experts and
// neuron_experts: forward, backward, and the forward of tokens that are not routed yet.
#include "cpu/experts/experts.h"

#include "bindings/router.h"
#include "common/buffer.h"

namespace mpoe {
namespace {

void check(const HiddenExperts& in) {
  require(in.block > 0 && in.features % in.block == 0,
          "right must have blocks that divide ",
          in.features);
  require(
      in.shared() || in.own_groups == in.groups(), "right must have 1 or ", in.groups(), " groups");
  // An empty x_gate has no address.
  require(in.tokens == 0 || in.gated() == (in.x_gate != nullptr),
          "right_gate must be given with u_gate");
}

void check(const NeuronExperts&) {}

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
  const Dtype type = gemm_dtype_named(dtype);
  const Activation function = activation_named(activation);
  const auto [tokens, experts, top_k] = counts;
  const auto [x, gates, index, right, left, bias, x_gate, right_gate] = inputs;
  const Form in{{type,
                 function,
                 tokens,
                 experts,
                 top_k,
                 x,
                 gates,
                 index,
                 right,
                 left,
                 bias,
                 x_gate,
                 right_gate},
                sizes[0],
                sizes[1],
                sizes[2]};
  check(in);
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
// given. scale: of the gates, whose kind `raw` tells as in bound_gating (router.cpp). mask: bool
// [tokens] or none: the tokens that have experts.
template <class Form>
void routed(std::string_view dtype,
            std::string_view activation,
            const Sizes<3>& counts,
            const Sizes<3>& sizes,
            const Addresses<8>& inputs,
            std::string_view x_dtype,
            std::string_view weight_dtype,
            int64_t features,
            bool raw,
            float scale,
            const Addresses<4>& router_inputs,
            Address out) {
  Form in = checked_experts<Form>(dtype, activation, counts, sizes, inputs);
  const auto [router_x, weight, mask, given_logits] = router_inputs;
  const Router router =
      checked_router(x_dtype, weight_dtype, {in.tokens, features, in.experts}, router_x, weight);
  require_top_k(in.top_k, in.experts);
  const int64_t pairs = in.tokens * in.top_k;
  Buffer<float> own_logits, own_gates;
  Buffer<int64_t> own_index;
  float* logits = given_logits;
  float* gates = inputs[1];
  int64_t* index = inputs[2];
  if (logits == nullptr) {
    own_logits = Buffer<float>(in.tokens * in.experts);
    own_gates = Buffer<float>(pairs);
    own_index = Buffer<int64_t>(pairs);
    logits = own_logits.get();
    gates = own_gates.get();
    index = own_index.get();
  }
  gating({router, in.top_k, raw, logits, index, gates});
  const bool* const has_experts = mask;
  for (int64_t s = 0; s < pairs; ++s) {
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
