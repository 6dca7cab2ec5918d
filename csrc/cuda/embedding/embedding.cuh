// Index arrays of the embedding: digits of row numbers, and compositions of permutations.
#pragma once
#include "cuda/device.cuh"

namespace mpoe::cuda {

constexpr int kIndexThreads = 128;

// id -> (left, centre, right) digits; -1 for an id outside the vocabulary.
static __global__ void __launch_bounds__(kIndexThreads)
    digits_kernel(const int64_t* ids, int tokens, int vocabulary, int centres, int rights, int64_t* left,
                  int64_t* centre, int64_t* right) {
  const int token = blockIdx.x * kIndexThreads + threadIdx.x;
  if (token >= tokens) return;
  const int64_t id = ids[token];
  const bool inside = id >= 0 && id < vocabulary;
  left[token] = inside ? id / (int64_t(centres) * rights) : -1;
  centre[token] = inside ? id / rights % centres : -1;
  right[token] = inside ? id % rights : -1;
}

// out[i] = outer[inner[i]]; -1 where inner[i] is -1.
static __global__ void __launch_bounds__(kIndexThreads)
    compose_kernel(const int64_t* outer, const int64_t* inner, int64_t* out, int count) {
  const int i = blockIdx.x * kIndexThreads + threadIdx.x;
  if (i < count) out[i] = inner[i] < 0 ? -1 : outer[inner[i]];
}

static __global__ void __launch_bounds__(kIndexThreads) widen_kernel(const int* in, int64_t* out, int count) {
  const int i = blockIdx.x * kIndexThreads + threadIdx.x;
  if (i < count) out[i] = in[i];
}

}  // namespace mpoe::cuda
