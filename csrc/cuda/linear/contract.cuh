// A contraction of two tensors as one launch: C[m, n] (+)= sum_k A[m, k] B[k, n], where m, n and k each stand for
// several axes, batched over experts. Slots may be part of m (every expert's rows are multiplied by its own B) or of k
// (every expert's rows are summed). Each element of the result is written by one thread: no atomics, the same bits on
// every run.
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
      float* const to = static_cast<float*>(out.data) + at[e];
      *to = out.accumulate ? *to + v[e] : v[e];
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
    group = group_of_tile(tile, groups.count, [&](int g) {
      return (offset(g + 1) - offset(g) + TileT::kM - 1) / TileT::kM;
    });
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
  __syncthreads();  // nobody reads the stages
  const ColumnPair own(p.out, 0, n_begin + acc.own_column(), p.n);
  const int64_t base = p.slot_axis == kSlotsInRows ? 0 : p.out.expert_stride * group;
  acc.for_each_row(reinterpret_cast<float*>(stages), [&](int row, float v0, float v1) {
    if (row >= rows) return;
    const Position position = p.out.m.at(m_begin + row);
    const int64_t to = p.out.m.slot_first ? p.out.row_of(position.slot) : 0;
    const float gate = p.out.gates ? p.out.gates[to] : 1.f;
    store_pair<T>(p.out, base + to * p.out.slot_stride, position.inner, own, v0, v1, valid, gate);
  });
}

}  // namespace mpoe::cuda
