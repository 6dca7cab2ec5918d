#include <type_traits>

#include "cuda/routing/routing.cuh"

namespace mpoe::cuda {
namespace {

int64_t blocks_of(int64_t extent, int block) {
  return (extent + block - 1) / block;
}

// Calls f(T{}, constant kPer): 16 bytes at a time if every row starts at a multiple of 16, else one
// element.
template <class F>
void with_packs(Dtype dtype,
                int64_t row_elements,
                std::initializer_list<const void*> arrays,
                F&& f) {
  with_type(dtype, [&](auto zero) {
    constexpr int kPer = 16 / static_cast<int>(sizeof(zero));
    if (can_copy_16_bytes(kPer, {static_cast<int>(row_elements % kPer)}, arrays)) {
      f(zero, std::integral_constant<int, kPer>{});
    } else {
      f(zero, std::integral_constant<int, 1>{});
    }
  });
}

}  // namespace

void route(const Route& p, const Memory& memory, cudaStream_t stream) {
  require(
      p.experts < kMostBins, "routing takes at most ", kMostBins - 1, " experts; got ", p.experts);
  const int64_t pairs = int64_t(p.tokens) * p.top_k;
  require(pairs < 1 << 30, "routing takes less than 2^30 pairs of token and choice; got ", pairs);
  SortArguments s{p};
  const std::size_t bins = static_cast<std::size_t>(s.bins());
  const std::size_t ranks = bins * (sizeof(int) + kRouteWarps);
  if (pairs <= kFewPairs) {
    const std::size_t shared = ranks + static_cast<std::size_t>(pairs) * sizeof(int);
    LAUNCH(route_few_kernel, dim3(1), dim3(kRouteThreads), shared, stream, s);
    return check_launch("route");
  }
  const int64_t blocks = blocks_of(pairs, kPairsPerBlock);
  s.counts = take<int>(memory, blocks * s.bins());
  const auto pass = [&](bool by_choice) {
    s.by_choice = by_choice;
    LAUNCH(histogram_kernel, grid_of(blocks), dim3(kRouteThreads), bins * sizeof(int), stream, s);
    LAUNCH(prefix_kernel,
           dim3(1),
           dim3(kRouteThreads),
           bins * sizeof(int),
           stream,
           s,
           static_cast<int>(blocks));
    LAUNCH(scatter_kernel, grid_of(blocks), dim3(kRouteThreads), ranks, stream, s);
    check_launch("route");
  };
  if (p.capacity >= 0) {
    s.keys = take<int>(memory, pairs);
    pass(true);
  }
  pass(false);
}

void combine(Dtype dtype,
             const void* rows,
             int64_t stride,
             const int64_t* slot_of_token,
             const float* gates,
             const int* filled,
             void* out,
             int tokens,
             int top_k,
             int columns,
             cudaStream_t stream) {
  if (tokens == 0 || columns == 0)
    return;
  const int64_t both = stride | columns;  // a power of two divides both if it divides this
  with_packs(dtype, both, {rows, out}, [&](auto zero, auto per) {
    using T = decltype(zero);
    const auto kernel = combine_kernel<T, decltype(per)::value>;
    LAUNCH(kernel,
           grid_of(tokens, blocks_of(columns, kRouteThreads * per)),
           dim3(kRouteThreads),
           0,
           stream,
           static_cast<const T*>(rows),
           stride,
           slot_of_token,
           gates,
           filled,
           static_cast<T*>(out),
           top_k,
           columns);
  });
  check_launch("combine");
}

void combine_backward(Dtype dtype,
                      const void* grad,
                      const void* rows,
                      const int64_t* token_of_slot,
                      const int64_t* slot_of_token,
                      const float* gates,
                      void* drows,
                      float* dgates,
                      int slots,
                      int top_k,
                      int columns,
                      cudaStream_t stream) {
  if (slots == 0)
    return;
  with_packs(dtype, columns, {grad, dgates ? rows : nullptr, drows}, [&](auto zero, auto per) {
    using T = decltype(zero);
    const auto kernel = combine_backward_kernel<T, decltype(per)::value>;
    LAUNCH(kernel,
           grid_of(slots),
           dim3(kRouteThreads),
           0,
           stream,
           static_cast<const T*>(grad),
           static_cast<const T*>(rows),
           token_of_slot,
           slot_of_token,
           gates,
           static_cast<T*>(drows),
           dgates,
           top_k,
           columns);
  });
  check_launch("combine_backward");
}

}  // namespace mpoe::cuda
