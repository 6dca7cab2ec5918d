// The grouped product: its three contractions (steps.h), its kernels of one launch (panel.h, few.h), what surrounds them
// (pointwise.h). Checks, allocation and launches; who calls them: mpoe_kernels/linear/cuda.
#include "cuda/bind.h"

#include <string>
#include <tuple>
#include <vector>

#include "cuda/activation.cuh"
#include "cuda/few.h"
#include "cuda/panel.h"
#include "cuda/pointwise.h"
#include "cuda/steps.h"

namespace mpoe::cuda {
namespace {

using Integers = std::vector<int64_t>;

int activation_of(const std::string& name) {
  if (name == "none") return kNone;
  if (name == "relu") return kRelu;
  if (name == "gelu") return kGelu;
  if (name == "gelu_tanh") return kGeluTanh;
  if (name == "silu") return kSilu;
  MPOE_CHECK(false, "unknown activation ", name);
}

// A bias, or what is kept of a result: of the dtype of the rows.
const void* data_of(const std::optional<Tensor>& tensor, const Tensor& like) {
  if (!tensor.has_value()) return nullptr;
  check_same_device({&like, &*tensor});
  MPOE_CHECK(tensor->scalar_type() == like.scalar_type(), "all tensors must have one dtype");
  return tensor->const_data_ptr();
}
const int64_t* index_of(const std::optional<Tensor>& index, const Tensor& like) {
  if (!index.has_value()) return nullptr;
  check_same_device({&like, &*index});
  MPOE_CHECK(index->scalar_type() == ScalarType::Long && index->is_contiguous(), "an index of slots must be dense int64");
  return index->const_data_ptr<int64_t>();
}
const int* offsets_of(const Tensor& offsets, const Tensor& like) {
  check_same_device({&like, &offsets});
  MPOE_CHECK(
      offsets.dim() == 1 && offsets.size(0) > 0 && offsets.scalar_type() == ScalarType::Int && offsets.is_contiguous(),
      "expert_offsets must be dense int32 [E + 1]");
  return offsets.const_data_ptr<int>();
}
Epilogue epilogue_of(const std::optional<Tensor>& bias, const std::string& activation, const std::optional<Tensor>& pre,
                     const Tensor& like) {
  return {data_of(bias, like), activation_of(activation), const_cast<void*>(data_of(pre, like))};
}

// Axes by name. layout: strides of iL jL a iC jC b iR jR (0: not an axis), elements from one slot or expert to the next (0:
// shared by all), true columns (0: all of them).
Named operand_from(const Tensor& tensor, const Integers& layout) {
  MPOE_CHECK(layout.size() == kAxes + 2, "a layout has ", kAxes + 2, " numbers; got ", layout.size());
  Named operand;
  operand.data = const_cast<void*>(tensor.const_data_ptr());
  for (int axis = 0; axis < kAxes; ++axis) operand.stride[axis] = layout[static_cast<std::size_t>(axis)];
  operand.outer = layout[kAxes];
  if (layout[kAxes + 1] > 0) operand.limit = counted(layout[kAxes + 1], "columns");
  return operand;
}

// sizes: of the axes, as a layout names them.
Context context_of(const Tensor& like, const Integers& sizes, const Tensor& offsets, int64_t slots, bool tf32,
                   cudaStream_t stream) {
  MPOE_CHECK(sizes.size() == kAxes, "there are ", int(kAxes), " axes; got ", sizes.size());
  Context context;
  context.dtype = kernel_dtype(like, "x");
  for (int axis = 0; axis < kAxes; ++axis) {
    context.dims.size[axis] = counted(sizes[static_cast<std::size_t>(axis)], "a dimension of the blocks");
  }
  context.tf32 = tf32;
  context.offsets = offsets_of(offsets, like);
  context.experts = counted(offsets.size(0) - 1, "the number of experts");
  context.slots = counted(slots, "the number of slots");
  context.stream = stream;
  return context;
}

void rows_times_block_op(const Tensor& rows, Integers rows_layout, const Tensor& block, Integers block_layout,
                         const Tensor& out, Integers out_layout, Integers sizes, const Tensor& offsets, int64_t slots,
                         const std::optional<Tensor>& row_index, const std::optional<Tensor>& bias,
                         std::string activation, const std::optional<Tensor>& pre, bool tf32, bool tail) {
  const OnDevice device(rows);
  data_of(block, rows);
  data_of(out, rows);
  const Context context = context_of(rows, sizes, offsets, slots, tf32, device.stream());
  rows_times_block(context, operand_from(rows, rows_layout), operand_from(block, block_layout),
                   operand_from(out, out_layout), index_of(row_index, rows), tail,
                   epilogue_of(bias, activation, pre, rows));
}

void check_result(const Tensor& out, const Integers& layout, const Tensor& like) {
  check_same_device({&like, &out});
  const bool shared = layout.size() > kAxes && layout[kAxes] == 0;
  MPOE_CHECK(
      shared ? out.scalar_type() == ScalarType::Float : out.scalar_type() == like.scalar_type(),
      "out must have the dtype of the operands; float32 where experts share it");
}

void block_gradient_op(const Tensor& rows, Integers rows_layout, const Tensor& grads, Integers grads_layout,
                       const Tensor& out, Integers out_layout, Integers sizes, const Tensor& offsets, int64_t slots,
                       const std::optional<Tensor>& row_index, bool tf32) {
  const OnDevice device(rows);
  data_of(grads, rows);
  check_result(out, out_layout, rows);
  const Context context = context_of(rows, sizes, offsets, slots, tf32, device.stream());
  block_gradient(context, operand_from(rows, rows_layout), operand_from(grads, grads_layout),
                 operand_from(out, out_layout), index_of(row_index, rows));
}

void merge_blocks_op(const Tensor& first, Integers first_layout, const Tensor& second, Integers second_layout,
                     const Tensor& out, Integers out_layout, Integers sizes, const Tensor& offsets, bool tf32) {
  const OnDevice device(first);
  data_of(second, first);
  check_result(out, out_layout, first);
  const Context context = context_of(first, sizes, offsets, 0, tf32, device.stream());
  merge_blocks(context, operand_from(first, first_layout), operand_from(second, second_layout),
               operand_from(out, out_layout));
}

// Dense left [E, iL, jL, a], central [a, iC, jC, b], right [E, b, iR, jR].
struct Blocks {
  Tensor left, central, right;

