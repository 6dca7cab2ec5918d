// The grouped product: its three contractions (steps.h), its fused kernel (panel.h) and what surrounds them
// (pointwise.h). Checks, allocation and launches; called by mpoe_kernels/linear/cuda.
#include "cuda/bind.h"

#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "cuda/linear/panel.h"
#include "cuda/linear/pointwise.h"
#include "cuda/linear/steps.h"

namespace mpoe::cuda {
namespace {

using Integers = std::vector<int64_t>;

// Address of a bias, or of what is saved of a result; it must have the dtype of the rows.
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
// Where rows of the result go, and what they are multiplied by. `out_index` names every row once; gates are by row.
struct Placed {
  const std::optional<Tensor>& out_index;
  const std::optional<Tensor>& gates;
};
Epilogue epilogue_of(const std::optional<Tensor>& bias, const std::string& activation, const std::optional<Tensor>& pre,
                     const Placed& placed, int64_t slots, const Tensor& like) {
  Epilogue found{data_of(bias, like), activation_of(activation), const_cast<void*>(data_of(pre, like)),
                 index_of(placed.out_index, like), nullptr};
  MPOE_CHECK(!placed.out_index.has_value() || placed.out_index->size(0) == slots, "out_index must be [", slots, "]");
  if (placed.gates.has_value()) {
    const Tensor& gates = *placed.gates;
    check_same_device({&like, &gates});
    MPOE_CHECK(gates.dim() == 1 && gates.size(0) == slots && gates.is_contiguous() &&
                   gates.scalar_type() == ScalarType::Float,
               "gates must be dense float32 [", slots, "]");
    found.gates = gates.const_data_ptr<float>();
  }
  return found;
}

// What the three contractions share. sizes: of iL jL a iC jC b iR jR.
Context context_of(const Tensor& like, const Integers& sizes, const Tensor& offsets, int64_t slots, bool tf32,
                   const OnDevice& device) {
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
  context.stream = device.stream();
  return context;
}

// Operand `number` of a contraction. layout: of every operand the elements from one slot or expert to the next (0:
// shared by all), the true columns (0: all of them), and a stride for every axis (0: not an axis).
Named operand_of_call(const Tensor& tensor, int number, const Integers& layout, const Tensor& like) {
  constexpr std::size_t kNumbers = 2 + kAxes;
  MPOE_CHECK(layout.size() == 3 * kNumbers, "the layout of 3 operands has ", 3 * kNumbers, " numbers; got ", layout.size());
  check_same_device({&like, &tensor});
  const auto from = layout.begin() + static_cast<std::ptrdiff_t>(number * kNumbers);
  Named found;
  found.outer = from[0];
  if (from[1] > 0) found.limit = counted(from[1], "columns");
  std::copy(from + 2, from + kNumbers, found.stride);
  found.data = const_cast<void*>(tensor.const_data_ptr());
  return found;
}
// A factor, or a result that experts do not share.
Named alike(const Tensor& tensor, int number, const Integers& layout, const Tensor& like) {
  MPOE_CHECK(tensor.scalar_type() == like.scalar_type(), "operands must have the dtype of x");
  return operand_of_call(tensor, number, layout, like);
}
Named block_of_result(const Tensor& out, const Integers& layout, const Tensor& like) {
  const Named found = operand_of_call(out, 2, layout, like);
  MPOE_CHECK(out.scalar_type() == (found.outer == 0 ? ScalarType::Float : like.scalar_type()),
             "a block's gradient must have the dtype of x; sums over experts are float32");
  return found;
}

void rows_times_block_op(const Tensor& rows, const Tensor& block, const Tensor& out, Integers layout, Integers sizes,
                         const Tensor& offsets, const std::optional<Tensor>& row_index, bool zero_tail, bool tf32,
                         const std::optional<Tensor>& bias, std::string activation, const std::optional<Tensor>& pre,
                         const std::optional<Tensor>& out_index, const std::optional<Tensor>& gates) {
  const OnDevice device(rows);
  const int64_t slots = out.size(0);
  const Context context = context_of(rows, sizes, offsets, slots, tf32, device);
  rows_times_block(context, alike(rows, 0, layout, rows), alike(block, 1, layout, rows), alike(out, 2, layout, rows),
                   index_of(row_index, rows), zero_tail,
                   epilogue_of(bias, activation, pre, {out_index, gates}, slots, rows));
}

void block_gradient_op(const Tensor& rows, const Tensor& grads, const Tensor& out, Integers layout, Integers sizes,
                       const Tensor& offsets, const std::optional<Tensor>& row_index, bool tf32) {
  const OnDevice device(rows);
  block_gradient(context_of(rows, sizes, offsets, grads.size(0), tf32, device), alike(rows, 0, layout, rows),
                 alike(grads, 1, layout, rows), block_of_result(out, layout, rows), index_of(row_index, rows));
}

void merge_blocks_op(const Tensor& first, const Tensor& second, const Tensor& out, Integers layout, Integers sizes,
                     const Tensor& offsets, bool tf32) {
  const OnDevice device(first);
  merge_blocks(context_of(first, sizes, offsets, 0, tf32, device), alike(first, 0, layout, first),
               alike(second, 1, layout, first), block_of_result(out, layout, first));
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

// Number of slots of a single-launch kernel, whose rows and results must be dense.
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

// panel: how many indices of left, central and right a block holds; transposed: rows are [N, F], times W^T.
void panel_product_op(const Tensor& rows, const Tensor& left, const Tensor& central, const Tensor& right,
                      const Tensor& out, const Tensor& offsets, const std::optional<Tensor>& row_index,
                      const std::optional<Tensor>& bias, std::string activation, const std::optional<Tensor>& pre,
                      int64_t in_features, int64_t out_features, bool transposed, Integers panel, bool left_first,
                      bool tf32, const std::optional<Tensor>& out_index, const std::optional<Tensor>& gates) {
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
  product.epilogue = epilogue_of(bias, activation, pre, {out_index, gates}, product.slots, rows);
  panel_product(product, device.stream());
}

// (dz [N, F], dbias [F]). Without an activation dz is empty: it equals grad. saved: output for relu, pre-activation for
// the rest.
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
      "rows_times_block(Tensor rows, Tensor block, Tensor(a!) out, int[] layout, int[] sizes, Tensor offsets, "
      "Tensor? row_index, bool zero_tail, bool tf32, Tensor? bias, str activation, Tensor(b!)? pre, "
      "Tensor? out_index=None, Tensor? gates=None) -> ()");
  m.def(
      "block_gradient(Tensor rows, Tensor grads, Tensor(a!) out, int[] layout, int[] sizes, Tensor offsets, "
      "Tensor? row_index, bool tf32) -> ()");
  m.def(
      "merge_blocks(Tensor first, Tensor second, Tensor(a!) out, int[] layout, int[] sizes, Tensor offsets, bool tf32) "
      "-> ()");
  m.def(
      "panel_product(Tensor rows, Tensor left, Tensor central, Tensor right, Tensor(a!) out, Tensor offsets, "
      "Tensor? row_index, Tensor? bias, str activation, Tensor(b!)? pre, int in_features, int out_features, "
      "bool transposed, int[] panel, bool left_first, bool tf32, Tensor? out_index=None, Tensor? gates=None) -> ()");
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
  m.impl("activation_backward", TORCH_BOX(&mpoe::cuda::activation_backward_op));
  m.impl("sum_rows", TORCH_BOX(&mpoe::cuda::sum_rows_op));
}
