// experts, experts_backward: checks, allocation, and the launches of experts.h.
#include "cuda/bind.h"

#include <string>
#include <tuple>
#include <vector>

#include "cuda/experts/experts.h"

namespace mpoe::cuda {
namespace {

using Optional = std::optional<Tensor>;

// Dense tensors behind an ExpertsInputs; must outlive it.
struct Experts {
  Tensor x, gates, index, up, down;
  Optional bias, x_gate, up_gate;
  int64_t own, width, units, columns, groups;

  Experts(const Tensor& x_, const Tensor& gates_, const Tensor& index_, const Tensor& up_, const Tensor& down_,
          const Optional& bias_, const Optional& x_gate_, const Optional& up_gate_, bool by_unit)
      : x(dense(x_)), gates(dense(cast(gates_, ScalarType::Float))), index(dense_index(index_, 2, "top_k_index")),
        up(dense(up_)), down(dense(down_)) {
    MPOE_CHECK(x.dim() == 2 && up.dim() == 4 && down.dim() == 4, "x must have 2 axes, up and down 4; got ", x.dim(),
               ", ", up.dim(), " and ", down.dim());
    own = up.size(1);
    width = up.size(by_unit ? 3 : 2);
    units = up.size(by_unit ? 2 : 3);
    columns = down.size(3);
    MPOE_CHECK(up.size(0) > 0 && width > 0 && units > 0 && columns > 0, "up and down must not have an axis of size 0");
    groups = x.size(1) / width;
    MPOE_CHECK(x.size(1) == groups * width && (own == 1 || own == groups),
               "up must have one weight, or one for each group of inputs, of a width that divides ", x.size(1));
    check_same_device({&x, &gates, &index, &up, &down});
    MPOE_CHECK(has_sizes(index, {x.size(0), index.size(1)}) && has_sizes(gates, {x.size(0), index.size(1)}),
               "gates and top_k_index must be [", x.size(0), ", K]");
    check(up, {up.size(0), own, up.size(2), up.size(3)}, "up");
    check(down, {up.size(0), own, units, columns}, "down");
    bias = checked(bias_, {up.size(0), groups * units}, "bias");
    up_gate = checked(up_gate_, {up.size(0), own, up.size(2), up.size(3)}, "up_gate");
    x_gate = checked(x_gate_, {x.size(0), x.size(1)}, "x_gate");
    MPOE_CHECK(x_gate.has_value() == (up_gate.has_value() && !by_unit),
               "x_gate must be given with up_gate, unless both are of x");
  }

