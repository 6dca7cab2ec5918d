// routed_ffn: a mixture of feed-forward networks for tokens that are not routed yet: the kernels of
// gating, route, linear_forward (gate, if there is one, and up, whose results are multiplied; then
// down) and combine, one after another. The activation is part of the gate's sizes; without a gate,
// of those of up.
#include <limits>
#include <utility>

#include "bindings/linear.h"
#include "bindings/router.h"
#include "common/buffer.h"
#include "common/parallel.h"
#include "cpu/routing/routing.h"

namespace mpoe {
namespace {

// Sizes; left, central, right, and bias or none.
using GivenProjection = std::pair<LinearSizes, Addresses<4>>;

// A grouped linear layer of the network.
struct Projection {
  LinearSizes sizes;
  Addresses<4> memory;

  explicit Projection(const GivenProjection& given) : sizes(given.first), memory(given.second) {}

  // y [slots, out_features]; slot s reads row row_index[s] of x, without an index row s.
  void run(const void* x,
           int64_t tokens,
           const std::vector<int64_t>& offsets,
           const int64_t* row_index,
           int64_t slots,
           void* y) const {
    const auto [left, central, right, bias] = memory;
    const LinearInputs inputs =
        sizes.inputs(x, tokens, {left, central, right}, offsets, row_index, slots);
    sizes.strategy->forward({inputs, bias, y, nullptr, nullptr});
  }
};

// values[i] *= factors[i]
template <class T>
void multiply(T* values, const T* factors, int64_t count) {
  constexpr int64_t kElementsPerThread = 1 << 15;
  parallel_for(count, kElementsPerThread, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      store(values[i], load(values[i]) * load(factors[i]));
  });
}

// weight: of the router, [experts, features], of a dtype of its own. sizes: tokens, top_k, capacity
// (negative: no limit). raw: the experts' outputs are weighted by their probabilities, otherwise by
// these divided by their sum. x: [tokens, features]; mask: bool [tokens] or none.
// input_projections: gate, then up; or up alone. y: like x.
void routed_ffn(std::string_view weight_dtype,
                const Sizes<3>& sizes,
                bool raw,
                Address x,
                Address weight,
                Address mask,
                const std::vector<GivenProjection>& input_projections,
                const GivenProjection& output_projection,
                Address y) {
  const bool gated = input_projections.size() == 2;
  require(gated || input_projections.size() == 1, "there must be one projection of x, or two");
  const Projection gate_or_up(input_projections.front());
  const Projection up(input_projections.back()), down(output_projection);
  const auto [tokens, top_k, capacity] = sizes;
  const Dtype dtype = up.sizes.dtype;
  const int64_t experts = up.sizes.experts;
  const int64_t features = up.sizes.dims.in_features, hidden = up.sizes.dims.out_features;
  const auto fits = [&](const LinearSizes& other, int64_t in, int64_t out) {
    return other.experts == experts && other.dtype == dtype && other.dims.in_features == in &&
           other.dims.out_features == out;
  };
  require(fits(gate_or_up.sizes, features, hidden) && fits(down.sizes, hidden, features),
          "the projections of a network must fit each other");
  const Router router{dtype, dtype_named(weight_dtype), tokens, features, experts, x, weight};
  require(router.weight_dtype != Dtype::kFloat64, "the router's weight must not be float64");
  require_top_k(top_k, experts);
  const int64_t slots = tokens * top_k;
  require(slots <= std::numeric_limits<int32_t>::max(), "there must be fewer than 2^31 slots");

  Buffer<float> logits(tokens * experts), gates(slots);
  Buffer<int64_t> index(slots), token_of_slot(slots), slot_of_token(slots);
  Buffer<int32_t> narrow_offsets(experts + 1);
  gating({router, top_k, raw, logits.get(), index.get(), gates.get()});
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

  with_element_type(dtype, [&]<class T>(const GemmKernels&, T) {
    Buffer<T> hidden_rows(slots * hidden), out(slots * features);
    up.run(x, tokens, offsets, token_of_slot.get(), slots, hidden_rows.get());
    if (gated) {
      Buffer<T> gate_rows(slots * hidden);
      gate_or_up.run(x, tokens, offsets, token_of_slot.get(), slots, gate_rows.get());
      multiply(hidden_rows.get(), gate_rows.get(), slots * hidden);
    }
    down.run(hidden_rows.get(), slots, offsets, nullptr, slots, out.get());
    combine(
        {dtype, tokens, top_k, slots, features, slot_of_token.get(), gates.get()}, out.get(), y);
  });
}

}  // namespace

void bind_ffn(pybind11::module_& module) {
  module.def("routed_ffn", routed_ffn, WithoutGil());
}

}  // namespace mpoe
