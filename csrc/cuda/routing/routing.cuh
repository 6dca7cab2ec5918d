// Routing: a stable counting sort of (token, choice) pairs by expert, and rows that move between
// tokens and slots. No atomics decide an order: the same results on every run.
#pragma once
#include "cuda/routing/routing.h"

namespace mpoe::cuda {

constexpr int kRouteThreads = 128;
constexpr int kRouteWarps = kRouteThreads / 32;
// Pairs that one block of the sort counts and places.
constexpr int kPairsPerBlock = 4 * kRouteThreads;
// Up to this many are sorted by one block in one launch.
constexpr int kFewPairs = 1024;

// ------------------------------------------------------------------ sort

// N = T K pairs. Bin E takes what no expert gets: masked, dropped, and indices out of range.
struct SortArguments : Route {
  int* keys = nullptr;     // [N] bins after dropping; null: none are dropped
  int* counts = nullptr;   // [blocks, bins]
  bool by_choice = false;  // counts pairs with first choices first, to find out which are dropped

  __device__ __forceinline__ int pairs() const { return tokens * top_k; }
  __host__ __device__ int bins() const { return experts + 1; }
  // The pair [token, choice] that is the i-th to be served.
  __device__ __forceinline__ int pair(int i, bool choices_first) const {
    return choices_first ? i % tokens * top_k + i / tokens : i;
  }
  __device__ __forceinline__ int given_bin(int pair) const {
    if (token_mask && !token_mask[pair / top_k])
      return experts;
    const int64_t expert = index[pair];
    return expert >= 0 && expert < experts ? static_cast<int>(expert) : experts;
  }
  // After dropping, if that is known.
  __device__ __forceinline__ int bin(int pair) const {
    return keys && !by_choice ? keys[pair] : given_bin(pair);
  }
};

// Ranks of the block's 128 pairs among all of the same bin seen so far. `seen` [bins] counts them,
// `counts` [warps, bins], each at most 32, is zero before and after. Threads without a pair pass
// bin -1. Every thread of the block must call it.
__device__ __forceinline__ int rank_of(int bin, int bins, int* seen, uint8_t* counts) {
  const int lane = threadIdx.x & 31;
  const int warp = threadIdx.x >> 5;
  const unsigned same = __match_any_sync(dev::kFullWarp, bin);
  const int before = __popc(same & ((1u << lane) - 1u));
  if (bin >= 0 && before == 0)
    counts[warp * bins + bin] = static_cast<uint8_t>(__popc(same));
  __syncthreads();
  int rank = before;
  if (bin >= 0) {
    rank += seen[bin];
    for (int w = 0; w < warp; ++w)
      rank += counts[w * bins + bin];
  }
  __syncthreads();
  for (int b = threadIdx.x; b < bins; b += kRouteThreads) {
    for (int w = 0; w < kRouteWarps; ++w) {
      seen[b] += counts[w * bins + b];
      counts[w * bins + b] = 0;
    }
  }
  __syncthreads();
  return rank;
}
template <class T>
__device__ __forceinline__ void clear(T* values, int count) {
  for (int i = threadIdx.x; i < count; i += kRouteThreads)
    values[i] = 0;
}

// Exclusive prefix sum of values [count] in place, by one warp: values[i] = sum before i.
__device__ __forceinline__ void warp_prefix(int* values, int count) {
  const int lane = threadIdx.x & 31;
  int carried = 0;
  for (int first = 0; first < count; first += 32) {
    const int i = first + lane;
    const int value = i < count ? values[i] : 0;
    const int sum = dev::sum_up_to(value);
    if (i < count)
      values[i] = carried + sum - value;
    carried += __shfl_sync(dev::kFullWarp, sum, 31);
  }
}

__device__ __forceinline__ void place(const SortArguments& p, int pair, int bin, int slot) {
  p.token_of_slot[slot] = pair / p.top_k;
  p.slot_of_token[pair] = bin < p.experts ? slot : -1;
}

// Everything in one block. Shared: seen [bins], keys [N], counts [warps, bins].
static __global__ void __launch_bounds__(kRouteThreads) route_few_kernel(const SortArguments p) {
  DYN_SHARED(int, seen);
  const int bins = p.bins();
  const int pairs = p.pairs();
  int* keys = seen + bins;
  uint8_t* counts = reinterpret_cast<uint8_t*>(keys + pairs);
  clear(seen, bins);
  clear(counts, kRouteWarps * bins);
  __syncthreads();
  for (int first = 0; first < pairs; first += kRouteThreads) {  // which are dropped
    const int i = first + static_cast<int>(threadIdx.x);
    const int pair = i < pairs ? p.pair(i, p.capacity >= 0) : 0;
    int bin = i < pairs ? p.given_bin(pair) : -1;
    const int rank = rank_of(bin, bins, seen, counts);
    if (p.capacity >= 0 && bin >= 0 && bin < p.experts && rank >= p.capacity)
      bin = p.experts;
    if (i < pairs)
      keys[pair] = bin;
  }
  for (int e = threadIdx.x; e < p.experts; e += kRouteThreads) {
    if (p.capacity >= 0 && seen[e] > p.capacity)
      seen[e] = p.capacity;
  }
  __syncthreads();
  if (threadIdx.x < 32)
    warp_prefix(seen, bins);
  __syncthreads();
  for (int e = threadIdx.x; e < bins; e += kRouteThreads)
    p.offsets[e] = seen[e];
  __syncthreads();
  for (int first = 0; first < pairs; first += kRouteThreads) {
    const int pair = first + static_cast<int>(threadIdx.x);
    const int bin = pair < pairs ? keys[pair] : -1;
    const int slot = rank_of(bin, bins, seen, counts);
    if (pair < pairs)
      place(p, pair, bin, slot);
  }
}

// counts[block, bin] of a block's pairs. Shared: [bins].
static __global__ void __launch_bounds__(kRouteThreads) histogram_kernel(const SortArguments p) {
  DYN_SHARED(int, seen);
  const int bins = p.bins();
  const int first = blockIdx.x * kPairsPerBlock;
  clear(seen, bins);
  __syncthreads();
  const int past = first + kPairsPerBlock;
  const int end = past < p.pairs() ? past : p.pairs();
  for (int i = first + static_cast<int>(threadIdx.x); i < end; i += kRouteThreads) {
    const int bin = p.bin(p.pair(i, p.by_choice));
    atomicAdd(seen + bin, 1);
  }
  __syncthreads();
  int* const counts = p.counts + int64_t(blockIdx.x) * bins;
  for (int b = threadIdx.x; b < bins; b += kRouteThreads)
    counts[b] = seen[b];
}

// counts[block, bin] -> pairs of the bin in earlier blocks; offsets <- first slot of every expert.
// One block; shared: [bins].
static __global__ void __launch_bounds__(kRouteThreads)
    prefix_kernel(const SortArguments p, int blocks) {
  DYN_SHARED(int, total);
  constexpr int kAhead = 8;  // loads in flight at once
  const int bins = p.bins();
  for (int b = threadIdx.x; b < bins; b += kRouteThreads) {
    int sum = 0;
    for (int first = 0; first < blocks; first += kAhead) {
      int* const counts = p.counts + int64_t(first) * bins + b;
      int loaded[kAhead];
      UNROLL
      for (int k = 0; k < kAhead; ++k) {
        loaded[k] = first + k < blocks ? counts[int64_t(k) * bins] : 0;
      }
      UNROLL
      for (int k = 0; k < kAhead; ++k) {
        if (first + k < blocks)
          counts[int64_t(k) * bins] = sum;
        sum += loaded[k];
      }
    }
    total[b] = sum;
  }
  __syncthreads();
  if (threadIdx.x < 32)
    warp_prefix(total, bins);
  __syncthreads();
  for (int b = threadIdx.x; b < bins; b += kRouteThreads)
    p.offsets[b] = total[b];
}

// Ranks of a block's pairs. by_choice: writes the bin of every pair after dropping; else its slot.
// Shared: seen [bins], counts [warps, bins].
static __global__ void __launch_bounds__(kRouteThreads) scatter_kernel(const SortArguments p) {
  DYN_SHARED(int, seen);
  const int bins = p.bins();
  const int first = blockIdx.x * kPairsPerBlock;
  uint8_t* counts = reinterpret_cast<uint8_t*>(seen + bins);
  clear(counts, kRouteWarps * bins);
  for (int b = threadIdx.x; b < bins; b += kRouteThreads) {
    seen[b] = p.counts[int64_t(blockIdx.x) * bins + b] + (p.by_choice ? 0 : p.offsets[b]);
  }
  __syncthreads();
  for (int i0 = first; i0 < first + kPairsPerBlock && i0 < p.pairs(); i0 += kRouteThreads) {
    const int i = i0 + static_cast<int>(threadIdx.x);
    const int pair = i < p.pairs() ? p.pair(i, p.by_choice) : 0;
    const int bin = i < p.pairs() ? p.bin(pair) : -1;
    const int rank = rank_of(bin, bins, seen, counts);
    if (i >= p.pairs())
      continue;
    if (p.by_choice) {
      p.keys[pair] = bin < p.experts && rank >= p.capacity ? p.experts : bin;
    } else {
      place(p, pair, bin, rank);
    }
  }
}

// ------------------------------------------------------------------ rows

// out[t] = sum over k of gates[t, k] rows[slot_of_token[t, k]] over the pairs that were kept, see
// `combine`. Grid: (tokens, column blocks).
template <class T, int kPer>
__global__ void __launch_bounds__(kRouteThreads) combine_kernel(const T* rows,
                                                                int64_t stride,
                                                                const int64_t* slot_of_token,
                                                                const float* gates,
                                                                const int* filled,
                                                                T* out,
                                                                int top_k,
                                                                int columns) {
  const int token = blockIdx.x;
  const int column = (blockIdx.y * kRouteThreads + threadIdx.x) * kPer;
  if (column >= columns)
    return;
  dev::Pack<float, kPer> sum{};
  for (int k = 0; k < top_k && (!filled || token < *filled); ++k) {
    const int64_t pair = int64_t(token) * top_k + k;
    const int64_t slot = slot_of_token[pair];
    if (slot < 0)
      continue;
    const auto row = dev::load<kPer>(rows + slot * stride + column);
    const float gate = gates ? gates[pair] : 1.f;
    UNROLL
    for (int e = 0; e < kPer; ++e)
      sum.v[e] += gate * row.v[e];
  }
  dev::store(sum, out + int64_t(token) * columns + column);
}

// Gradients of combine, for the pair (t, k) in slot s:
//   drows[s] = gate grad[t]
//   dgates[t, k] = <rows[s], grad[t]>
// Zero for slots without a pair and for dropped pairs, whose tokens are in the empty slots. Either
// may be null. Grid: slots.
template <class T, int kPer>
__global__ void __launch_bounds__(kRouteThreads)
    combine_backward_kernel(const T* grad,
                            const T* rows,
                            const int64_t* token_of_slot,
                            const int64_t* slot_of_token,
                            const float* gates,
                            T* drows,
                            float* dgates,
                            int top_k,
                            int columns) {
  SHARED_ARRAY(float, partial, kRouteWarps);
  const int slot = blockIdx.x;
  const int64_t token = token_of_slot[slot];
  int64_t pair = -1;
  for (int k = 0; k < top_k; ++k) {
    if (slot_of_token[token * top_k + k] == slot)
      pair = token * top_k + k;
  }
  const float gate = pair >= 0 ? gates[pair] : 0.f;
  float sum = 0.f;
  for (int column = static_cast<int>(threadIdx.x) * kPer; column < columns;
       column += kRouteThreads * kPer) {
    dev::Pack<float, kPer> out{};
    if (pair >= 0) {
      const auto g = dev::load<kPer>(grad + token * columns + column);
      UNROLL
      for (int e = 0; e < kPer; ++e)
        out.v[e] = gate * g.v[e];
      if (dgates) {
        const auto row = dev::load<kPer>(rows + int64_t(slot) * columns + column);
        UNROLL
        for (int e = 0; e < kPer; ++e)
          sum += g.v[e] * row.v[e];
      }
    }
    if (drows)
      dev::store(out, drows + int64_t(slot) * columns + column);
  }
  if (!dgates)
    return;
  if (pair < 0) {
    for (int k = threadIdx.x; k < top_k; k += kRouteThreads) {
      if (slot_of_token[token * top_k + k] < 0)
        dgates[token * top_k + k] = 0.f;
    }
    return;
  }
  UNROLL
  for (int bit = 16; bit > 0; bit >>= 1)
    sum += __shfl_xor_sync(dev::kFullWarp, sum, bit);
  if ((threadIdx.x & 31) == 0)
    partial[threadIdx.x >> 5] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    float total = 0.f;
    for (int w = 0; w < kRouteWarps; ++w)
      total += partial[w];
    dgates[pair] = total;
  }
}

}  // namespace mpoe::cuda
