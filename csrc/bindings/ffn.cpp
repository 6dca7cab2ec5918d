// routed_ffn: a mixture of feed-forward networks for tokens that are not routed yet: the kernels of
// gating, route, linear_forward (up and, if there is one, gate, whose results are multiplied; down)
// and combine, one after another.
#include <limits>
#include <utility>

#include "bindings/linear.h"
#include "bindings/router.h"
#include "common/buffer.h"
#include "cpu/routing/routing.h"

namespace mpoe {
namespace {

// Left, central, right; bias or none.
using Projection = std::pair<LinearSizes, Addresses<4>>;

Address address_of(const void* memory) {
  return {reinterpret_cast<std::uintptr_t>(memory)};
}

void project(const Projection& projection,
             Address x,
             int64_t tokens,
             const std::vector<int64_t>& offsets,
             Address rows,
             int64_t slots,
             void* y) {
  const auto& [sizes, memory] = projection;
  const auto [left, central, right, bias] = memory;
  const LinearInputs inputs = sizes.inputs(x, tokens, {left, central, right}, offsets, rows, slots);
  sizes.strategy->forward({inputs, bias, y, nullptr, nullptr});
}

template <class T>
void multiply(void* values, const void* factors, int64_t count) {
  T* out = static_cast<T*>(values);
  for (int64_t i = 0; i < count; ++i)
    store(out[i], load(out[i]) * load(static_cast<const T*>(factors)[i]));
}

// sizes: tokens, top_k, capacity (negative: no limit). x: [tokens, features]; weight: of the
// router, [experts, features]; mask: bool [tokens] or none; of_rows: one projection of x, or two,
// whose results are multiplied; y: like x.
void routed_ffn(std::string_view weight_dtype,
                const Sizes<3>& sizes,
                bool raw,
                Address x,
                Address weight,
                Address mask,
                const std::vector<Projection>& of_rows,
                const Projection& down,
                Address y) {
  require(of_rows.size() == 1 || of_rows.size() == 2, "there must be one projection of x, or two");
  const auto [tokens, top_k, capacity] = sizes;
  const LinearSizes& up = of_rows.back().first;
  const Dtype dtype = up.dtype;
  const int64_t experts = up.experts, features = up.dims.in_features, hidden = up.dims.out_features;
  const auto fits = [&](const LinearSizes& other, int64_t in, int64_t out) {
    return other.experts == experts && other.dtype == dtype && other.dims.in_features == in &&
           other.dims.out_features == out;
  };
  require(fits(of_rows.front().first, features, hidden) && fits(down.first, hidden, features),
          "the projections of a network must fit each other");
  const Router router{dtype, dtype_named(weight_dtype), tokens, features, experts, x, weight};
  require(router.weight_dtype != Dtype::kFloat64, "the router's weight must not be float64");
  const int64_t slots = tokens * top_k;
  require(slots <= std::numeric_limits<int32_t>::max(), "there must be fewer than 2^31 slots");

  Buffer<float> logits(tokens * experts), gates(slots);
  Buffer<int64_t> index(slots), token_of_slot(slots), slot_of_token(slots);
  Buffer<int32_t> narrow_offsets(experts + 1);
  gating(checked_gating(router, top_k, raw, logits.get(), index.get(), gates.get()));
  route({
      .index = index.get(),
      .tokens = tokens,
      .top_k = top_k,
      .experts = experts,
      .capacity = capacity,
      .token_mask = mask,
      .expert_offsets = narrow_offsets.get(),
      .token_of_slot = token_of_slot.get(),
      .slot_of_token = slot_of_token.get(),
  });
  const std::vector<int64_t> offsets(narrow_offsets.get(), narrow_offsets.get() + experts + 1);

  const int64_t element = size_of(dtype);
  Buffer<char> rows(slots * hidden * element), out(slots * features * element), factors;
  const auto project_x = [&](const Projection& projection, char* results) {
    project(projection, x, tokens, offsets, address_of(token_of_slot.get()), slots, results);
  };
  project_x(of_rows.front(), rows.get());
  if (of_rows.size() == 2) {
    factors = Buffer<char>(slots * hidden * element);
    project_x(of_rows.back(), factors.get());
    (dtype == Dtype::kFloat32 ? multiply<float>
                              : multiply<BFloat16>)(rows.get(), factors.get(), slots * hidden);
  }
  project(down, address_of(rows.get()), slots, offsets, {}, slots, out.get());
  combine({dtype, tokens, top_k, slots, features, slot_of_token.get(), gates.get()}, out.get(), y);
}

}  // namespace

void bind_ffn(pybind11::module_& module) {
  module.def("routed_ffn", routed_ffn, WithoutGil());
}

}  // namespace mpoe