  static bool has_sizes(const Tensor& tensor, std::initializer_list<int64_t> sizes) {
    bool same = tensor.dim() == static_cast<int64_t>(sizes.size());
    int64_t axis = 0;
    for (const int64_t size : sizes) same = same && tensor.size(axis++) == size;
    return same;
  }
  void check(const Tensor& tensor, std::initializer_list<int64_t> sizes, const char* name) const {
    check_same_device({&x, &tensor});
    std::string wanted;
    for (const int64_t size : sizes) wanted += (wanted.empty() ? "" : ", ") + std::to_string(size);
    MPOE_CHECK(has_sizes(tensor, sizes) && tensor.scalar_type() == x.scalar_type(), name, " must be [", wanted,
               "] of the dtype of x");
  }
  Optional checked(const Optional& tensor, std::initializer_list<int64_t> sizes, const char* name) const {
    if (!tensor.has_value()) return std::nullopt;
    check(*tensor, sizes, name);
    return dense(*tensor);
  }
  void fill(ExpertsInputs& in, const std::string& activation, bool by_unit, bool tf32) const {
    const auto data = [](const Optional& tensor) { return tensor.has_value() ? tensor->const_data_ptr() : nullptr; };
    in.dtype = kernel_dtype(x, "x");
    in.tf32 = tf32;
    in.tokens = counted(x.size(0), "the number of tokens");
    in.experts = counted(up.size(0), "the number of experts");
    in.top_k = counted(index.size(1), "top_k");
    in.groups = counted(groups, "the number of groups");
    in.own = counted(own, "the number of groups");
    in.width = counted(width, "the width of a group");
    in.units = counted(units, "the number of hidden units");
    in.columns = counted(groups * columns, "the width of the result") / in.groups;
    MPOE_CHECK(up.numel() / up.size(0) / own < 1 << 30 && down.numel() / up.size(0) / own < 1 << 30,
               "an expert's weight must have less than 2^30 elements");
    in.by_unit = by_unit;
    in.activation = activation_of(activation);
    in.x = x.const_data_ptr();
    in.x_gate = data(x_gate);
    in.gates = gates.const_data_ptr<float>();
    in.index = index.const_data_ptr<int64_t>();
    in.up = up.const_data_ptr();
    in.up_gate = data(up_gate);
    in.down = down.const_data_ptr();
    in.bias = data(bias);
  }
};

Tensor experts_op(const Tensor& x, const Tensor& gates, const Tensor& top_k_index, const Tensor& up, const Tensor& down,
                  const Optional& bias, const Optional& x_gate, const Optional& up_gate, bool by_unit,
                  std::string activation, bool tf32) {
  const OnDevice device(x);
  const Experts tensors(x, gates, top_k_index, up, down, bias, x_gate, up_gate, by_unit);
  ExpertsForward in;
  tensors.fill(in, activation, by_unit, tf32);
  const int64_t sizes[] = {x.size(0), tensors.groups * tensors.columns};
  if (tensors.index.numel() == 0) return torch::stable::new_zeros(tensors.x, sizes);
  Tensor out = torch::stable::new_empty(tensors.x, sizes);
  in.out = out.mutable_data_ptr();
  Scratch scratch(tensors.x);
  experts_forward(in, scratch.memory(), device.stream());
  return out;
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Gradients of x, gates, up, down, bias, x_gate, up_gate; empty if `need` is 0 or there is no such input.
Gradients experts_backward_op(const Tensor& grad, const Tensor& x, const Tensor& gates, const Tensor& top_k_index,
                              const Tensor& up, const Tensor& down, const Optional& bias, const Optional& x_gate,
                              const Optional& up_gate, bool by_unit, std::string activation, std::vector<int64_t> need,
                              bool tf32) {
  const OnDevice device(x);
  const Experts tensors(x, gates, top_k_index, up, down, bias, x_gate, up_gate, by_unit);
  MPOE_CHECK(need.size() == 7, "need must have 7 entries; got ", need.size());
  ExpertsBackward in;
  tensors.fill(in, activation, by_unit, tf32);
  const Tensor rows = dense(grad);
  tensors.check(rows, {x.size(0), tensors.groups * tensors.columns}, "grad");
  in.grad = rows.const_data_ptr();
  bool any = false;
  const bool none = tensors.index.numel() == 0;
  const auto place = [&](const Tensor* like, std::size_t which, auto& address) {
    const bool wanted = like != nullptr && need[which] != 0;
    if (wanted && none) return torch::stable::new_zeros(*like, like->sizes());
    Tensor result = wanted ? torch::stable::new_empty(*like, like->sizes()) : torch::stable::new_empty(tensors.x, {0});
    if (wanted) address = static_cast<std::remove_reference_t<decltype(address)>>(result.mutable_data_ptr());
    any = any || wanted;
    return result;
  };
  const auto given = [](const Optional& tensor) { return tensor.has_value() ? &*tensor : nullptr; };
  Tensor dx = place(&tensors.x, 0, in.dx), dgates = place(&tensors.gates, 1, in.dgates);
  Tensor dup = place(&tensors.up, 2, in.dup), ddown = place(&tensors.down, 3, in.ddown);
  Tensor dbias = place(given(tensors.bias), 4, in.dbias), dx_gate = place(given(tensors.x_gate), 5, in.dx_gate);
  Tensor dup_gate = place(given(tensors.up_gate), 6, in.dup_gate);
  Scratch scratch(tensors.x);
  if (any) experts_backward(in, scratch.memory(), device.stream());
  return {dx, need[1] != 0 ? cast(dgates, gates.scalar_type()) : dgates, dup, ddown, dbias, dx_gate, dup_gate};
}

}  // namespace
}  // namespace mpoe::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(MPOE_CUDA_OPS, m) {
  m.def(
      "experts(Tensor x, Tensor gates, Tensor top_k_index, Tensor up, Tensor down, Tensor? bias, Tensor? x_gate, "
      "Tensor? up_gate, bool by_unit, str activation, bool tf32) -> Tensor");
  m.def(
      "experts_backward(Tensor grad, Tensor x, Tensor gates, Tensor top_k_index, Tensor up, Tensor down, Tensor? bias, "
      "Tensor? x_gate, Tensor? up_gate, bool by_unit, str activation, int[] need, bool tf32) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(MPOE_CUDA_OPS, MPOE_CUDA_KEY, m) {
  m.impl("experts", TORCH_BOX(&mpoe::cuda::experts_op));
  m.impl("experts_backward", TORCH_BOX(&mpoe::cuda::experts_backward_op));
}
