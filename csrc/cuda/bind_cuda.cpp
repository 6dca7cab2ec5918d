// linear_forward, linear_backward, few_forward, sum_rows: checks, allocation, and the launches of linear.h, few.h and
// pointwise.h.
#include "cuda/bind.h"

#include <string>
#include <tuple>

#include "cuda/few.h"
#include "cuda/linear.h"
#include "cuda/pointwise.h"

namespace mpoe::cuda {
namespace {

int activation_of(const std::string& name) {
  if (name == "none") return kNone;
  if (name == "relu") return kRelu;
  if (name == "gelu") return kGelu;
  if (name == "gelu_tanh") return kGeluTanh;
  if (name == "silu") return kSilu;
  MPOE_CHECK(false, "unknown activation ", name);
}

// Dense tensors behind a LinearInputs, checked; must outlive it, as must `program`.
struct Operands {
  Tensor x, left, central, right, offsets;
  std::optional<Tensor> row_index;

  Operands(const Tensor& x_, const Tensor& left_, const Tensor& central_, const Tensor& right_, const Tensor& offsets_,
           const std::optional<Tensor>& row_index_)
      : x(dense(x_)),
        left(dense(left_)),
        central(dense(central_)),
        right(dense(right_)),
        offsets(dense(cast(offsets_, ScalarType::Int))) {
    check_same_device({&x, &left, &central, &right, &offsets});
    if (row_index_.has_value()) {
      row_index = dense_index(*row_index_, 1, "row_index");
      check_same_device({&x, &*row_index});
    }
  }

