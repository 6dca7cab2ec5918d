// Routing on raw pointers: stable counting sort of (token, choice) pairs by expert, gathers and
// gated sums of rows. T tokens, K choices per token, N = T * K slots, E experts; all arrays dense
// unless a stride is given (in elements). Results do not depend on the number of threads.
#pragma once

#include <cstdint>

#include "common/types.h"
#include "cpu/gemm/gemm.h"

namespace mpoe {

// Position of the first value outside [low, high], or -1.
int64_t first_outside(const int64_t* values, int64_t count, int64_t low, int64_t high);

// Sorts the pairs t * K + k of a range that have an expert, index >= 0, by expert: writes slots
// [filled..) and the experts' offsets [E + 1] in them; returns the last offset.
int64_t sort_pairs(const int64_t* index,
                   Span pairs,
                   int64_t experts,
                   int64_t filled,
                   int64_t* offsets,
                   int64_t* slots);

struct Route {
  const int64_t* index;  // [T, K], each in 0..E-1
  int64_t tokens, top_k, experts;
  int64_t capacity;         // most slots of one expert; negative: no limit
  const bool* token_mask;   // [T] or null; false: the token is neither routed nor counted
  int32_t* expert_offsets;  // [E + 1]
  int64_t* token_of_slot;   // [N]; masked and dropped pairs come last
  int64_t* slot_of_token;   // [T, K]; -1: masked or dropped
};
// The caller has checked `index`.
void route(const Route& arguments);

// out[s] = x[token_of_slot[s]] for s < filled, else 0. Any type of `width` bytes per row; x_stride
// in bytes.
struct Dispatch {
  const void* x;
  int64_t x_stride, width;
  const int64_t* token_of_slot;  // [N], each in 0..T-1
  int64_t slots, filled;
  void* out;  // [N, width bytes]
};
void dispatch(const Dispatch& arguments);

// The gated sum and its gradients, over rows of `features` elements of `dtype`. Gates have the
// accumulator's type: double for kFloat64, else float.
struct Combine {
  Dtype dtype;
  int64_t tokens, top_k, slots, features;
  const int64_t* slot_of_token;  // [T, K], each in -1..N-1, no slot twice
  const void* gates;             // [T, K]; null: all 1
};
// out[t] = sum_k gates[t, k] * rows[slot_of_token[t, k]] over the pairs that were kept.
void combine(const Combine& arguments, const void* rows, void* out);

// drows[slot_of_token[t, k]] = gates[t, k] * grad[t], 0 in slots without a pair; dgates[t, k] =
// <rows[slot], grad[t]>. Either result may be null; rows is only read for dgates.
void combine_backward(
    const Combine& arguments, const void* grad, const void* rows, void* drows, void* dgates);

}  // namespace mpoe
