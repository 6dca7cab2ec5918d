// mpoe_hidden_experts and its gradient: checks, and the kernels of cpu/hidden_experts/hidden_experts.h.
#include "cpu/hidden_experts/hidden_experts.h"

#include "refusal.h"

namespace {

using namespace mpoe;

HiddenExperts checked_inputs(const MpoeHidden& call) {
  HiddenExperts in{};
  in.dtype = dtype_named(call.dtype);
  require(in.dtype == Dtype::kFloat32 || in.dtype == Dtype::kBFloat16, "u must be float32 or bfloat16; got ", call.dtype);
  in.tokens = call.tokens;
  in.features = call.features;
  in.top_k = call.top_k;
  in.experts = call.experts;
  in.own_groups = call.own_groups;
  in.block = call.block;
  require(in.block > 0 && in.features % in.block == 0, "right must have blocks that divide ", in.features);
  require(in.own_groups == 1 || in.own_groups == in.groups(), "right must have 1 or ", in.groups(), " groups");
  require_range(call.index, in.tokens * in.top_k, -1, in.experts - 1, "top_k_index");
  // An empty u_gate has a null pointer: right_gate stands in for it, and none of its rows is read.
  in.u_gate = call.tokens == 0 ? call.right_gate : call.u_gate;
  require((in.u_gate == nullptr) == (call.right_gate == nullptr), "right_gate must be given with u_gate");
  in.activation = activation_named(call.activation);
  in.u = call.u;
  in.gates = call.gates;
  in.index = call.index;
  in.right = call.right;
  in.left = call.left;
  in.right_gate = call.right_gate;
  in.bias = call.bias;
  return in;
}

}  // namespace

extern "C" {

int mpoe_hidden_experts(const MpoeHidden* call) {
  return answered([&] { hidden_experts(checked_inputs(*call), call->out); });
}

int mpoe_routed_hidden_experts(const MpoeRouter* router, const MpoeHidden* call) {
  return answered([&] {
    const Gating choice = checked_gating(*router);
    require(
        call->tokens == choice.router.tokens && call->top_k == choice.top_k && call->experts == choice.router.experts &&
            call->gates == choice.gates && call->index == choice.index,
        "the router's gates and index must be those of the experts");
    gating(choice);
    hidden_experts(checked_inputs(*call), call->out);
  });
}

int mpoe_hidden_experts_backward(const MpoeHidden* call) {
  return answered([&] {
    hidden_experts_backward(
        checked_inputs(*call), call->grad,
        {call->du, static_cast<float*>(call->dgates), call->dright, call->dleft, call->dbias, call->du_gate,
         call->dright_gate});
  });
}

}  // extern "C"
