// Results of a block on their way to memory: bias, activation, gate, padding.
#pragma once
#include "cuda/activation.cuh"
#include "cuda/block_gemm.cuh"

namespace mpoe::cuda {

// Offsets inside a row of columns n and n + 1 of the result; `shift`: where columns start.
struct ColumnPair {
  int at[2];
  bool inside[2];

  __device__ __forceinline__ ColumnPair(const Output& out, int shift, int n, int n_end) {
    UNROLL
    for (int e = 0; e < 2; ++e) {
      inside[e] = n + e < n_end;
      at[e] = shift + (inside[e] ? out.n.at(n + e).inner : 0);
    }
  }
};

// Stores two columns of a row, with bias, activation and gate. `row`: elements before the row; `inner`: the row's own
// offset within the columns that bias and limit count. `valid` is false for rows that no expert owns: zeros.
template <class T>
__device__ __forceinline__ void store_pair(const Output& out, int64_t row, int inner, const ColumnPair& columns, float v0,
                                           float v1, bool valid, float gate) {
  float v[2] = {v0, v1}, z[2];
  int64_t at[2];
  bool inside[2];
  UNROLL
  for (int e = 0; e < 2; ++e) {
    const int column = inner + columns.at[e];
    inside[e] = columns.inside[e] && column < out.limit;
    at[e] = row + column;
    if (out.bias && valid && inside[e]) v[e] += dev::to_float(static_cast<const T*>(out.bias)[column]);
    z[e] = v[e];
  }
  if (out.activation != kNone && valid) {
    UNROLL
    for (int e = 0; e < 2; ++e) v[e] = activate(out.activation, v[e]);
  }
  if (out.gates && valid) {
    UNROLL
    for (int e = 0; e < 2; ++e) v[e] = gate * dev::to_float(dev::from_float<T>(v[e]));
  }
  struct alignas(2 * sizeof(T)) Pair {
    T x, y;
  };
  if (out.pair && inside[0] && inside[1]) {
    *reinterpret_cast<Pair*>(static_cast<T*>(out.data) + at[0]) = {dev::from_float<T>(v[0]), dev::from_float<T>(v[1])};
    if (out.pre_activation) {
      *reinterpret_cast<Pair*>(static_cast<T*>(out.pre_activation) + at[0]) = {dev::from_float<T>(z[0]),
                                                                               dev::from_float<T>(z[1])};
    }
    return;
  }
  UNROLL
  for (int e = 0; e < 2; ++e) {
    if (!inside[e]) continue;
    if (out.as_float) {
      static_cast<float*>(out.data)[at[e]] = v[e];
    } else {
      static_cast<T*>(out.data)[at[e]] = dev::from_float<T>(v[e]);
    }
    if (out.pre_activation) static_cast<T*>(out.pre_activation)[at[e]] = dev::from_float<T>(z[e]);
  }
}

}  // namespace mpoe::cuda
