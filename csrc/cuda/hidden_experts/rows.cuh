// Tiles of tokens: the result, and the gradients of u, u_gate and the gates. The choices of a tile are sorted by
// expert; one expert at a time, rows are computed and added to the tile's sums in shared memory, always in the same
// order.
#pragma once
#include "cuda/hidden_experts/hidden_experts.cuh"

namespace mpoe::cuda {

// Sorts the choices of the block's tile by expert and returns how many there are. A token that chose an expert twice
// has one entry with both gates. Starts without a barrier and ends with one.
template <class T>
__device__ __forceinline__ int sort_tile(const HiddenArguments& p, const HiddenShared<T>& s, int first_token) {
  const auto chosen = [&](int token, int k) {
    const int64_t e = p.index[int64_t(token) * p.top_k + k];
    return e >= 0 && e < p.experts ? static_cast<int>(e) : p.experts;
  };
  for (int i = threadIdx.x; i < p.entries(); i += kHiddenThreads) {
    const int token = first_token + i / p.top_k;
    int e = token < p.tokens ? chosen(token, i % p.top_k) : p.experts;
    for (int k = 0; k < i % p.top_k && e < p.experts; ++k) {
      if (chosen(token, k) == e) e = p.experts;
    }
    s.raw[i] = e;
  }
  __syncthreads();
  int count = 0;
  for (int i = 0; i < p.entries(); ++i) count += s.raw[i] < p.experts;
  for (int i = threadIdx.x; i < p.entries(); i += kHiddenThreads) {
    const int e = s.raw[i];
    if (e == p.experts) continue;
    int rank = 0;
    for (int other = 0; other < p.entries(); ++other) rank += s.raw[other] < e || (s.raw[other] == e && other < i);
    const int token = first_token + i / p.top_k;
    float weight = 0.f;
    for (int k = i % p.top_k; k < p.top_k; ++k) {
      if (chosen(token, k) == e) weight += p.gates[int64_t(token) * p.top_k + k];
    }
    s.expert[rank] = e;
    s.token[rank] = i / p.top_k;
    s.weight[rank] = weight;
  }
  __syncthreads();
  return count;
}

// Calls f(expert, first entry, rows) for at most kHiddenRows entries of one expert at a time, with its blocks and the
// rows of u, u_gate and, if there is one, grad in shared memory.
template <class T, class F>
__device__ __forceinline__ void for_each_run(const HiddenArguments& p, const HiddenShared<T>& s, int count, int first_token,
                                             int group, F&& f) {
  int loaded = -1;
  for (int begin = 0, end = 0; begin < count; begin = end) {
    const int expert = s.expert[begin];
    end = begin + 1;
    while (end < count && end < begin + kHiddenRows && s.expert[end] == expert) ++end;
    const int rows = end - begin;
    __syncthreads();  // nobody reads the tiles of the run before
    if (expert != loaded) load_blocks(p, s, expert, group);
    loaded = expert;
    const auto load = [&](T* tile, const void* from) {
      load_rows(p, tile, rows, whole_tiles(rows), [&](int r) {
        return static_cast<const T*>(from) + int64_t(first_token + s.token[begin + r]) * p.features + group * p.block;
      });
    };
    load(s.u, p.u);
    if (p.gated()) load(s.u_gate, p.u_gate);
    if (p.grad) load(s.grad, p.grad);
    arrived();
    f(expert, begin, rows);
  }
}

__device__ __forceinline__ void clear_sums(const HiddenArguments& p, float* sums) {
  for (int i = threadIdx.x; i < p.tile_tokens * (p.padded + 4); i += kHiddenThreads) sums[i] = 0.f;
}
// Sums of the tile to rows [T, F], one warp for each row.
template <class T>
__device__ __forceinline__ void store_sums(const HiddenArguments& p, const float* sums, void* out, int first_token,
                                           int group) {
  for (int t = threadIdx.x >> 5; t < p.tile_tokens && first_token + t < p.tokens; t += kHiddenWarps) {
    T* const row = static_cast<T*>(out) + int64_t(first_token + t) * p.features + group * p.block;
    for (int unit = threadIdx.x & 31; unit < p.block; unit += 32) {
      row[unit] = dev::from_float<T>(sums[t * (p.padded + 4) + unit]);
    }
  }
}

// Grid: groups times tiles of tokens.
template <class T>
__global__ void __launch_bounds__(kHiddenThreads, 1) hidden_forward_kernel(const __grid_constant__ HiddenArguments p) {
  DYN_SHARED(T, memory);
  const HiddenShared<T> s(p, HiddenKernel::kForward, memory);
  const int group = blockIdx.x / p.tiles, first_token = blockIdx.x % p.tiles * p.tile_tokens;
  const bool computes = static_cast<int>(threadIdx.x >> 5) * 16 < p.padded;
  clear_sums(p, s.sums);
  const int count = sort_tile(p, s, first_token);
  for_each_run(p, s, count, first_token, group, [&](int expert, int begin, int rows) {
    if (computes) {
      HiddenRows value, z;
      pre_activation(p, s, expert, group, rows, value, z);
      z.each([&](int, int, float& sum) { sum = activate(p.activation, sum); });
      if (p.gated()) {
        UNROLL
        for (int i = 0; i < kHiddenRows / 16; ++i) {
          UNROLL
          for (int e = 0; e < 8; ++e) z.v[i][e / 4][e % 4] *= value.v[i][e / 4][e % 4];
        }
      }
      z.each([&](int row, int unit, float& h) { s.h[row * p.stride + unit] = dev::from_float<T>(h); });
    }
    __syncthreads();  // h is whole
    if (!computes) return;
    HiddenRows o;
    multiply<T, true, false>(o, s.h, s.left, p.stride, p.padded, rows);
    o.each([&](int row, int unit, float& sum) {
      if (row < rows) s.sums[s.token[begin + row] * (p.padded + 4) + unit] += s.weight[begin + row] * sum;
    });
  });
  __syncthreads();  // sums are whole
  store_sums<T>(p, s.sums, p.out, first_token, group);
}

// The slots of expert `e`, in the order of pairs; the last expert ends the offsets.
__device__ __forceinline__ void sort_slots(const HiddenArguments& p, int e) {
  constexpr int kPairs = 8;  // adjacent pairs that a thread checks together
  SHARED_ARRAY(int, totals, kHiddenWarps);
  const int pairs = p.tokens * p.top_k, lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  // Sum over the block, and over the threads before this one. `totals` is free afterwards.
  const auto scan = [&](int own, int& before) {
    int sum = own;
    UNROLL
    for (int step = 1; step < 32; step <<= 1) {
      const int left = __shfl_up_sync(dev::kFullWarp, sum, static_cast<unsigned>(step));
      if (lane >= step) sum += left;
    }
    if (lane == 31) totals[warp] = sum;
    __syncthreads();
    int total = 0;
    before = sum - own;
    for (int w = 0; w < kHiddenWarps; ++w) {
      if (w < warp) before += totals[w];
      total += totals[w];
    }
    __syncthreads();
    return total;
  };
  int smaller = 0, before = 0;
  for (int pair = threadIdx.x; pair < pairs; pair += kHiddenThreads) {
    smaller += p.index[pair] >= 0 && p.index[pair] < e;
  }
  int slot = scan(smaller, before);
  if (threadIdx.x == 0) p.offsets[e] = slot;
  for (int first = 0; first < pairs; first += kHiddenThreads * kPairs) {
    const int begin = first + static_cast<int>(threadIdx.x) * kPairs;
    unsigned mine = 0;
    int own = 0;
    UNROLL
    for (int i = 0; i < kPairs; ++i) {
      const bool hit = begin + i < pairs && p.index[begin + i] == e;
      mine |= static_cast<unsigned>(hit) << i;
      own += hit;
    }
    const int total = scan(own, before);
    int at = slot + before;
    UNROLL
    for (int i = 0; i < kPairs; ++i) {
      if (mine >> i & 1u) p.pair_of_slot[at++] = begin + i;
    }
    slot += total;
  }
  if (threadIdx.x == 0 && e == p.experts - 1) p.offsets[p.experts] = slot;
}

// Gradients of a row's `value` and `z` from dh, the gradient of h, in place: `value` and `dh` become them.
// Without a gate, both are the same.
__device__ __forceinline__ void slopes(const HiddenArguments& p, float& value, float z, float& dh) {
  const float slope = activation_slope(p.activation, z);
  if (p.gated()) {
    const float by_value = dh * activate(p.activation, z);
    dh *= value * slope;
    value = by_value;
  } else {
    dh *= slope;
    value = dh;
  }
}

// Grid: groups times tiles of tokens, then a block for every expert, which sorts its slots.
template <class T>
__global__ void __launch_bounds__(kHiddenThreads, 1) hidden_rows_kernel(const __grid_constant__ HiddenArguments p) {
  DYN_SHARED(T, memory);
  const int block = blockIdx.x, lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  if (block >= p.groups * p.tiles) {
    sort_slots(p, block - p.groups * p.tiles);
    return;
  }
  const HiddenShared<T> s(p, HiddenKernel::kRows, memory);
  const int group = block / p.tiles, first_token = block % p.tiles * p.tile_tokens;
  const bool computes = warp * 16 < p.padded;
  const int warps = p.padded / 16;  // that compute
  float* const gate_parts = p.gate_parts ? p.gate_parts + int64_t(group) * p.tokens * p.top_k : nullptr;
  clear_sums(p, s.sums);
  if (p.gated()) clear_sums(p, s.sums_gate);
  const int count = sort_tile(p, s, first_token);
  for (int i = threadIdx.x; gate_parts && i < p.entries(); i += kHiddenThreads) {
    const int64_t pair = int64_t(first_token) * p.top_k + i;
    if (pair >= int64_t(p.tokens) * p.top_k) break;
    if (p.index[pair] < 0 || p.index[pair] >= p.experts) gate_parts[pair] = 0.f;
  }
  for_each_run(p, s, count, first_token, group, [&](int expert, int begin, int rows) {
    if (computes) {
      HiddenRows value, z, dh;
      pre_activation(p, s, expert, group, rows, value, z);
      multiply<T, true, true>(dh, s.grad, s.left, p.stride, p.padded, rows);
      UNROLL
      for (int i = 0; i < kHiddenRows / 16; ++i) {
        UNROLL
        for (int half = 0; half < 2; ++half) {
          const int row = i * 16 + half * 8 + (lane >> 2);
          const float weight = row < rows ? s.weight[begin + row] : 0.f;
          float column = 0.f;  // of the gate's gradient
          UNROLL
          for (int j = 0; j < 2; ++j) {
            UNROLL
            for (int e = half * 2; e < half * 2 + 2; ++e) {
              const float act = activate(p.activation, z.v[i][j][e]);
              column += (p.gated() ? act * value.v[i][j][e] : act) * dh.v[i][j][e];
              dh.v[i][j][e] *= weight;
              slopes(p, value.v[i][j][e], z.v[i][j][e], dh.v[i][j][e]);
            }
          }
          column += __shfl_xor_sync(dev::kFullWarp, column, 1);
          column += __shfl_xor_sync(dev::kFullWarp, column, 2);
          if ((lane & 3) == 0) s.columns[warp * kHiddenRows + row] = column;
        }
      }
      value.each([&](int row, int unit, float& d) { s.first[row * p.stride + unit] = dev::from_float<T>(d); });
      if (p.gated()) {
        dh.each([&](int row, int unit, float& d) { s.second[row * p.stride + unit] = dev::from_float<T>(d); });
      }
    }
    __syncthreads();  // the tiles and columns are whole
    if (gate_parts && static_cast<int>(threadIdx.x) < rows) {
      float sum = 0.f;
      for (int w = 0; w < warps; ++w) sum += s.columns[w * kHiddenRows + threadIdx.x];
      const int64_t pair = int64_t(first_token + s.token[begin + threadIdx.x]) * p.top_k;
      for (int k = 0; k < p.top_k; ++k) {
        if (p.index[pair + k] == expert) gate_parts[pair + k] = sum;
      }
    }
    if (!computes) return;
    const auto add = [&](const T* gradient, const T* block_tile, float* sums) {
      HiddenRows part;
      multiply<T, true, true>(part, gradient, block_tile, p.stride, p.padded, rows);
      part.each([&](int row, int unit, float& sum) {
        if (row < rows) sums[s.token[begin + row] * (p.padded + 4) + unit] += sum;
      });
    };
    if (p.du) add(s.first, s.right, s.sums);
    if (p.du_gate) add(s.second, s.right_gate, s.sums_gate);
  });
  __syncthreads();  // sums are whole
  if (p.du) store_sums<T>(p, s.sums, p.du, first_token, group);
  if (p.du_gate) store_sums<T>(p, s.sums_gate, p.du_gate, first_token, group);
}

}  // namespace mpoe::cuda