  LinearInputs inputs(int64_t in_features, int64_t out_features, const std::string& activation,
                      const std::string& program, bool tf32) const {
    MPOE_CHECK(x.dim() == 2 && x.size(1) == in_features, "x must be [T, ", in_features, "]");
    MPOE_CHECK(
        left.dim() == 4 && central.dim() == 4 && right.dim() == 4 && left.size(3) == central.size(0) &&
            central.size(3) == right.size(1) && left.size(0) == right.size(0),
        "blocks must be left [E, iL, jL, a], central [a, iC, jC, b], right [E, b, iR, jR]");
    for (const Tensor* block : {&left, &central, &right})
      MPOE_CHECK(block->scalar_type() == x.scalar_type(), "blocks must have the dtype of x");
    const int64_t experts = left.size(0);
    MPOE_CHECK(offsets.dim() == 1 && offsets.size(0) == experts + 1, "expert_offsets must be [", experts + 1, "]");
    LinearInputs in;
    in.dtype = kernel_dtype(x, "x");
    in.dims = dims_of(left, central, right, in_features, out_features);
    in.program = program.c_str();
    in.tf32 = tf32;
    in.x = x.const_data_ptr();
    in.left = left.const_data_ptr();
    in.central = central.const_data_ptr();
    in.right = right.const_data_ptr();
    in.experts = counted(experts, "the number of experts");
    in.offsets = offsets.const_data_ptr<int>();
    in.row_index = row_index.has_value() ? row_index->const_data_ptr<int64_t>() : nullptr;
    in.slots = counted(row_index.has_value() ? row_index->size(0) : x.size(0), "the number of slots");
    in.activation = activation_of(activation);
    return in;
  }
};

std::optional<Tensor> checked_bias(const std::optional<Tensor>& bias, const Tensor& x, int64_t features) {
  if (!bias.has_value()) return std::nullopt;
  check_same_device({&x, &*bias});
  MPOE_CHECK(
      bias->dim() == 1 && bias->size(0) == features && bias->scalar_type() == x.scalar_type(), "bias must be [",
      features, "] of the dtype of x");
  return dense(*bias);
}

std::tuple<Tensor, Tensor, Tensor> linear_forward_op(
    const Tensor& x, const Tensor& left, const Tensor& central, const Tensor& right, const Tensor& expert_offsets,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& row_index, int64_t in_features,
    int64_t out_features, std::string activation, std::string program, bool tf32, bool save_h, bool save_z) {
  const OnDevice device(x);
  const Operands operands(x, left, central, right, expert_offsets, row_index);
  LinearForward in;
  static_cast<LinearInputs&>(in) = operands.inputs(in_features, out_features, activation, program, tf32);
  const std::optional<Tensor> dense_bias = checked_bias(bias, x, out_features);
  if (dense_bias.has_value()) in.bias = dense_bias->const_data_ptr();
  Tensor y = torch::stable::new_empty(x, {in.slots, out_features});
  Tensor h = torch::stable::new_empty(x, {save_h ? int64_t(in.slots) * in.dims.size[kJC] : 0, in.dims.size[kB]});
  Tensor z = torch::stable::new_empty(x, {save_z ? in.slots : 0, out_features});
  in.y = y.mutable_data_ptr();
  in.h = save_h ? h.mutable_data_ptr() : nullptr;
  in.saved = save_z ? z.mutable_data_ptr() : nullptr;
  const Scratch scratch(x, workspace_bytes(in));
  linear_forward(in, scratch.data(), device.stream());
  return {y, h, z};
}

// `need_..`: which of dx [N, I] (by slot), dleft, dcentral, dright, dbias; the others come back with no elements.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_backward_op(
    const Tensor& grad, const Tensor& x, const Tensor& left, const Tensor& central, const Tensor& right,
    const Tensor& expert_offsets, const std::optional<Tensor>& row_index, const std::optional<Tensor>& h,
    const std::optional<Tensor>& saved, int64_t in_features, int64_t out_features, std::string activation,
    std::string program, bool tf32, bool need_x, bool need_left, bool need_central, bool need_right, bool need_bias) {
  const OnDevice device(x);
  const Operands operands(x, left, central, right, expert_offsets, row_index);
  LinearBackward in;
  static_cast<LinearInputs&>(in) = operands.inputs(in_features, out_features, activation, program, tf32);
  const auto dense_rows = [&](const Tensor& rows, int64_t count, int64_t columns, const char* name) {
    check_same_device({&x, &rows});
    MPOE_CHECK(
        rows.dim() == 2 && rows.size(0) == count && rows.size(1) == columns && rows.scalar_type() == x.scalar_type(),
        name, " must be [", count, ", ", columns, "] of the dtype of x");
    return dense(rows);
  };
  const Tensor dense_grad = dense_rows(grad, in.slots, out_features, "grad");
  std::optional<Tensor> dense_h, dense_saved;
  in.grad = dense_grad.const_data_ptr();
  if (in.activation != kNone) {
    MPOE_CHECK(saved.has_value(), "saved is what the forward of activation ", activation, " kept");
    dense_saved = dense_rows(*saved, in.slots, out_features, "saved");
    in.saved = dense_saved->const_data_ptr();
  }
  if (h.has_value()) {
    dense_h = dense_rows(*h, int64_t(in.slots) * in.dims.size[kJC], in.dims.size[kB], "h");
    in.h = dense_h->const_data_ptr();
  }
  const auto result = [&](bool needed, torch::headeronly::IntHeaderOnlyArrayRef sizes, void*& data) {
    Tensor out = needed ? torch::stable::new_empty(x, sizes) : torch::stable::new_empty(x, {0});
    data = needed ? out.mutable_data_ptr() : nullptr;
    return out;
  };
  Tensor dx = result(need_x, {in.slots, in_features}, in.dx);
  Tensor dleft = result(need_left, left.sizes(), in.dleft);
  Tensor dcentral = result(need_central, central.sizes(), in.dcentral);
  Tensor dright = result(need_right, right.sizes(), in.dright);
  Tensor dbias = result(need_bias, {out_features}, in.dbias);
  const Scratch scratch(x, workspace_bytes(in));
  linear_backward(in, scratch.data(), device.stream());
  return {dx, dleft, dcentral, dright, dbias};
}

// A product of few rows whose slots name their experts (negative: none), in one launch, without routing.
// left .. rows: what a block computes, see few.h.
Tensor few_forward_op(
    const Tensor& x, const Tensor& left, const Tensor& central, const Tensor& right, const Tensor& expert_of_slot,
    const std::optional<Tensor>& bias, const Tensor& row_index, int64_t in_features, int64_t out_features,
    std::string activation, int64_t kept_left, int64_t kept_centre, int64_t kept_right, int64_t rows) {
  const OnDevice device(x);
  const Tensor offsets = torch::stable::new_empty(x, {left.size(0) + 1}, ScalarType::Int);  // not read
  const Operands operands(x, left, central, right, offsets, row_index);
  const std::string program;
  const LinearInputs in = operands.inputs(in_features, out_features, activation, program, false);
  const Tensor expert = dense_index(expert_of_slot, 1, "expert_of_slot");
  MPOE_CHECK(expert.size(0) == in.slots, "expert_of_slot must be [", in.slots, "]");
  const std::optional<Tensor> dense_bias = checked_bias(bias, x, out_features);
  Tensor y = torch::stable::new_empty(x, {in.slots, out_features});
  FewProduct product;
  product.dtype = in.dtype;
  product.dims = in.dims;
  product.shape = {counted(kept_left, "left"), counted(kept_centre, "centre"), counted(kept_right, "right"),
                   counted(rows, "rows")};
  product.x = in.x;
  product.left = in.left;
  product.central = in.central;
  product.right = in.right;
  product.experts = in.experts;
  product.expert_of_slot = expert.const_data_ptr<int64_t>();
  product.row_index = in.row_index;
  product.slots = in.slots;
  product.y = y.mutable_data_ptr();
  product.epilogue.bias = dense_bias.has_value() ? dense_bias->const_data_ptr() : nullptr;
  product.epilogue.activation = in.activation;
  few_product(product, device.stream());
  return y;
}

Tensor sum_rows_op(const Tensor& rows, const Tensor& order, const Tensor& starts) {
  const OnDevice device(rows);
  MPOE_CHECK(rows.dim() == 2, "rows must have 2 axes; got ", rows.dim());
  const Tensor from = dense(rows), slots = dense_index(order, 1, "order"), first = dense_index(starts, 1, "starts");
  check_same_device({&from, &slots, &first});
  MPOE_CHECK(first.size(0) > 0, "starts must be [T + 1]; got [0]");
  const int64_t tokens = first.size(0) - 1;
  Tensor out = torch::stable::new_empty(from, {tokens, rows.size(1)});
  sum_rows(kernel_dtype(from, "rows"), from.const_data_ptr(), slots.const_data_ptr<int64_t>(),
           first.const_data_ptr<int64_t>(), out.mutable_data_ptr(), counted(tokens, "the number of tokens"),
           counted(rows.size(1), "columns"), device.stream());
  return out;
}

}  // namespace
}  // namespace mpoe::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(MPOE_CUDA_OPS, m) {
  m.def(
      "linear_forward(Tensor x, Tensor left, Tensor central, Tensor right, Tensor expert_offsets, Tensor? bias, "
      "Tensor? row_index, int in_features, int out_features, str activation, str program, bool tf32, bool save_h, "
      "bool save_z) -> (Tensor, Tensor, Tensor)");
  m.def(
      "linear_backward(Tensor grad, Tensor x, Tensor left, Tensor central, Tensor right, Tensor expert_offsets, "
      "Tensor? row_index, Tensor? h, Tensor? saved, int in_features, int out_features, str activation, str program, "
      "bool tf32, bool need_x, bool need_left, bool need_central, bool need_right, bool need_bias) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "few_forward(Tensor x, Tensor left, Tensor central, Tensor right, Tensor expert_of_slot, Tensor? bias, "
      "Tensor row_index, int in_features, int out_features, str activation, int kept_left, int kept_centre, "
      "int kept_right, int rows) -> Tensor");
  m.def("sum_rows(Tensor rows, Tensor order, Tensor starts) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(MPOE_CUDA_OPS, MPOE_CUDA_KEY, m) {
  m.impl("linear_forward", TORCH_BOX(&mpoe::cuda::linear_forward_op));
  m.impl("linear_backward", TORCH_BOX(&mpoe::cuda::linear_backward_op));
  m.impl("few_forward", TORCH_BOX(&mpoe::cuda::few_forward_op));
  m.impl("sum_rows", TORCH_BOX(&mpoe::cuda::sum_rows_op));
}
