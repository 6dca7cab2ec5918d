// Launches of csrc/cuda/routing/routing.cuh on raw device pointers. T tokens, K choices, N = T K
// slots, E experts; dense arrays.
#pragma once
#include <cstdint>

#include "cuda/dispatch.h"

namespace mpoe::cuda {

constexpr int kMostBins = 12000;  // experts, and one more: their counts must fit into shared memory

struct Route {
  const int64_t* index = nullptr;    // [T, K]; outside 0..E-1: like a masked token
  const bool* token_mask = nullptr;  // [T] or null; false: neither routed nor counted
  int tokens = 0;
  int top_k = 0;
  int experts = 0;
  int capacity = -1;                 // most slots of one expert; negative: no limit
  int* offsets = nullptr;            // [E + 1]
  int64_t* token_of_slot = nullptr;  // [N]; masked and dropped pairs come last
  int64_t* slot_of_token = nullptr;  // [T, K]; -1: masked or dropped
};
// Stable counting sort by expert; one launch for few pairs, else three, six with a capacity.
void route(const Route& arguments, const Memory& memory, cudaStream_t stream);

// rows [N, F], `stride` elements apart, gates [T, K] or null (all 1), out [T, F]; tokens from
// *filled on, if that is not null, become zero. Without gates this is dispatch's gradient; and
// dispatch, whose slots have one row each.
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
             cudaStream_t stream);

// grad [T, F], rows [N, F] (read only for dgates), drows [N, F] or null, dgates [T, K] or null.
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
                      cudaStream_t stream);

}  // namespace mpoe::cuda
