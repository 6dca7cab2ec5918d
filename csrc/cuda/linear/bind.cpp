// The fused contraction: rows times weights (rebuilt.cuh), and weights' gradients times blocks (gradient.cuh); and what
// every expert has for itself of other strategies (grouped.cuh). Called by mpoe_kernels/linear/cuda.py with dense
// tensors; the op has checked its arguments.
#include "cuda/bind.h"

#include "cuda/linear/grouped.cuh"

namespace mpoe::cuda {
namespace {

void fill(Slots& slots, const Tensor& rows, const Tensor& offsets, const Optional& row_index) {
  slots.dtype = kernel_dtype(rows);
  slots.experts = counted(offsets.size(0) - 1, "the number of experts");
  slots.slots = counted(row_index.has_value() ? row_index->size(0) : rows.size(0), "the number of slots");
  slots.offsets = offsets.const_data_ptr<int>();
  slots.row_index = data_of<int64_t>(row_index);
}

// left [E, iL, jL, a], central [a, iC, jC, b] and right [E, iR, jR, b]; or half [E, iL, jL, iC, jC, b] instead of both
// of the former. right may have an axis more before.
void fill(LinearSizes& sizes, const Tensor& left, const Tensor& central, const Tensor& right, const Tensor& rows,
          const Tensor& offsets, const Optional& row_index) {
  const bool halved = left.dim() == 6;
  const int last = static_cast<int>(right.dim()) - 1;
  require(left.numel() / left.size(0) < 1 << 30 && central.numel() / (halved ? left.size(0) : 1) < 1 << 30,
          "blocks must have less than 2^30 elements");
  const int64_t digits[] = {left.size(1), left.size(2), central.size(halved ? 3 : 1), central.size(halved ? 4 : 2),
                            right.size(last - 2), right.size(last - 1)};
  for (int n = 0; n < 3; ++n) {
    sizes.i[n] = counted(digits[2 * n], "a dimension of the blocks");
    sizes.j[n] = counted(digits[2 * n + 1], "a dimension of the blocks");
  }
  fill(sizes, rows, offsets, row_index);
  sizes.a = halved ? 1 : counted(left.size(3), "a bond");
  sizes.b = counted(right.size(last), "a bond");
}

// transposed: rows are [N, F], times W^T.
void rebuilt_product_op(const Tensor& rows, const Tensor& left, const Tensor& central, const Tensor& right,
                        const Tensor& out, const Tensor& offsets, const Optional& row_index, const Optional& bias,
                        std::string activation, const Optional& pre, bool transposed,
                        const Optional& out_index, const Optional& gates) {
  const OnDevice device(rows);
  RebuiltProduct product;
  fill(product, left, central, right, rows, offsets, row_index);
  (transposed ? product.out_features : product.in_features) = counted(rows.size(1), "columns");
  (transposed ? product.in_features : product.out_features) = counted(out.size(1), "columns");
  product.transposed = transposed;
  product.rows = rows.const_data_ptr();
  product.left = left.const_data_ptr();
  product.central = central.const_data_ptr();
  product.right = right.const_data_ptr();
  product.out = out.mutable_data_ptr();
  product.epilogue = {data_of(bias), activation_of(activation), const_cast<void*>(data_of(pre)),
                      data_of<int64_t>(out_index), data_of<float>(gates)};
  rebuilt_product(product, device.stream());
}

// other: right [E, iR, jR, b], and out like half = left central [E, iL, jL, iC, jC, b]; or if of_right the other way
// round, and out float32 [parts, E, iR, jR, b].
void weight_gradient_product_op(const Tensor& x, const Tensor& dz, const Tensor& other, const Tensor& out,
                                const Tensor& offsets, const Optional& row_index, bool of_right) {
  const OnDevice device(x);
  const Tensor &half = of_right ? other : out, &right = of_right ? out : other;
  GradientProduct product;
  fill(product, half, half, right, x, offsets, row_index);
  product.in_features = counted(x.size(1), "columns");
  product.out_features = counted(dz.size(1), "columns");
  product.of_right = of_right;
  product.x = x.const_data_ptr();
  product.dz = dz.const_data_ptr();
  product.other = other.const_data_ptr();
  product.out = out.mutable_data_ptr();
  product.parts = of_right ? counted(out.size(0), "parts") : 1;
  gradient_product(product, device.stream());
}

// Rows [.., P, K], or turned [.., K, P], whose last axis is dense; `chunk`: elements of 16 bytes.
SlotRows rows_of(const Tensor& rows, bool turned, int chunk) {
  SlotRows found{rows.const_data_ptr(), counted(rows.size(turned ? 1 : 2), "columns"),
                 counted(rows.stride(1), "a stride"), rows.stride(0)};
  found.vector = whole(chunk, {counted(rows.size(2), "columns"), found.step, static_cast<int>(found.stride % chunk)},
                       {found.data});
  return found;
}

// rows as above, blocks [E, K, N], out and pre [N, P, N], turned [N, N, P]. clears: see Slots.
void grouped_rows_op(const Tensor& rows, const Tensor& blocks, const Tensor& out, const Tensor& offsets,
                     const Optional& row_index, bool turned, bool clears, const Optional& bias,
                     std::string activation, const Optional& pre, const Optional& out_index, const Optional& gates) {
  const OnDevice device(rows);
  GroupedRows p;
  fill(p, rows, offsets, row_index);
  const int chunk = 16 / static_cast<int>(size_of(p.dtype));
  p.clears = clears;
  p.turned = turned;
  p.of_slot = counted(rows.size(turned ? 2 : 1), "rows");
  p.columns = counted(blocks.size(2), "columns");
  p.rows = rows_of(rows, turned, chunk);
  p.blocks = blocks.const_data_ptr();
  p.out = out.mutable_data_ptr();
  p.epilogue = {data_of(bias), activation_of(activation), const_cast<void*>(data_of(pre)),
                data_of<int64_t>(out_index), data_of<float>(gates)};
  p.vector_blocks = whole(chunk, {p.columns}, {p.blocks});
  p.vector_out = whole(chunk, {turned ? p.of_slot : p.columns}, {p.out, p.epilogue.pre_activation});
  if (p.slots == 0) return;
  with_type(p.dtype, [&](auto zero) { launch<decltype(zero)>(p, device.stream()); });
}

// rows [.., P, M], grads [N, P, N], or turned, blocks [E, M, N]; out float32 [parts, E, M, N]. See GroupedBlocks.
void grouped_blocks_op(const Tensor& rows, const Tensor& grads, const Optional& blocks, const Tensor& out,
                       const Optional& drows, const Optional& again, const Tensor& offsets, const Optional& row_index,
                       bool turned, std::string activation) {
  const OnDevice device(rows);
  GroupedBlocks p;
  fill(p, rows, offsets, row_index);
  p.slots = counted(grads.size(0), "the number of slots");
  const int chunk = 16 / static_cast<int>(size_of(p.dtype));
  p.turned = turned;
  p.of_slot = counted(rows.size(turned ? 2 : 1), "rows");
  p.rows = rows_of(rows, turned, chunk);
  p.grads = rows_of(grads, turned, chunk);
  const auto tiles = [](int extent) { return (extent + kExpertsRows - 1) / kExpertsRows; };
  p.tiles = tiles(p.rows.columns) * tiles(p.grads.columns);
  require(!blocks.has_value() || p.tiles == 1, "gradients of rows and blocks at once are for at most 64 columns");
  p.parts = counted(out.size(0), "parts");
  p.activation = activation_of(activation);
  p.blocks = data_of(blocks);
  p.out = out.mutable_data_ptr<float>();
  p.drows = const_cast<void*>(data_of(drows));
  p.again = const_cast<void*>(data_of(again));
  with_type(p.dtype, [&](auto zero) { launch<decltype(zero)>(p, device.stream()); });
}

}  // namespace
}  // namespace mpoe::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(MPOE_CUDA_OPS, m) {
  m.def(
      "rebuilt_product(Tensor rows, Tensor left, Tensor central, Tensor right, Tensor(a!) out, Tensor offsets, "
      "Tensor? row_index, Tensor? bias, str activation, Tensor(b!)? pre, bool transposed, "
      "Tensor? out_index=None, Tensor? gates=None) -> ()");
  m.def(
      "weight_gradient_product(Tensor x, Tensor dz, Tensor other, Tensor(a!) out, Tensor offsets, Tensor? row_index, "
      "bool of_right) -> ()");
  m.def(
      "grouped_rows(Tensor rows, Tensor blocks, Tensor(a!) out, Tensor offsets, Tensor? row_index, bool turned, "
      "bool clears, Tensor? bias, str activation, Tensor(b!)? pre, Tensor? out_index, Tensor? gates) -> ()");
  m.def(
      "grouped_blocks(Tensor rows, Tensor grads, Tensor? blocks, Tensor(a!) out, Tensor(b!)? drows, Tensor(c!)? again, "
      "Tensor offsets, Tensor? row_index, bool turned, str activation) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(MPOE_CUDA_OPS, MPOE_CUDA_KEY, m) {
  m.impl("rebuilt_product", TORCH_BOX(&mpoe::cuda::rebuilt_product_op));
  m.impl("weight_gradient_product", TORCH_BOX(&mpoe::cuda::weight_gradient_product_op));
  m.impl("grouped_rows", TORCH_BOX(&mpoe::cuda::grouped_rows_op));
  m.impl("grouped_blocks", TORCH_BOX(&mpoe::cuda::grouped_blocks_op));
}
