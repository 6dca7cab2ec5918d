// mpoe_linear_forward and mpoe_linear_backward: checks, and the kernels of cpu/linear/linear.h.
#include <cstring>

#include "cpu/linear/linear.h"
#include "refusal.h"

namespace {

using namespace mpoe;

struct StrategyKernels {
  const char* name;
  void (*forward)(const LinearForward&);
  void (*backward)(const LinearBackward&);
};
constexpr StrategyKernels kStrategies[] = {
    {"separable", separable_forward, separable_backward},
    {"rebuild", rebuild_forward, rebuild_backward},
    {"half_left", half_left_forward, half_left_backward},
    {"half_right", half_right_forward, half_right_backward},
    {"chain", chain_forward, chain_backward},
};

bool is_separable(const MpoeLinear& call) { return std::strcmp(call.strategy, "separable") == 0; }

const StrategyKernels& kernels_of(const MpoeLinear& call) {
  for (const StrategyKernels& kernels : kStrategies) {
    if (std::strcmp(call.strategy, kernels.name) != 0) continue;
    require(!is_separable(call) || (call.jL == 1 && call.iR == 1), "strategy separable needs blocks with jL = iR = 1");
    return kernels;
  }
  refuse("no native kernel for strategy ", call.strategy);
}

ProductOrder checked_order(const MpoeLinear& call) {
  const std::int64_t operands[] = {call.chain_first, call.chain_second, call.chain_third};
  ProductOrder order{};
  int met = 0;
  for (int s = 0; s < 3; ++s) {
    require(operands[s] >= 0 && operands[s] <= 2, "an operand of the chain must be 0, 1 or 2; got ", operands[s]);
    order.chain[s] = static_cast<Operand>(operands[s]);
    met |= 1 << operands[s];
  }
  require(met == 7, "the chain must meet left, central and right once each");
  order.half_first = call.half_first != 0;
  order.transposed_half_first = call.transposed_half_first != 0;
  return order;
}

// What the forward and the backward share; `offsets` must outlive it.
LinearInputs checked_inputs(const MpoeLinear& call, const std::vector<std::int64_t>& offsets) {
  LinearInputs in{};
  in.dtype = dtype_named(call.dtype);
  require(in.dtype == Dtype::kFloat32 || in.dtype == Dtype::kBFloat16, "x must be float32 or bfloat16; got ", call.dtype);
  in.activation = activation_named(call.activation);
  in.dims = {call.iL, call.jL, call.a,  call.iC,          call.jC,
             call.b,  call.iR, call.jR, call.in_features, call.out_features};
  require(call.in_features >= 1 && call.out_features >= 1, "in_features and out_features must be positive");
  require(
      in.dims.padded_in() >= call.in_features && in.dims.padded_out() >= call.out_features,
      "blocks are smaller than the weight: they give ", in.dims.padded_in(), " x ", in.dims.padded_out(), ", wanted are ",
      call.in_features, " x ", call.out_features);
  in.order = checked_order(call);
  in.x = call.x;
  in.tokens = call.tokens;
  in.left = call.left;
  in.central = call.central;
  in.right = call.right;
  in.experts = call.experts;
  in.offsets = offsets.data();
  in.slots = call.slots;
  in.row_index = call.rows;
  if (call.rows == nullptr)
    require(call.slots == call.tokens, "without row_index there must be as many slots as rows of x");
  else
    require_range(call.rows, call.slots, 0, call.tokens - 1, "row_index");
  return in;
}

}  // namespace

extern "C" {

int mpoe_linear_forward(const MpoeLinear* call) {
  return answered([&] {
    const auto offsets = checked_offsets(call->offsets, call->offset_bytes, call->experts, call->slots);
    LinearForward in{};
    static_cast<LinearInputs&>(in) = checked_inputs(*call, offsets);
    const StrategyKernels& kernels = kernels_of(*call);
    require(call->h == nullptr || is_separable(*call), "only strategy separable saves its central step");
    in.bias = call->bias;
    in.y = call->y;
    in.h = call->h;
    in.saved = call->z;
    kernels.forward(in);
  });
}

int mpoe_linear_backward(const MpoeLinear* call) {
  return answered([&] {
    const auto offsets = checked_offsets(call->offsets, call->offset_bytes, call->experts, call->slots);
    LinearBackward in{};
    static_cast<LinearInputs&>(in) = checked_inputs(*call, offsets);
    const StrategyKernels& kernels = kernels_of(*call);
    in.grad = call->grad;
    if (in.activation != Activation::kNone) in.saved = call->kept_value;
    if (is_separable(*call)) in.h = call->kept_h;
    in.dx = call->dx;
    in.dleft = call->dleft;
    in.dcentral = call->dcentral;
    in.dright = call->dright;
    in.dbias = call->dbias;
    kernels.backward(in);
  });
}

}  // extern "C"
