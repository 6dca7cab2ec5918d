// A contraction of two tensors as one launch: C[m, n] (+)= sum_k A[m, k] B[k, n], where m, n and k stand for several axes
// each, batched over experts. Slots may be part of m (every expert's rows meet its own B) or of k (every expert's rows are
// summed). Each element of the result is written by one thread: no atomics, the same bits on every run.
#pragma once
#include "cuda/activation.cuh"
#include "cuda/block_gemm.cuh"

namespace mpoe::cuda {

// Stores columns n, n + 1 of row m, with bias and activation. `shift`: offset inside a row at which columns begin.
// `valid` is false for rows that no expert owns: zeros.
template <class T>
__device__ __forceinline__ void store_pair(const Output& out, int64_t base, Position row, int64_t row_offset, int shift,
                                           int n, int n_end, float v0, float v1, bool valid) {
  float v[2] = {v0, v1};
  int64_t at[2];
  bool inside[2];
  float z[2];
  UNROLL
  for (int e = 0; e < 2; ++e) {
    inside[e] = n + e < n_end;
    const int inner = row.inner + shift + (inside[e] ? out.n.at(n + e).inner : 0);
    inside[e] = inside[e] && inner < out.limit;
    at[e] = base + row_offset + inner;
    if (!inside[e]) continue;
    if (out.bias && valid) v[e] += dev::to_float(static_cast<const T*>(out.bias)[inner]);
    z[e] = v[e];
    if (valid) v[e] = activate(out.activation, v[e]);
    if (out.as_float && out.accumulate) v[e] += static_cast<const float*>(out.data)[at[e]];
  }
  struct alignas(2 * sizeof(T)) Pair {
    T x, y;
  };
  if (out.pair && !out.as_float && inside[0] && inside[1]) {
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

// Grid: (tiles of m over all groups, tiles of n, groups unless they are in m).
template <class T, class TileT, bool kMajorA, bool kMajorB>
__global__ void __launch_bounds__(TileT::kThreads, 1) contract_kernel(const __grid_constant__ ContractArguments p) {
  using A = Staged<T, TileT, TileT::kM, kMajorA>;
  using B = Staged<T, TileT, TileT::kN, kMajorB>;
  DYN_SHARED(T, stages);
  const Groups& groups = p.groups;
  int group = blockIdx.z, tile = blockIdx.x;
  int m_begin = 0, m_end = p.m, k_begin = 0, k_end = p.k;
  bool valid = true;
  const auto offset = [&](int g) { return groups.offsets[g * groups.step] * groups.per_slot; };
  if (p.slot_axis == kSlotsInRows) {
    for (group = 0; group < groups.count; ++group) {
      const int tiles = (offset(group + 1) - offset(group) + TileT::kM - 1) / TileT::kM;
      if (tile < tiles) break;
      tile -= tiles;
    }
    valid = group < groups.count;
    if (!valid && !groups.zero_tail) return;
    m_begin = offset(group);
    m_end = valid ? offset(group + 1) : groups.slots * groups.per_slot;
    if (!valid) k_end = 0;
  } else if (p.slot_axis == kSlotsInner) {
    k_begin = offset(group);
    k_end = offset(group + 1);
  } else if (groups.offsets && offset(group) == offset(group + 1)) {
    k_end = 0;  // an expert without slots: its gradients are zero, its weight is not read
  }
  m_begin += tile * TileT::kM;
  if (m_begin >= m_end) return;
  const int n_begin = blockIdx.y * TileT::kN;
  const int rows = m_end - m_begin, columns = p.n - n_begin;
  Accumulator<TileT> acc;
  acc.clear();
  if (k_end > k_begin) {
    const A a(p.a, p.a.expert_stride * group, m_begin, m_end, k_end);
    const B b(p.b, p.b.expert_stride * group, n_begin, p.n, k_end);
    block_gemm<T, TileT, kMajorA, kMajorB>(acc, a, b, k_begin, k_end, rows, columns, stages);
  }
  const int64_t base = p.out.expert_stride * group;
  const bool slots_out = p.slot_axis == kSlotsInRows;
  int known_row = -1;
  Position position;
  acc.for_each_pair([&](int row, int column, float v0, float v1) {
    if (row >= rows || column >= columns) return;
    if (row != known_row) position = p.out.m.at(m_begin + row);
    known_row = row;
    const int64_t row_offset = p.out.m.slot_first ? position.slot * p.out.slot_stride : 0;
    store_pair<T>(p.out, slots_out ? 0 : base, position, row_offset, 0, n_begin + column, p.n, v0, v1, valid);
  });
}

}  // namespace mpoe::cuda
