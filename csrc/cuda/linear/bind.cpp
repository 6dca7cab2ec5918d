// The fused contraction: rows times weights (rebuilt.cuh), and weights' gradients times blocks
// (gradient.cuh). Called by mpoe_kernels/linear/cuda.py with dense tensors; the op has checked its
// arguments.
#include "cuda/bind.h"

#include <utility>

#include "cuda/linear/linear.h"

namespace mpoe::cuda {
namespace {

void fill_slots(Slots& slots,
                const Tensor& rows,
                const Tensor& offsets,
                const Optional& row_index) {
  slots.dtype = kernel_dtype(rows);
  slots.experts = counted(offsets.size(0) - 1, "the number of experts");
  slots.slots = counted(row_index.value_or(rows).size(0), "the number of slots");
  slots.offsets = offsets.const_data_ptr<int>();
  slots.row_index = data_of<int64_t>(row_index);
}

// Limits what one expert has of a block, the axes from `first` on: the kernels count its elements in
// 32 bits. One bit is to spare.
void require_placeable(const char* block, const Tensor& tensor, int64_t first) {
  int64_t elements = 1;
  for (int64_t axis = first; axis < tensor.dim(); ++axis)
    elements *= tensor.size(axis);
  require(elements < 1 << 30, block, " must have less than 2^30 elements; got ", elements);
}

// The digits of W's rows and columns of core number `core` (0 to 2: left, central, right), from
// the axes i and i + 1 of a block.
void set_digits(LinearSizes& sizes, int core, const Tensor& block, int64_t i) {
  sizes.i[core] = static_cast<int>(block.size(i));
  sizes.j[core] = static_cast<int>(block.size(i + 1));
}

// right: [.., iR, jR, b], the axes before are experts', and perhaps parts'.
void set_right(LinearSizes& sizes, const Tensor& right) {
  const int64_t i = right.dim() - 3;
  require_placeable("right", right, i);
  set_digits(sizes, 2, right, i);
  sizes.b = static_cast<int>(right.size(i + 2));
}

// left: [E, iL, jL, a]; central: [a, iC, jC, b]; right: [E, iR, jR, b].
LinearSizes sizes_of_blocks(const Tensor& left, const Tensor& central, const Tensor& right) {
  require_placeable("left", left, 1);
  require_placeable("central", central, 0);
  LinearSizes sizes;
  set_digits(sizes, 0, left, 1);
  set_digits(sizes, 1, central, 1);
  set_right(sizes, right);
  sizes.a = static_cast<int>(left.size(3));
  return sizes;
}

// half: left central, [E, iL, jL, iC, jC, b]; right: [E, iR, jR, b] or [parts, E, iR, jR, b].
// There is no bond a.
LinearSizes sizes_of_half(const Tensor& half, const Tensor& right) {
  require_placeable("half", half, 1);
  LinearSizes sizes;
  set_digits(sizes, 0, half, 1);
  set_digits(sizes, 1, half, 3);
  set_right(sizes, right);
  return sizes;
}

// out[s] = activation(rows[row_index[s]] W_e + bias), for slots s of expert e.
//
// rows: [T or N, D]; transposed: [T or N, F], times W_e transposed.
// left, central, right: of W, see sizes_of_blocks.
// out: [N, F]; transposed: [N, D]. Slots past the last expert's become zero.
// offsets: int32 [E + 1], the slots of expert e are offsets[e] to offsets[e + 1].
// row_index: int64 [N], the row that a slot reads; without it, T = N and a slot reads its own.
// bias: of out's columns.
// activation: none, relu, gelu, gelu_tanh or silu.
// pre: like out, by slot: what the activation is applied to, also written.
// out_index: int64 [N], the row of out that a slot writes; without it, its own.
// gates: float32 [N], by row of out: its factor, after rounding; without it, 1.
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
  RebuiltProduct product{sizes_of_blocks(left, central, right)};
  fill_slots(product, rows, offsets, row_index);
  product.in_features = counted(rows.size(1), "columns");
  product.out_features = counted(out.size(1), "columns");
  if (transposed)
    std::swap(product.in_features, product.out_features);
  product.transposed = transposed;
  product.rows = rows.const_data_ptr();
  product.left = left.const_data_ptr();
  product.central = central.const_data_ptr();
  product.right = right.const_data_ptr();
  product.out = out.mutable_data_ptr();
  product.epilogue = {data_of(bias),
                      activation_of(activation),
                      pre ? pre->mutable_data_ptr() : nullptr,
                      data_of<int64_t>(out_index),
                      data_of<float>(gates)};
  rebuilt_product(product, device.stream());
}

// The gradient x^T dz of W_e, summed over the slots of expert e and multiplied by one of the blocks
// on chip; never in memory.
//
// x: [T or N, D], read by row_index; dz: [N, F]; offsets, row_index: as above.
// other: right [E, iR, jR, b]; out: the gradient of half = left central, [E, iL, jL, iC, jC, b].
// of_right: other is half; out is right's gradient, float32 [parts, E, iR, jR, b], whose parts the
// caller adds up: the sum is over few tiles, and parts let several blocks of threads share it.
void weight_gradient_product_op(const Tensor& x,
                                const Tensor& dz,
                                const Tensor& other,
                                const Tensor& out,
                                const Tensor& offsets,
                                const Optional& row_index,
                                bool of_right) {
  const OnDevice device(x);
  GradientProduct product{of_right ? sizes_of_half(other, out) : sizes_of_half(out, other)};
  fill_slots(product, x, offsets, row_index);
  product.in_features = counted(x.size(1), "columns");
  product.out_features = counted(dz.size(1), "columns");
  product.of_right = of_right;
  product.x = x.const_data_ptr();
  product.dz = dz.const_data_ptr();
  product.other = other.const_data_ptr();
  product.out = out.mutable_data_ptr();
  if (of_right)
    product.parts = counted(out.size(0), "parts");
  gradient_product(product, device.stream());
}

}  // namespace
}  // namespace mpoe::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(MPOE_CUDA_OPS, m) {
  m.def(
      "rebuilt_product(Tensor rows, Tensor left, Tensor central, Tensor right, Tensor(a!) out, "
      "Tensor offsets, Tensor? row_index, "
      "Tensor? bias, str activation, Tensor(b!)? pre, "
      "bool transposed, "
      "Tensor? out_index=None, Tensor? gates=None) -> ()");
  m.def(
      "weight_gradient_product(Tensor x, Tensor dz, Tensor other, Tensor(a!) out, "
      "Tensor offsets, Tensor? row_index, "
      "bool of_right) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(MPOE_CUDA_OPS, MPOE_CUDA_KEY, m) {
  m.impl("rebuilt_product", TORCH_BOX(&mpoe::cuda::rebuilt_product_op));
  m.impl("weight_gradient_product", TORCH_BOX(&mpoe::cuda::weight_gradient_product_op));
}
