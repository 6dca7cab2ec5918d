// The fused contraction: rows times weights (panel.h), and weights' gradients times blocks (gradient.h). Checks and
// launches; called by mpoe_kernels/linear/cuda.
#include "cuda/bind.h"

#include <string>
#include <vector>

#include "cuda/linear/gradient.h"
#include "cuda/linear/panel.h"

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

// other: right [E, b, iR, jR], or left · central [E, iL, jL, iC, jC, b] if of_right; out: what has the shape of the other
// one, as float32 [parts, ...] if of_right. tile: how many indices of iL, jL, iR and jR a block holds.
void weight_gradient_product_op(const Tensor& x, const Tensor& dz, const Tensor& other, const Tensor& out,
                                const Tensor& offsets, const std::optional<Tensor>& row_index, Integers sizes,
                                Integers tile, bool of_right, bool tf32) {
  const OnDevice device(x);
  MPOE_CHECK(sizes.size() == kAxes, "there are ", int(kAxes), " axes; got ", sizes.size());
  MPOE_CHECK(tile.size() == 4, "a tile has 4 sizes; got ", tile.size());
  GradientProduct product;
  Dims& dims = product.dims;
  for (int axis = 0; axis < kAxes; ++axis) {
    dims.size[axis] = counted(sizes[static_cast<std::size_t>(axis)], "a dimension of the blocks");
  }
  dims.in_features = static_cast<int>(dims.elements({kIL, kIC, kIR}));
  dims.out_features = static_cast<int>(dims.elements({kJL, kJC, kJR}));
  product.dtype = kernel_dtype(x, "x");
  product.offsets = offsets_of(offsets, x);
  product.experts = counted(offsets.size(0) - 1, "the number of experts");
  product.row_index = index_of(row_index, x);
  product.parts = of_right ? counted(out.size(0), "parts") : dims.size[kIC] * dims.size[kJC];
  const int64_t half = dims.elements(layout_of("LC")), right = dims.elements(layout_of("R"));
  const auto is_dense = [&](const Tensor& tensor, int64_t elements, bool as_float) {
    check_same_device({&x, &tensor});
    return tensor.is_contiguous() && tensor.numel() == elements &&
           tensor.scalar_type() == (as_float ? ScalarType::Float : x.scalar_type());
  };
  const int64_t slots = row_index.has_value() ? row_index->size(0) : x.size(0);
  MPOE_CHECK(is_dense(x, x.size(0) * dims.in_features, false) && is_dense(dz, slots * dims.out_features, false),
             "x must be dense [.., ", dims.in_features, "] and dz [", slots, ", ", dims.out_features, "]");
  MPOE_CHECK(is_dense(other, product.experts * (of_right ? half : right), false) &&
                 is_dense(out, product.experts * (of_right ? product.parts * right : half), of_right),
             "other and out must be dense, of the dtype of x, or float32 for parts of a sum");
  for (int i = 0; i < 4; ++i) product.tile[i] = counted(tile[static_cast<std::size_t>(i)], "a size of a tile");
  product.of_right = of_right;
  product.tf32 = tf32;
  product.x = x.const_data_ptr();
  product.dz = dz.const_data_ptr();
  product.other = other.const_data_ptr();
  product.out = out.mutable_data_ptr();
  gradient_product(product, device.stream());
}

}  // namespace
}  // namespace mpoe::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(MPOE_CUDA_OPS, m) {
  m.def(
      "panel_product(Tensor rows, Tensor left, Tensor central, Tensor right, Tensor(a!) out, Tensor offsets, "
      "Tensor? row_index, Tensor? bias, str activation, Tensor(b!)? pre, int in_features, int out_features, "
      "bool transposed, int[] panel, bool left_first, bool tf32, Tensor? out_index=None, Tensor? gates=None) -> ()");
  m.def(
      "weight_gradient_product(Tensor x, Tensor dz, Tensor other, Tensor(a!) out, Tensor offsets, Tensor? row_index, "
      "int[] sizes, int[] tile, bool of_right, bool tf32) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(MPOE_CUDA_OPS, MPOE_CUDA_KEY, m) {
  m.impl("panel_product", TORCH_BOX(&mpoe::cuda::panel_product_op));
  m.impl("weight_gradient_product", TORCH_BOX(&mpoe::cuda::weight_gradient_product_op));
}
