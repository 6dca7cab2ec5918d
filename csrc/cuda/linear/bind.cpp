// The fused contraction: rows times weights (rebuilt.cuh), and weights' gradients times blocks
// (gradient.cuh). Called by mpoe_kernels/linear/cuda.py with dense tensors; the op has checked its
// arguments.
#include "cuda/bind.h"

#include "cuda/linear/linear.h"

namespace mpoe::cuda {
namespace {

void fill(Slots& slots, const Tensor& rows, const Tensor& offsets, const Optional& row_index) {
  slots.dtype = kernel_dtype(rows);
  slots.experts = counted(offsets.size(0) - 1, "the number of experts");
  slots.slots =
      counted(row_index.has_value() ? row_index->size(0) : rows.size(0), "the number of slots");
  slots.offsets = offsets.const_data_ptr<int>();
  slots.row_index = data_of<int64_t>(row_index);
}

// left [E, iL, jL, a], central [a, iC, jC, b] and right [E, iR, jR, b]; or half [E, iL, jL, iC, jC,
// b] instead of both of the former. right may have an axis more before.
void fill(LinearSizes& sizes,
          const Tensor& left,
          const Tensor& central,
          const Tensor& right,
          const Tensor& rows,
          const Tensor& offsets,
          const Optional& row_index) {
  const bool halved = left.dim() == 6;
  const int last = static_cast<int>(right.dim()) - 1;
  require(left.numel() / left.size(0) < 1 << 30 &&
              central.numel() / (halved ? left.size(0) : 1) < 1 << 30,
          "blocks must have less than 2^30 elements");
  const int64_t digits[] = {left.size(1),
                            left.size(2),
                            central.size(halved ? 3 : 1),
                            central.size(halved ? 4 : 2),
                            right.size(last - 2),
                            right.size(last - 1)};
  for (int n = 0; n < 3; ++n) {
    sizes.i[n] = counted(digits[2 * n], "a dimension of the blocks");
    sizes.j[n] = counted(digits[2 * n + 1], "a dimension of the blocks");
  }
  fill(sizes, rows, offsets, row_index);
  sizes.a = halved ? 1 : counted(left.size(3), "a bond");
  sizes.b = counted(right.size(last), "a bond");
}

// transposed: rows are [N, F], times W^T.
void rebuilt_product_op(const Tensor& rows,
                        const Tensor& left,
                        const Tensor& central,
                        const Tensor& right,
                        const Tensor& out,
                        const Tensor& offsets,
                        const Optional& row_index,
                        const Optional& bias,
                        std::string activation,
                        const Optional& pre,
                        bool transposed,
                        const Optional& out_index,
                        const Optional& gates) {
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
  product.epilogue = {data_of(bias),
                      activation_of(activation),
                      const_cast<void*>(data_of(pre)),
                      data_of<int64_t>(out_index),
                      data_of<float>(gates)};
  rebuilt_product(product, device.stream());
}

// other: right [E, iR, jR, b], and out like half = left central [E, iL, jL, iC, jC, b]; or if
// of_right the other way round, and out float32 [parts, E, iR, jR, b].
void weight_gradient_product_op(const Tensor& x,
                                const Tensor& dz,
                                const Tensor& other,
                                const Tensor& out,
                                const Tensor& offsets,
                                const Optional& row_index,
                                bool of_right) {
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

}  // namespace
}  // namespace mpoe::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(MPOE_CUDA_OPS, m) {
  m.def(
      "rebuilt_product(Tensor rows, Tensor left, Tensor central, Tensor right, Tensor(a!) out, "
      "Tensor offsets, "
      "Tensor? row_index, Tensor? bias, str activation, Tensor(b!)? pre, bool transposed, "
      "Tensor? out_index=None, Tensor? gates=None) -> ()");
  m.def(
      "weight_gradient_product(Tensor x, Tensor dz, Tensor other, Tensor(a!) out, Tensor offsets, "
      "Tensor? row_index, "
      "bool of_right) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(MPOE_CUDA_OPS, MPOE_CUDA_KEY, m) {
  m.impl("rebuilt_product", TORCH_BOX(&mpoe::cuda::rebuilt_product_op));
  m.impl("weight_gradient_product", TORCH_BOX(&mpoe::cuda::weight_gradient_product_op));
}
