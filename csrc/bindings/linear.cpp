// linear_forward and linear_backward: checks, and the kernels of cpu/linear/linear.h.
#include "bindings/linear.h"

#include <pybind11/functional.h>

#include <optional>

namespace mpoe {

LinearInputs LinearSizes::inputs(const void* x,
                                 int64_t tokens,
                                 const Addresses<3>& blocks,
                                 const std::vector<int64_t>& offsets,
                                 const int64_t* row_index,
                                 int64_t slots) const {
  const auto [left, central, right] = blocks;
  return {dtype,
          dims,
          order,
          x,
          tokens,
          left,
          central,
          right,
          experts,
          offsets.data(),
          row_index,
          slots,
          activation};
}

namespace {

constexpr LinearStrategy kStrategies[] = {
    {"separable", separable_forward, separable_backward},
    {"rebuild", rebuild_forward, rebuild_backward},
    {"half_left", half_left_forward, half_left_backward},
    {"chain", chain_forward, chain_backward},
};

const LinearStrategy& strategy_named(std::string_view name) {
  for (const LinearStrategy& strategy : kStrategies)
    if (strategy.name == name)
      return strategy;
  refuse("no native kernel for strategy ", name);
}

// chain: a permutation of left (0), central (1) and right (2), the order in which rows meet them.
// half_first: half_left: rows meet the half-built weight before right; exchanged_half_first: the
// same for rows of the gradient.
ProductOrder checked_order(const Sizes<3>& chain, bool half_first, bool exchanged_half_first) {
  ProductOrder order{};
  int met = 0;
  for (std::size_t s = 0; s < 3; ++s) {
    require(chain[s] >= 0 && chain[s] <= 2,
            "an operand of the chain must be 0, 1 or 2; got ",
            chain[s]);
    order.chain[s] = static_cast<Operand>(chain[s]);
    met |= 1 << chain[s];
  }
  require(met == 7, "the chain must meet left, central and right once each");
  order.half_first = half_first;
  order.exchanged_half_first = exchanged_half_first;
  return order;
}

// sizes: iL, jL, a, iC, jC, b, iR, jR, in_features, out_features.
LinearSizes checked_sizes(std::string_view dtype,
                          std::string_view activation,
                          std::string_view strategy,
                          int64_t experts,
                          const Sizes<10>& sizes,
                          const Sizes<3>& chain,
                          bool half_first,
                          bool exchanged_half_first) {
  const auto [iL, jL, a, iC, jC, b, iR, jR, in_features, out_features] = sizes;
  const BlockDims dims{iL, jL, a, iC, jC, b, iR, jR, in_features, out_features};
  const Dtype type = gemm_dtype_named(dtype);

  const Activation function = activation_named(activation);
  require(in_features >= 1 && out_features >= 1, "in_features and out_features must be positive");
  require(dims.padded_in() >= in_features && dims.padded_out() >= out_features,
          "blocks are smaller than the weight: they give ",
          dims.padded_in(),
          " x ",
          dims.padded_out(),
          ", wanted are ",
          in_features,
          " x ",
          out_features);
  const ProductOrder order = checked_order(chain, half_first, exchanged_half_first);
  const LinearSizes found{type, function, &strategy_named(strategy), experts, dims, order};
  require(!found.is_separable() || (jL == 1 && iR == 1),
          "strategy separable needs blocks with jL = iR = 1");
  return found;
}

void require_rows(Address rows, int64_t slots, int64_t tokens) {
  if (rows.is_given())
    require_range(rows, slots, 0, tokens - 1, "row_index");
  else
    require(slots == tokens, "without row_index there must be as many slots as rows of x");
}

// The product with central by the caller: a function, and the addresses of t, dh and dt of
// CentralProduct.
using GivenProduct = std::optional<std::pair<std::function<void()>, Addresses<3>>>;

std::optional<CentralProduct> checked_product(const LinearSizes& sizes, GivenProduct& given) {
  if (!given)
    return std::nullopt;
  const int64_t unit = gemm_kernels(sizes.dtype).unit;
  require(sizes.is_separable(), "only strategy separable takes a product with central");
  require(sizes.dims.a * sizes.dims.iC % unit == 0 && sizes.dims.b % unit == 0,
          "a product with central needs rows of whole units of ",
          unit);
  const auto [t, dh, dt] = given->second;
  return CentralProduct{std::move(given->first), t, dh, dt};
}

// x: [tokens, in_features]; blocks: left [experts, iL, jL, a], central [a, iC, jC, b], right
// [experts, b, iR, jR]; offsets: [experts + 1]; rows: int64 [slots], none: slot s reads row s;
// bias: [out_features] or none. Results: y [slots, out_features]; h [slots * jC, b], only by
// strategy separable, and z, the pre-activation, like y: none: not saved.
void bound_linear(const LinearSizes& sizes,
                  int64_t tokens,
                  int64_t slots,
                  int64_t offset_bytes,
                  Address x,
                  const Addresses<3>& blocks,
                  Address offsets,
                  Address rows,
                  Address bias,
                  Address y,
                  Address h,
                  Address z,
                  GivenProduct given) {
  const auto checked = checked_offsets(offsets, offset_bytes, sizes.experts, slots);
  require_rows(rows, slots, tokens);
  const std::optional<CentralProduct> product = checked_product(sizes, given);
  require(!h.is_given() || sizes.is_separable(), "only strategy separable saves its central step");
  require(!product || (product->t != nullptr && h.is_given()),
          "a product with central needs memory for its rows");
  LinearInputs inputs = sizes.inputs(x, tokens, blocks, checked, rows, slots);
  inputs.product = product ? &*product : nullptr;
  sizes.strategy->forward({inputs, bias, y, h, z});
}

// grad: [slots, out_features]; h: of the forward, read only by strategy separable; saved: like
// grad, y of the forward for relu, z for the rest, not read without an activation. results: dx,
// dleft, dcentral, dright, dbias; none: not wanted.
void bound_linear_backward(const LinearSizes& sizes,
                           int64_t tokens,
                           int64_t slots,
                           int64_t offset_bytes,
                           Address x,
                           const Addresses<3>& blocks,
                           Address offsets,
                           Address rows,
                           Address grad,
                           Address h,
                           Address saved,
                           const Addresses<5>& results,
                           GivenProduct given) {
  const auto checked = checked_offsets(offsets, offset_bytes, sizes.experts, slots);
  require_rows(rows, slots, tokens);
  const std::optional<CentralProduct> product = checked_product(sizes, given);
  require(!product || (product->t != nullptr && product->dh != nullptr && product->dt != nullptr),
          "a product with central needs memory for its rows");
  LinearInputs inputs = sizes.inputs(x, tokens, blocks, checked, rows, slots);
  inputs.product = product ? &*product : nullptr;
  const auto [dx, dleft, dcentral, dright, dbias] = results;
  sizes.strategy->backward({inputs, grad, h, saved, dx, dleft, dcentral, dright, dbias});
}

}  // namespace

void bind_linear(pybind11::module_& module) {
  pybind11::class_<LinearSizes>(module, "LinearSizes", pybind11::module_local())
      .def(pybind11::init(&checked_sizes));
  module.def("linear_forward", bound_linear, WithoutGil());
  module.def("linear_backward", bound_linear_backward, WithoutGil());
}

}  // namespace mpoe
