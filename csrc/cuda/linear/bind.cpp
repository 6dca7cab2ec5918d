// The fused contraction: rows times weights (rebuilt.cuh), and weights' gradients times blocks (gradient.cuh). Checks and
// launches; called by mpoe_kernels/linear/cuda.py.
#include "cuda/bind.h"

#include <string>

#include "cuda/linear/linear.h"

namespace mpoe::cuda {
namespace {

using Optional = std::optional<Tensor>;

// Address of a dense tensor of the dtype and on the device of the rows.
const void* data_of(const Optional& tensor, const Tensor& like, const char* name) {
  if (!tensor.has_value()) return nullptr;
  check_same_device({&like, &*tensor});
  MPOE_CHECK(tensor->scalar_type() == like.scalar_type() && tensor->is_contiguous(), name,
             " must be dense and of the dtype of the rows");
  return tensor->const_data_ptr();
}
template <class T>
const T* vector_of(const Optional& tensor, const Tensor& like, int64_t size, const char* name, ScalarType dtype) {
  if (!tensor.has_value()) return nullptr;
  check_same_device({&like, &*tensor});
  MPOE_CHECK(tensor->dim() == 1 && tensor->size(0) == size && tensor->scalar_type() == dtype && tensor->is_contiguous(),
             name, " must be dense ", dtype == ScalarType::Float ? "float32" : dtype == ScalarType::Int ? "int32" : "int64",
             " [", size, "]");
  return tensor->const_data_ptr<T>();
}
void check_columns(const Tensor& rows, const int (&digits)[3], int64_t slots, const char* name) {
  const int64_t most = int64_t(digits[0]) * digits[1] * digits[2];
  MPOE_CHECK(rows.dim() == 2 && rows.size(1) <= most && (slots < 0 || rows.size(0) == slots), name, " must be [",
             slots < 0 ? std::string("..") : std::to_string(slots), ", at most ", most, "]");
  MPOE_CHECK(rows.size(1) > 0, name, " must have columns");
}

// left [E, iL, jL, a], central [a, iC, jC, b] and right [E, iR, jR, b]; or half [E, iL, jL, iC, jC, b] instead of the
// former two.
void fill(LinearSizes& sizes, const Tensor& left, const Tensor& central, const Tensor& right, const Tensor& rows,
          const Tensor& offsets, const Optional& row_index, bool tf32) {
  const bool halved = left.dim() == 6;
  const int last = static_cast<int>(right.dim()) - 1;
  MPOE_CHECK((halved || (left.dim() == 4 && central.dim() == 4 && left.size(3) == central.size(0))) && last >= 3 &&
                 left.size(0) == right.size(last - 3) && central.size(central.dim() - 1) == right.size(last) &&
                 left.numel() > 0 && central.numel() > 0 && right.numel() > 0,
             "blocks must be left [E, iL, jL, a], central [a, iC, jC, b], right [E, iR, jR, b]");
  const int64_t digits[] = {left.size(1), left.size(2), central.size(halved ? 3 : 1), central.size(halved ? 4 : 2),
                            right.size(last - 2), right.size(last - 1)};
  for (int n = 0; n < 3; ++n) {
    sizes.i[n] = counted(digits[2 * n], "a dimension of the blocks");
    sizes.j[n] = counted(digits[2 * n + 1], "a dimension of the blocks");
  }
  MPOE_CHECK(left.numel() / left.size(0) < 1 << 30 && central.numel() < 1 << 30, "blocks must have less than 2^30 elements");
  sizes.dtype = kernel_dtype(rows, "x");
  sizes.tf32 = tf32;
  sizes.a = halved ? 1 : counted(left.size(3), "a bond");
  sizes.b = counted(right.size(last), "a bond");
  sizes.experts = counted(left.size(0), "the number of experts");
  sizes.slots = counted(row_index.has_value() ? row_index->size(0) : rows.size(0), "the number of slots");
  sizes.offsets = vector_of<int>(offsets, rows, sizes.experts + 1, "expert_offsets", ScalarType::Int);
  sizes.row_index = vector_of<int64_t>(row_index, rows, sizes.slots, "row_index", ScalarType::Long);
}

// transposed: rows are [N, F], times W^T.
void rebuilt_product_op(const Tensor& rows, const Tensor& left, const Tensor& central, const Tensor& right,
                        const Tensor& out, const Tensor& offsets, const Optional& row_index, const Optional& bias,
                        std::string activation, const Optional& pre, bool transposed, bool tf32,
                        const Optional& out_index, const Optional& gates) {
  const OnDevice device(rows);
  RebuiltProduct product;
  fill(product, left, central, right, rows, offsets, row_index, tf32);
  const auto &from = transposed ? product.j : product.i, &to = transposed ? product.i : product.j;
  check_columns(rows, from, -1, "rows");
  check_columns(out, to, product.slots, "the result");
  const int64_t columns = out.size(1);
  MPOE_CHECK(!pre.has_value() || (pre->dim() == 2 && pre->size(0) == product.slots && pre->size(1) == columns),
             "what is saved must be like the result");
  MPOE_CHECK(!bias.has_value() || bias->numel() == columns, "bias must be [", columns, "]");
  (transposed ? product.out_features : product.in_features) = counted(rows.size(1), "columns");
  (transposed ? product.in_features : product.out_features) = counted(columns, "columns");
  product.transposed = transposed;
  product.rows = data_of(rows, rows, "rows");
  product.left = data_of(left, rows, "left");
  product.central = data_of(central, rows, "central");
  product.right = data_of(right, rows, "right");
  product.out = const_cast<void*>(data_of(out, rows, "the result"));
  product.epilogue = {data_of(bias, rows, "bias"), activation_of(activation),
                      const_cast<void*>(data_of(pre, rows, "what is saved")),
                      vector_of<int64_t>(out_index, rows, product.slots, "out_index", ScalarType::Long),
                      vector_of<float>(gates, rows, product.slots, "gates", ScalarType::Float)};
  rebuilt_product(product, device.stream());
}

// other: right [E, iR, jR, b], and out like half = left central [E, iL, jL, iC, jC, b]; or if of_right the other way
// round, and out float32 [parts, E, iR, jR, b].
void weight_gradient_product_op(const Tensor& x, const Tensor& dz, const Tensor& other, const Tensor& out,
                                const Tensor& offsets, const Optional& row_index, bool of_right, bool tf32) {
  const OnDevice device(x);
  const Tensor &half = of_right ? other : out, &right = of_right ? out : other;
  MPOE_CHECK(half.dim() == 6 && right.dim() == (of_right ? 5 : 4), "half must have 6 axes and right 4; got ", half.dim(),
             " and ", right.dim());
  GradientProduct product;
  fill(product, half, half, right, x, offsets, row_index, tf32);
  check_columns(x, product.i, -1, "x");
  check_columns(dz, product.j, product.slots, "dz");
  product.in_features = counted(x.size(1), "columns");
  product.out_features = counted(dz.size(1), "columns");
  product.of_right = of_right;
  product.x = data_of(x, x, "x");
  product.dz = data_of(dz, x, "dz");
  product.other = data_of(other, x, "other");
  check_same_device({&x, &out});
  MPOE_CHECK(out.scalar_type() == (of_right ? ScalarType::Float : x.scalar_type()) && out.is_contiguous(),
             "out must be dense, of the dtype of x, or float32 for parts of a sum");
  product.out = out.mutable_data_ptr();
  product.parts = of_right ? counted(out.size(0), "parts") : 1;
  gradient_product(product, device.stream());
}

}  // namespace
}  // namespace mpoe::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(MPOE_CUDA_OPS, m) {
  m.def(
      "rebuilt_product(Tensor rows, Tensor left, Tensor central, Tensor right, Tensor(a!) out, Tensor offsets, "
      "Tensor? row_index, Tensor? bias, str activation, Tensor(b!)? pre, bool transposed, bool tf32, "
      "Tensor? out_index=None, Tensor? gates=None) -> ()");
  m.def(
      "weight_gradient_product(Tensor x, Tensor dz, Tensor other, Tensor(a!) out, Tensor offsets, Tensor? row_index, "
      "bool of_right, bool tf32) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(MPOE_CUDA_OPS, MPOE_CUDA_KEY, m) {
  m.impl("rebuilt_product", TORCH_BOX(&mpoe::cuda::rebuilt_product_op));
  m.impl("weight_gradient_product", TORCH_BOX(&mpoe::cuda::weight_gradient_product_op));
}
