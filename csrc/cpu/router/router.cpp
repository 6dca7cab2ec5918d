// Logits of all tokens, then each token's best experts and their gates. Logits are computed
//
//                                             x, weight bfloat16    other types, as float copies
//   few experts, few tokens, or odd features  dots of bfloat16      dots of float
//   else, by packed panels of the weight      tiles of bfloat16     tiles of float
//
// where features are odd if they are no whole units of gemm.h; of float, all are.
#include "cpu/router/router.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "common/buffer.h"
#include "common/parallel.h"
#include "cpu/gemm/multiply.h"
#include "cpu/routing/rows.h"

namespace mpoe {
namespace {

// Up to this many experts or tokens, a product that packs the weight takes longer than a dot
// product per logit: its tiles are wider than the experts are many, or hold few rows.
constexpr int64_t kFewExperts = 16, kFewTokens = 8;

const void* at(const void* base, int64_t elements, Dtype dtype) {
  return static_cast<const char*>(base) + elements * size_of(dtype);
}

// Numbers that are float, or a float copy of them.
class Floats32 {
 public:
  Floats32(Dtype dtype, int64_t most) : dtype_(dtype), copy_(dtype == Dtype::kFloat32 ? 0 : most) {}

  const float* operator()(const void* numbers, int64_t count) {
    if (dtype_ == Dtype::kFloat32)
      return static_cast<const float*>(numbers);
    row_functions(dtype_).widen(numbers, copy_.get(), count);
    return copy_.get();
  }

