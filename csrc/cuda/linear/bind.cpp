// The grouped product: its three contractions (steps.h), its single-launch kernels (panel.h, few.h) and what surrounds
// them (pointwise.h). Checks, allocation and launches; called by mpoe_kernels/linear/cuda.
#include "cuda/bind.h"

#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "cuda/linear/few.h"
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

// What a step reads or writes, in 64-bit numbers; StepOperand of mpoe_kernels/linear/cuda/plan.py.
struct StepOperand {
  int64_t tensor;         // number among the call's; -1: the scratch memory
  int64_t offset;         // element at which it starts
  int64_t outer;          // elements from one slot or expert to the next; 0: shared by all
  int64_t limit;          // true columns; 0: all of them
  int64_t stride[kAxes];  // 0: not an axis
};
// One launch; Step of mpoe_kernels/linear/cuda/plan.py.
struct Step {
  int64_t kind;            // see below
  int64_t first, experts;  // experts [first, first + experts) are at work
  int64_t gathers;         // rows are read through row_index
  int64_t epilogue;        // the result is y: bias, activation, pre
  int64_t tail;            // clear the rows that no expert owns
  StepOperand a, b, out;
};
enum StepKind : int64_t { kRows = 0, kGradient = 1, kMerge = 2 };

// The products of a program, one launch each. sizes: of iL jL a iC jC b iR jR; scratch: of x's dtype.
void contract_steps_op(std::vector<Tensor> tensors, const Tensor& scratch, const Tensor& steps, Integers sizes,
                       const Tensor& offsets, int64_t slots, const std::optional<Tensor>& row_index,
                       const std::optional<Tensor>& bias, std::string activation, const std::optional<Tensor>& pre,
                       bool tf32, const std::optional<Tensor>& out_index, const std::optional<Tensor>& gates) {
  const OnDevice device(scratch);
  MPOE_CHECK(sizes.size() == kAxes, "there are ", int(kAxes), " axes; got ", sizes.size());
  MPOE_CHECK(
      steps.is_cpu() && steps.is_contiguous() && steps.scalar_type() == ScalarType::Byte &&
          steps.numel() % static_cast<int64_t>(sizeof(Step)) == 0,
      "steps must be bytes of the CPU, ", sizeof(Step), " for each");
  Context context;
  context.dtype = kernel_dtype(scratch, "x");
  for (int axis = 0; axis < kAxes; ++axis) {
    context.dims.size[axis] = counted(sizes[static_cast<std::size_t>(axis)], "a dimension of the blocks");
  }
  context.tf32 = tf32;
  context.slots = counted(slots, "the number of slots");
  context.stream = device.stream();
  const int* const first_offset = offsets_of(offsets, scratch);
  const int64_t* const rows_of_slots = index_of(row_index, scratch);
  const Epilogue epilogue = epilogue_of(bias, activation, pre, {out_index, gates}, slots, scratch);
  for (const Tensor& tensor : tensors) check_same_device({&scratch, &tensor});

  const auto operand = [&](const StepOperand& from, bool as_float) {
    MPOE_CHECK(from.tensor < static_cast<int64_t>(tensors.size()), "a step names tensor ", from.tensor);
    const Tensor& tensor = from.tensor < 0 ? scratch : tensors[static_cast<std::size_t>(from.tensor)];
    MPOE_CHECK(
        tensor.scalar_type() == (as_float ? ScalarType::Float : scratch.scalar_type()),
        "operands must have the dtype of x; sums over experts are float32");
    Named found;
    const int64_t size = as_float ? int64_t(sizeof(float)) : int64_t(size_of(context.dtype));
    found.data = static_cast<char*>(const_cast<void*>(tensor.const_data_ptr())) + from.offset * size;
    std::copy(from.stride, from.stride + kAxes, found.stride);
    found.outer = from.outer;
    if (from.limit > 0) found.limit = counted(from.limit, "columns");
    return found;
  };
  const auto* const begin = static_cast<const Step*>(steps.const_data_ptr());
  for (const Step* step = begin; step != begin + steps.numel() / static_cast<int64_t>(sizeof(Step)); ++step) {
    MPOE_CHECK(
        step->first >= 0 && step->first + step->experts < offsets.size(0), "a step is about experts that there are not");
    context.offsets = first_offset + step->first;
    context.experts = static_cast<int>(step->experts);
    const Named a = operand(step->a, false), b = operand(step->b, false);
    const Named out = operand(step->out, step->kind != kRows && step->out.outer == 0);
    const int64_t* const gathered = step->gathers ? rows_of_slots : nullptr;
    switch (step->kind) {
      case kRows:
        rows_times_block(context, a, b, out, gathered, step->tail != 0, step->epilogue ? epilogue : Epilogue{});
        break;
      case kGradient: block_gradient(context, a, b, out, gathered); break;
      case kMerge: merge_blocks(context, a, b, out); break;
      default: MPOE_CHECK(false, "a step has no kind ", step->kind);
    }
  }
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

// Slots sorted by expert (offsets), or each with its own (expert_of_slot, negative: none), which needs no routing.
// few: how many indices of left, central and right, and rows, a block computes.
void few_product_op(const Tensor& x, const Tensor& left, const Tensor& central, const Tensor& right, const Tensor& out,
                    const std::optional<Tensor>& offsets, const std::optional<Tensor>& expert_of_slot,
                    const std::optional<Tensor>& row_index, const std::optional<Tensor>& bias, std::string activation,
                    const std::optional<Tensor>& pre, int64_t in_features, int64_t out_features, Integers few,
                    const std::optional<Tensor>& out_index, const std::optional<Tensor>& gates) {
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
  product.epilogue = epilogue_of(bias, activation, pre, {out_index, gates}, product.slots, x);
  few_product(product, device.stream());
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
      "contract_steps(Tensor(a!)[] tensors, Tensor(b!) scratch, Tensor steps, int[] sizes, Tensor offsets, int slots, "
      "Tensor? row_index, Tensor? bias, str activation, Tensor(c!)? pre, bool tf32, Tensor? out_index=None, "
      "Tensor? gates=None) -> ()");
  m.def(
      "panel_product(Tensor rows, Tensor left, Tensor central, Tensor right, Tensor(a!) out, Tensor offsets, "
      "Tensor? row_index, Tensor? bias, str activation, Tensor(b!)? pre, int in_features, int out_features, "
      "bool transposed, int[] panel, bool left_first, bool tf32, Tensor? out_index=None, Tensor? gates=None) -> ()");
  m.def(
      "few_product(Tensor x, Tensor left, Tensor central, Tensor right, Tensor(a!) out, Tensor? offsets, "
      "Tensor? expert_of_slot, Tensor? row_index, Tensor? bias, str activation, Tensor(b!)? pre, int in_features, "
      "int out_features, int[] few, Tensor? out_index=None, Tensor? gates=None) -> ()");
  m.def(
      "activation_backward(Tensor grad, Tensor? saved, Tensor offsets, str activation, bool need_bias) "
      "-> (Tensor, Tensor)");
  m.def("sum_rows(Tensor rows, Tensor order, Tensor starts) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(MPOE_CUDA_OPS, MPOE_CUDA_KEY, m) {
  m.impl("contract_steps", TORCH_BOX(&mpoe::cuda::contract_steps_op));
  m.impl("panel_product", TORCH_BOX(&mpoe::cuda::panel_product_op));
  m.impl("few_product", TORCH_BOX(&mpoe::cuda::few_product_op));
  m.impl("activation_backward", TORCH_BOX(&mpoe::cuda::activation_backward_op));
  m.impl("sum_rows", TORCH_BOX(&mpoe::cuda::sum_rows_op));
}
