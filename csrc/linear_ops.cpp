// mpoe_native::linear_forward and linear_backward: checks, allocation, and the kernels of cpu/linear.h.
#include <string>
#include <tuple>

#include "binding.h"
#include "cpu/linear.h"
#include "cpu/routing.h"

namespace {

using namespace mpoe;

Activation activation_of(const std::string& name) {
  if (name == "none") return Activation::kNone;
  if (name == "relu") return Activation::kRelu;
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  if (name == "silu") return Activation::kSilu;
  MPOE_CHECK(false, "unknown activation ", name);
}

// Dense tensors behind a LinearInputs; must outlive it.
struct Operands {
  Tensor x, left, central, right, offsets;
  std::optional<Tensor> row_index;
  std::vector<int64_t> values;

  Operands(
      const Tensor& x_, const Tensor& left_, const Tensor& central_, const Tensor& right_, const Tensor& offsets_,
      const std::optional<Tensor>& row_index_)
      : x(dense(x_)), left(dense(left_)), central(dense(central_)), right(dense(right_)),
        offsets(dense_index(offsets_, 1, "expert_offsets")) {
    if (row_index_.has_value()) row_index = dense_index(*row_index_, 1, "row_index");
  }

  LinearInputs inputs(int64_t in_features, int64_t out_features, const std::string& activation) const {
    MPOE_CHECK(x.dim() == 2 && x.size(1) == in_features, "x must be [T, ", in_features, "]");
    MPOE_CHECK(
        left.dim() == 4 && central.dim() == 4 && right.dim() == 4 && left.size(3) == central.size(0) &&
            central.size(3) == right.size(1) && left.size(0) == right.size(0),
        "blocks must be left [E, iL, jL, a], central [a, iC, jC, b], right [E, b, iR, jR]");
    const Dtype dtype = dtype_of(x, "x");
    MPOE_CHECK(dtype == Dtype::kFloat32 || dtype == Dtype::kBFloat16, "x must be float32 or bfloat16");
    for (const Tensor* block : {&left, &central, &right})
      MPOE_CHECK(block->scalar_type() == x.scalar_type(), "blocks must have the dtype of x");
    for (const Tensor* block : {&left, &central, &right})
      for (int64_t axis = 0; axis < 4; ++axis) MPOE_CHECK(block->size(axis) > 0, "blocks must not have an axis of size 0");
    MPOE_CHECK(in_features > 0 && out_features > 0, "in_features and out_features must be positive");
    LinearInputs in{};
    in.dtype = dtype;
    in.dims = {left.size(1),  left.size(2),  left.size(3), central.size(1), central.size(2),
               central.size(3), right.size(2), right.size(3), in_features,    out_features};
    MPOE_CHECK(
        in.dims.padded_in() >= in_features && in.dims.padded_out() >= out_features, "blocks are smaller than the weight");
    in.x = x.const_data_ptr();
    in.tokens = x.size(0);
    in.left = left.const_data_ptr();
    in.central = central.const_data_ptr();
    in.right = right.const_data_ptr();
    in.experts = left.size(0);
    in.slots = row_index.has_value() ? row_index->size(0) : x.size(0);
    MPOE_CHECK(offsets.size(0) == in.experts + 1, "expert_offsets must be [", in.experts + 1, "]");
    in.offsets = offsets.const_data_ptr<int64_t>();
    int64_t before = 0;
    for (int64_t e = 0; e <= in.experts; ++e) {
      const int64_t offset = in.offsets[e];
      MPOE_CHECK(
          offset >= before && offset <= in.slots && (e > 0 || offset == 0),
          "expert_offsets must start at 0, not fall, and end at ", in.slots, " at most; got ", offset);
      before = offset;
    }
    if (row_index.has_value()) {
      in.row_index = row_index->const_data_ptr<int64_t>();
      const int64_t bad = first_outside(in.row_index, in.slots, 0, in.tokens - 1);
      MPOE_CHECK(bad < 0, "row_index must lie in 0..", in.tokens - 1, "; got ", in.row_index[bad]);
    }
    in.activation = activation_of(activation);
    return in;
  }
};

// What exists. Null: not yet.
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

const StrategyKernels& kernels_of(const std::string& strategy, const BlockDims& dims) {
  for (const StrategyKernels& kernels : kStrategies) {
    if (strategy != kernels.name) continue;
    MPOE_CHECK(
        strategy != "separable" || (dims.jL == 1 && dims.iR == 1), "strategy separable needs blocks with jL = iR = 1");
    return kernels;
  }
  MPOE_CHECK(false, "no native kernel for strategy ", strategy);
}

std::tuple<Tensor, Tensor, Tensor> linear_forward_cpu(
    const Tensor& x, const Tensor& left, const Tensor& central, const Tensor& right, const Tensor& expert_offsets,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& row_index, int64_t in_features,
    int64_t out_features, std::string activation, std::string strategy, bool save_h, bool save_z) {
  const Operands operands(x, left, central, right, expert_offsets, row_index);
  LinearForward in{};
  static_cast<LinearInputs&>(in) = operands.inputs(in_features, out_features, activation);
  const StrategyKernels& kernels = kernels_of(strategy, in.dims);
  MPOE_CHECK(kernels.forward != nullptr, "no native forward for strategy ", strategy);
  MPOE_CHECK(!save_h || strategy == "separable", "only strategy separable saves its central step");
  std::optional<Tensor> dense_bias;
  if (bias.has_value()) {
    MPOE_CHECK(
        bias->dim() == 1 && bias->size(0) == out_features && bias->scalar_type() == x.scalar_type(), "bias must be [",
        out_features, "] of the dtype of x");
    dense_bias = dense(*bias);
    in.bias = dense_bias->const_data_ptr();
  }
  Tensor y = torch::stable::new_empty(x, {in.slots, out_features});
  Tensor h = torch::stable::new_empty(x, {save_h ? in.slots * in.dims.jC : 0, in.dims.b});
  Tensor z = torch::stable::new_empty(x, {save_z ? in.slots : 0, out_features});
  in.y = y.mutable_data_ptr();
  in.h = save_h ? h.mutable_data_ptr() : nullptr;
  in.saved = save_z ? z.mutable_data_ptr() : nullptr;
  kernels.forward(in);
  return {y, h, z};
}

// `need`: which of dx, dleft, dcentral, dright, dbias; the others come back with no elements.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_backward_cpu(
    const Tensor& grad, const Tensor& x, const Tensor& left, const Tensor& central, const Tensor& right,
    const Tensor& expert_offsets, const std::optional<Tensor>& row_index, const Tensor& h, const Tensor& saved,
    int64_t in_features, int64_t out_features, std::string activation, std::string strategy, bool need_x,
    bool need_left, bool need_central, bool need_right, bool need_bias) {
  const Operands operands(x, left, central, right, expert_offsets, row_index);
  LinearBackward in{};
  static_cast<LinearInputs&>(in) = operands.inputs(in_features, out_features, activation);
  const StrategyKernels& kernels = kernels_of(strategy, in.dims);
  MPOE_CHECK(kernels.backward != nullptr, "no native backward for strategy ", strategy);
  const auto check_rows = [&](const Tensor& rows, const char* name) {
    MPOE_CHECK(
        rows.dim() == 2 && rows.size(0) == in.slots && rows.size(1) == out_features &&
            rows.scalar_type() == x.scalar_type(),
        name, " must be [", in.slots, ", ", out_features, "] of the dtype of x");
  };
  check_rows(grad, "grad");
  const Tensor dense_grad = dense(grad), dense_saved = dense(saved), dense_h = dense(h);
  in.grad = dense_grad.const_data_ptr();
  if (in.activation != Activation::kNone) {
    check_rows(saved, "saved");
    in.saved = dense_saved.const_data_ptr();
  }
  if (strategy == "separable") {
    MPOE_CHECK(
        h.numel() == in.slots * in.dims.jC * in.dims.b && h.scalar_type() == x.scalar_type(), "h must be [",
        in.slots * in.dims.jC, ", ", in.dims.b, "] of the dtype of x");
    in.h = dense_h.const_data_ptr();
  }
  const auto result = [&](bool needed, const Tensor& like, void*& data) {
    Tensor out = needed ? torch::stable::new_empty(like, like.sizes()) : torch::stable::new_empty(x, {0});
    data = needed ? out.mutable_data_ptr() : nullptr;
    return out;
  };
  Tensor dx = result(need_x, operands.x, in.dx);
  Tensor dleft = result(need_left, operands.left, in.dleft);
  Tensor dcentral = result(need_central, operands.central, in.dcentral);
  Tensor dright = result(need_right, operands.right, in.dright);
  Tensor dbias = torch::stable::new_empty(x, {need_bias ? out_features : 0});
  in.dbias = need_bias ? dbias.mutable_data_ptr() : nullptr;
  kernels.backward(in);
  return {dx, dleft, dcentral, dright, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mpoe_native, m) {
  m.def(
      "linear_forward(Tensor x, Tensor left, Tensor central, Tensor right, Tensor expert_offsets, Tensor? bias, "
      "Tensor? row_index, int in_features, int out_features, str activation, str strategy, bool save_h, bool save_z) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "linear_backward(Tensor grad, Tensor x, Tensor left, Tensor central, Tensor right, Tensor expert_offsets, "
      "Tensor? row_index, Tensor h, Tensor saved, int in_features, int out_features, str activation, str strategy, "
      "bool need_x, bool need_left, bool need_central, bool need_right, bool need_bias) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(mpoe_native, CPU, m) {
  m.impl("linear_forward", TORCH_BOX(&linear_forward_cpu));
  m.impl("linear_backward", TORCH_BOX(&linear_backward_cpu));
}