 private:
  const Dtype dtype_;
  Buffer<float> copy_;
};

// f(first token, tokens) for strips of a tile's height, whose float copies stay in the L2 cache.
template <class F>
void for_strips(const Router& r, const F& f) {
  parallel_for_each(ceil_divide(r.tokens, kStripRows), 1, [&](int64_t strip) {
    const int64_t first = strip * kStripRows;
    f(first, std::min(kStripRows, r.tokens - first));
  });
}

// `gemm`: of weight's type; rows_of(first token, tokens, use) calls use(rows of that type).
template <class T, class Rows>
void logits_by_dots(
    const Router& r, const GemmKernels& gemm, const T* weight, float* logits, const Rows& rows_of) {
  for_strips(r, [&](int64_t first, int64_t count) {
    rows_of(first, count, [&](const T* rows) {
      gemm.multiply_dots(count,
                         r.experts,
                         r.features,
                         rows,
                         r.features,
                         weight,
                         r.features,
                         logits + first * r.experts,
                         r.experts);
    });
  });
}

// The same with packed panels of the weight.
template <class T, class Rows>
void logits_by_tiles(
    const Router& r, const GemmKernels& gemm, const T* weight, float* logits, const Rows& rows_of) {
  const int64_t wide = round_up(r.experts, kPanel);
  Buffer<T> panels(wide * r.features);
  gemm.pack_transposed(
      panels.get(), r.features / gemm.unit, weight, r.features, r.features, r.experts);
  for_strips(r, [&](int64_t first, int64_t count) {
    rows_of(first, count, [&](const T* rows) {
      multiply_all(gemm,
                   count,
                   r.features,
                   rows,
                   r.features,
                   panels.get(),
                   r.experts,
                   [&](int64_t row, int64_t tile_rows, int64_t c, const float* tile) {
                     for (int64_t i = 0; i < tile_rows; ++i)
                       std::copy_n(tile + i * kPanel,
                                   std::min(kPanel, r.experts - c),
                                   logits + (first + row + i) * r.experts + c);
                   });
    });
  });
}

// The best experts of one token, in the order of scores and, among equal ones, of numbers; if a
// score is NaN, false and the first experts.
bool find_best(const float* scores, int64_t experts, int64_t top_k, int64_t* index) {
  bool has_nan = false;
  for (int64_t e = 0; e < experts; ++e)
    has_nan |= std::isnan(scores[e]);
  if (has_nan) {
    for (int64_t k = 0; k < top_k; ++k)
      index[k] = k;
    return false;
  }
  int64_t count = 0;
  float smallest = 0;  // of the scores of those in index, which are sorted
  for (int64_t e = 0; e < experts; ++e) {
    if (count == top_k && scores[e] <= smallest)
      continue;
    // Moves ahead of those whose scores are smaller; of a full list the last one is dropped.
    int64_t place = count < top_k ? count++ : count - 1;
    for (; place > 0 && scores[e] > scores[index[place - 1]]; --place)
      index[place] = index[place - 1];
    index[place] = e;
    smallest = scores[index[count - 1]];
  }
  return true;
}

// The best experts of one token, and their gates, exp(logit - largest) / sum: the sum is over all
// experts, or over these if not `raw`.
void choose(const Gating& a, const float* logits, int64_t* index, float* gates) {
  constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
  const bool is_ordered = find_best(logits, a.router.experts, a.top_k, index);
  const float largest = logits[index[0]];
  float sum = 0;
  if (a.raw)
    for (int64_t e = 0; e < a.router.experts; ++e)
      sum += std::exp(logits[e] - largest);
  for (int64_t k = 0; k < a.top_k; ++k) {
    gates[k] = is_ordered && std::isfinite(largest) ? std::exp(logits[index[k]] - largest) : kNaN;
    if (!a.raw)
      sum += gates[k];
  }
  for (int64_t k = 0; k < a.top_k; ++k)
    gates[k] /= sum;
}

}  // namespace

void router_logits(const Router& r, float* logits) {
  if (r.tokens == 0)
    return;
  const bool repays_packing = r.tokens > kFewTokens && r.experts > kFewExperts;
  const auto compute = [&](const GemmKernels& gemm, const auto* weight, const auto& rows_of) {
    if (repays_packing && r.features % gemm.unit == 0)
      logits_by_tiles(r, gemm, weight, logits, rows_of);
    else
      logits_by_dots(r, gemm, weight, logits, rows_of);
  };
  if (r.x_dtype == Dtype::kBFloat16 && r.weight_dtype == Dtype::kBFloat16) {
    const BFloat16* const x = static_cast<const BFloat16*>(r.x);
    compute(gemm_kernels(Dtype::kBFloat16),
            static_cast<const BFloat16*>(r.weight),
            [&](int64_t first, int64_t, const auto& use) { use(x + first * r.features); });
    return;
  }
  Floats32 weight(r.weight_dtype, r.experts * r.features);
  compute(gemm_kernels(Dtype::kFloat32),
          weight(r.weight, r.experts * r.features),
          [&](int64_t first, int64_t count, const auto& use) {
            Floats32 rows(r.x_dtype, count * r.features);
            use(rows(at(r.x, first * r.features, r.x_dtype), count * r.features));
          });
}

void gating(const Gating& a) {
  const int64_t experts = a.router.experts;
  router_logits(a.router, a.logits);
  parallel_for_each(a.router.tokens, 256, [&](int64_t t) {
    choose(a, a.logits + t * experts, a.index + t * a.top_k, a.gates + t * a.top_k);
  });
}

void best_experts(
    const float* scores, int64_t tokens, int64_t experts, int64_t top_k, int64_t* index) {
  parallel_for(tokens, 256, [&](int64_t begin, int64_t end) {
    std::vector<float> comparable(experts);
    for (int64_t t = begin; t < end; ++t) {
      const float* const row = scores + t * experts;
      if (find_best(row, experts, top_k, index + t * top_k))
        continue;
      for (int64_t e = 0; e < experts; ++e)
        comparable[e] = std::isnan(row[e]) ? std::numeric_limits<float>::infinity() : row[e];
      find_best(comparable.data(), experts, top_k, index + t * top_k);
    }
  });
}

}  // namespace mpoe