  Blocks(const Tensor& left_, const Tensor& central_, const Tensor& right_, const Tensor& like)
      : left(dense(left_)), central(dense(central_)), right(dense(right_)) {
    for (const Tensor* block : {&left, &central, &right}) data_of(*block, like);
    MPOE_CHECK(
        left.dim() == 4 && central.dim() == 4 && right.dim() == 4 && left.size(3) == central.size(0) &&
            central.size(3) == right.size(1) && left.size(0) == right.size(0),
        "blocks must be left [E, iL, jL, a], central [a, iC, jC, b], right [E, b, iR, jR]");
  }
  int experts() const { return counted(left.size(0), "the number of experts"); }
};

// Slots of a kernel of one launch, whose rows and results are dense.
int slots_of(const Tensor& rows, int64_t columns, const std::optional<Tensor>& row_index, const Tensor& out,
             int64_t out_columns, const std::optional<Tensor>& pre) {
  const int64_t slots = row_index.has_value() ? row_index->size(0) : rows.size(0);
  MPOE_CHECK(rows.dim() == 2 && rows.size(1) == columns && rows.is_contiguous(), "rows must be dense [.., ", columns, "]");
  for (const Tensor* result : {&out, pre.has_value() ? &*pre : &out}) {
    MPOE_CHECK(
        result->dim() == 2 && result->size(0) == slots && result->size(1) == out_columns && result->is_contiguous(),
        "results must be dense [", slots, ", ", out_columns, "]");
  }
  return counted(slots, "the number of slots");
}

// panel: how many indices of left, central and right a block holds; transposed: rows are [N, F] and meet W^T.
void panel_product_op(const Tensor& rows, const Tensor& left, const Tensor& central, const Tensor& right,
                      const Tensor& out, const Tensor& offsets, const std::optional<Tensor>& row_index,
                      const std::optional<Tensor>& bias, std::string activation, const std::optional<Tensor>& pre,
                      int64_t in_features, int64_t out_features, bool transposed, Integers panel, bool left_first,
                      bool tf32) {
  const OnDevice device(rows);
  const Blocks blocks(left, central, right, rows);
  MPOE_CHECK(panel.size() == 3, "a panel has 3 sizes; got ", panel.size());
  data_of(out, rows);
  const auto [from, to] = transposed ? std::pair(out_features, in_features) : std::pair(in_features, out_features);
  PanelProduct product;
  product.slots = slots_of(rows, from, row_index, out, to, pre);
  product.dtype = kernel_dtype(rows, "x");
  product.dims = dims_of(blocks.left, blocks.central, blocks.right, in_features, out_features);
  product.tf32 = tf32;
  product.transposed = transposed;
  product.shape = {counted(panel[0], "left"), counted(panel[1], "centre"), counted(panel[2], "right"), left_first};
  product.rows = rows.const_data_ptr();
  product.left = blocks.left.const_data_ptr();
  product.central = blocks.central.const_data_ptr();
  product.right = blocks.right.const_data_ptr();
  product.experts = blocks.experts();
  product.offsets = offsets_of(offsets, rows);
  product.row_index = index_of(row_index, rows);
  product.out = out.mutable_data_ptr();
  product.epilogue = epilogue_of(bias, activation, pre, rows);
  panel_product(product, device.stream());
}

// Slots sorted by expert (offsets), or each with its own (expert_of_slot, negative: none), which needs no routing.
// few: how many indices of left, central and right, and rows, a block computes.
void few_product_op(const Tensor& x, const Tensor& left, const Tensor& central, const Tensor& right, const Tensor& out,
                    const std::optional<Tensor>& offsets, const std::optional<Tensor>& expert_of_slot,
                    const std::optional<Tensor>& row_index, const std::optional<Tensor>& bias, std::string activation,
                    const std::optional<Tensor>& pre, int64_t in_features, int64_t out_features, Integers few) {
  const OnDevice device(x);
  const Blocks blocks(left, central, right, x);
  MPOE_CHECK(few.size() == 4, "a block of few rows has 4 sizes; got ", few.size());
  MPOE_CHECK(offsets.has_value() != expert_of_slot.has_value(), "give offsets or expert_of_slot");
  data_of(out, x);
  FewProduct product;
  product.slots = slots_of(x, in_features, row_index, out, out_features, pre);
  product.dtype = kernel_dtype(x, "x");
  product.dims = dims_of(blocks.left, blocks.central, blocks.right, in_features, out_features);
  product.shape = {counted(few[0], "left"), counted(few[1], "centre"), counted(few[2], "right"), counted(few[3], "rows")};
  product.x = x.const_data_ptr();
  product.left = blocks.left.const_data_ptr();
  product.central = blocks.central.const_data_ptr();
  product.right = blocks.right.const_data_ptr();
  product.experts = blocks.experts();
  product.offsets = offsets.has_value() ? offsets_of(*offsets, x) : nullptr;
  if (expert_of_slot.has_value()) {
    MPOE_CHECK(expert_of_slot->size(0) == product.slots, "expert_of_slot must be [", product.slots, "]");
  }
  product.expert_of_slot = index_of(expert_of_slot, x);
  product.row_index = index_of(row_index, x);
  product.y = out.mutable_data_ptr();
  product.epilogue = epilogue_of(bias, activation, pre, x);
  few_product(product, device.stream());
}

// (dz [N, F], dbias [F]). Without an activation dz is empty: it is grad. saved: output for relu, pre-activation for the rest.
std::tuple<Tensor, Tensor> activation_backward_op(const Tensor& grad, const std::optional<Tensor>& saved,
                                                  const Tensor& offsets, std::string activation, bool need_bias) {
  const OnDevice device(grad);
  MPOE_CHECK(grad.dim() == 2 && grad.is_contiguous(), "grad must be dense [N, F]");
  const int kind = activation_of(activation);
  const int slots = counted(grad.size(0), "the number of slots"), columns = counted(grad.size(1), "columns");
  const bool through = kind != kNone;
  if (through) {
    MPOE_CHECK(saved.has_value() && saved->dim() == 2 && saved->size(0) == slots && saved->size(1) == columns &&
                   saved->is_contiguous(),
               "saved is what the forward of activation ", activation, " kept: [", slots, ", ", columns, "]");
  }
  const void* kept = through ? data_of(saved, grad) : nullptr;
  Tensor dz = torch::stable::new_empty(grad, {through ? slots : 0, columns});
  Tensor dbias = torch::stable::new_empty(grad, {need_bias ? columns : 0});
  const Tensor sums = torch::stable::new_empty(grad, {need_bias ? partial_elements(slots, columns) : 0}, ScalarType::Float);
  activation_backward(kernel_dtype(grad, "grad"), grad.const_data_ptr(), kept, through ? dz.mutable_data_ptr() : nullptr,
                      need_bias ? dbias.mutable_data_ptr() : nullptr, sums.mutable_data_ptr<float>(),
                      offsets_of(offsets, grad) + (offsets.size(0) - 1), slots, columns, kind, device.stream());
  return {dz, dbias};
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
      "rows_times_block(Tensor rows, int[] rows_layout, Tensor block, int[] block_layout, Tensor(a!) out, "
      "int[] out_layout, int[] sizes, Tensor offsets, int slots, Tensor? row_index, Tensor? bias, str activation, "
      "Tensor(b!)? pre, bool tf32, bool tail) -> ()");
  m.def(
      "block_gradient(Tensor rows, int[] rows_layout, Tensor grads, int[] grads_layout, Tensor(a!) out, "
      "int[] out_layout, int[] sizes, Tensor offsets, int slots, Tensor? row_index, bool tf32) -> ()");
  m.def(
      "merge_blocks(Tensor first, int[] first_layout, Tensor second, int[] second_layout, Tensor(a!) out, "
      "int[] out_layout, int[] sizes, Tensor offsets, bool tf32) -> ()");
  m.def(
      "panel_product(Tensor rows, Tensor left, Tensor central, Tensor right, Tensor(a!) out, Tensor offsets, "
      "Tensor? row_index, Tensor? bias, str activation, Tensor(b!)? pre, int in_features, int out_features, "
      "bool transposed, int[] panel, bool left_first, bool tf32) -> ()");
  m.def(
      "few_product(Tensor x, Tensor left, Tensor central, Tensor right, Tensor(a!) out, Tensor? offsets, "
      "Tensor? expert_of_slot, Tensor? row_index, Tensor? bias, str activation, Tensor(b!)? pre, int in_features, "
      "int out_features, int[] few) -> ()");
  m.def(
      "activation_backward(Tensor grad, Tensor? saved, Tensor offsets, str activation, bool need_bias) "
      "-> (Tensor, Tensor)");
  m.def("sum_rows(Tensor rows, Tensor order, Tensor starts) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(MPOE_CUDA_OPS, MPOE_CUDA_KEY, m) {
  m.impl("rows_times_block", TORCH_BOX(&mpoe::cuda::rows_times_block_op));
  m.impl("block_gradient", TORCH_BOX(&mpoe::cuda::block_gradient_op));
  m.impl("merge_blocks", TORCH_BOX(&mpoe::cuda::merge_blocks_op));
  m.impl("panel_product", TORCH_BOX(&mpoe::cuda::panel_product_op));
  m.impl("few_product", TORCH_BOX(&mpoe::cuda::few_product_op));
  m.impl("activation_backward", TORCH_BOX(&mpoe::cuda::activation_backward_op));
  m.impl("sum_rows", TORCH_BOX(&mpoe::cuda::sum_rows_op));
}
