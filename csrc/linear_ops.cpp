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
  STD_TORCH_CHECK(false, "unknown activation ", name);
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
    STD_TORCH_CHECK(x.dim() == 2 && x.size(1) == in_features, "x must be [T, ", in_features, "]");
    STD_TORCH_CHECK(
        left.dim() == 4 && central.dim() == 4 && right.dim() == 4 && left.size(3) == central.size(0) &&
            central.size(3) == right.size(1) && left.size(0) == right.size(0),
        "blocks must be left [E, iL, jL, a], central [a, iC, jC, b], right [E, b, iR, jR]");
    const Dtype dtype = dtype_of(x, "x");
    STD_TORCH_CHECK(dtype == Dtype::kFloat32 || dtype == Dtype::kBFloat16, "x must be float32 or bfloat16");
    for (const Tensor* block : {&left, &central, &right})
      STD_TORCH_CHECK(block->scalar_type() == x.scalar_type(), "blocks must have the dtype of x");
    LinearInputs in{};
    in.dtype = dtype;
    in.dims = {left.size(1),  left.size(2),  left.size(3), central.size(1), central.size(2),
               central.size(3), right.size(2), right.size(3), in_features,    out_features};
    STD_TORCH_CHECK(
        in.dims.padded_in() >= in_features && in.dims.padded_out() >= out_features, "blocks are smaller than the weight");
    in.x = x.const_data_ptr();
    in.tokens = x.size(0);
    in.left = left.const_data_ptr();
    in.central = central.const_data_ptr();
    in.right = right.const_data_ptr();
    in.experts = left.size(0);
    in.slots = row_index.has_value() ? row_index->size(0) : x.size(0);
    STD_TORCH_CHECK(offsets.size(0) == in.experts + 1, "expert_offsets must be [", in.experts + 1, "]");
    in.offsets = offsets.const_data_ptr<int64_t>();
    int64_t before = 0;
    for (int64_t e = 0; e <= in.experts; ++e) {
      STD_TORCH_CHECK(
          in.offsets[e] >= before && in.offsets[e] <= in.slots,
          "expert_offsets must be non-decreasing and at most ", in.slots, "; got ", in.offsets[e]);
      before = in.offsets[e];
    }
    STD_TORCH_CHECK(in.offsets[0] == 0, "expert_offsets must start at 0; got ", in.offsets[0]);
    if (row_index.has_value()) {
      in.row_index = row_index->const_data_ptr<int64_t>();
      const int64_t bad = first_outside(in.row_index, in.slots, 0, in.tokens - 1);
      STD_TORCH_CHECK(bad < 0, "row_index must lie in 0..", in.tokens - 1, "; got ", in.row_index[bad]);
    }
    in.activation = activation_of(activation);
    return in;
  }
};

bool is_separable(const BlockDims& d) { return d.jL == 1 && d.iR == 1; }

std::tuple<Tensor, Tensor, Tensor> linear_forward_cpu(
    const Tensor& x, const Tensor& left, const Tensor& central, const Tensor& right, const Tensor& expert_offsets,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& row_index, int64_t in_features,
    int64_t out_features, std::string activation, std::string strategy, bool save_h, bool save_z) {
  const Operands operands(x, left, central, right, expert_offsets, row_index);
  LinearForward in{operands.inputs(in_features, out_features, activation)};
  std::optional<Tensor> dense_bias;
  if (bias.has_value()) {
    dense_bias = dense(*bias);
    STD_TORCH_CHECK(
        bias->dim() == 1 && bias->size(0) == out_features && bias->scalar_type() == x.scalar_type(), "bias must be [",
        out_features, "] of the dtype of x");
    in.bias = dense_bias->const_data_ptr();
  }
  Tensor y = torch::stable::new_empty(x, {in.slots, out_features});
  Tensor h = torch::stable::new_empty(x, {save_h ? in.slots * in.dims.jC : 0, save_h ? in.dims.b : 0});
  Tensor z = torch::stable::new_empty(x, {save_z ? in.slots : 0, out_features});
  in.y = y.mutable_data_ptr();
  in.h = save_h ? h.mutable_data_ptr() : nullptr;
  in.saved = save_z ? z.mutable_data_ptr() : nullptr;
  if (strategy == "separable") {
    STD_TORCH_CHECK(is_separable(in.dims), "strategy separable needs blocks with jL = iR = 1");
    separable_forward(in);
  } else {
    STD_TORCH_CHECK(false, "no native kernel for strategy ", strategy);
  }
  return {y, h, z};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mpoe_native, m) {
  m.def(
      "linear_forward(Tensor x, Tensor left, Tensor central, Tensor right, Tensor expert_offsets, Tensor? bias, "
      "Tensor? row_index, int in_features, int out_features, str activation, str strategy, bool save_h, bool save_z) "
      "-> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(mpoe_native, CPU, m) { m.impl("linear_forward", TORCH_BOX(&linear_forward_cpu)); }
