// Gradients of the blocks and biases: per expert and group, a sum over the expert's slots, in their order. Also the
// sums of partial results.
#pragma once
#include "cuda/hidden_experts/rows.cuh"

namespace mpoe::cuda {

// core += A^T B over the rows of two tiles.
template <class T>
__device__ __forceinline__ void add_outer(const HiddenArguments& p, HiddenCore& core, const T* a, const T* b, int rows) {
  if constexpr (Fragments<T>::kPartialSums) {  // one sum over all slots would lose digits
    HiddenCore part;
    multiply<T, false, false>(part, a, b, p.stride, rows, p.padded);
    UNROLL
    for (int i = 0; i < kLargestHiddenBlock / 16; ++i) {
      UNROLL
      for (int e = 0; e < 8; ++e) core.v[i][e / 4][e % 4] += part.v[i][e / 4][e % 4];
    }
  } else {
    multiply<T, false, false>(core, a, b, p.stride, rows, p.padded);
  }
}

template <class T>
__device__ __forceinline__ void store_core(const HiddenArguments& p, HiddenCore& core, void* out, int64_t at) {
  if (!out) return;
  core.each([&](int row, int column, float& sum) {
    if (row >= p.block || column >= p.block) return;
    const int64_t place = at + row * p.block + column;
    if (p.partial) {
      static_cast<float*>(out)[place] = sum;
    } else {
      static_cast<T*>(out)[place] = dev::from_float<T>(sum);
    }
  });
}

// Grid: experts times shares of the groups.
template <class T>
__global__ void __launch_bounds__(kHiddenThreads, 1) hidden_cores_kernel(const __grid_constant__ HiddenArguments p) {
  DYN_SHARED(T, memory);
  const HiddenShared<T> s(p, HiddenKernel::kCores, memory);
  const int expert = blockIdx.x / p.shares, share = blockIdx.x % p.shares;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const bool computes = warp * 16 < p.padded;
  const int begin = p.offsets[expert], end = p.offsets[expert + 1];
  const int last = (share + 1) * p.share < p.groups ? (share + 1) * p.share : p.groups;
  HiddenCore dright, dright_gate, dleft;
  for (int group = share * p.share; group < last; ++group) {
    float dbias[4] = {};  // of columns 2 t, 2 t + 1, 2 t + 8, 2 t + 9
    for (int slot = begin; slot < end; slot += kHiddenRows) {
      const int rows = end - slot < kHiddenRows ? end - slot : kHiddenRows;
      __syncthreads();  // nobody reads the tiles of the previous rows
      if (static_cast<int>(threadIdx.x) < rows) {
        const int pair = p.pair_of_slot[slot + threadIdx.x];
        s.token[threadIdx.x] = pair / p.top_k;
        s.weight[threadIdx.x] = p.gates[pair];
      }
      if (slot == begin && (p.own > 1 || group == share * p.share)) load_blocks(p, s, expert, group);
      __syncthreads();  // tokens are known
      const auto load = [&](T* tile, const void* from) {
        load_rows(p, tile, rows, whole_tiles(rows), [&](int r) {
          return static_cast<const T*>(from) + int64_t(s.token[r]) * p.features + group * p.block;
        });
      };
      load(s.u, p.u);
      if (p.gated()) load(s.u_gate, p.u_gate);
      load(s.grad, p.grad);
      arrived();
      if (computes) {
        HiddenRows value, z, dh;
        pre_activation(p, s, expert, group, rows, value, z);
        multiply<T, true, true>(dh, s.grad, s.left, p.stride, p.padded, rows);
        UNROLL
        for (int i = 0; i < kHiddenRows / 16; ++i) {
          UNROLL
          for (int e = 0; e < 8; ++e) {
            const int row = i * 16 + (e >> 1 & 1) * 8 + (lane >> 2);
            const int at = row * p.stride + warp * 16 + (lane & 3) * 2 + e / 4 * 8 + (e & 1);
            float& own = value.v[i][e / 4][e % 4];
            float& gradient = dh.v[i][e / 4][e % 4];
            const bool used = row < rows;  // other rows are zero, whatever an activation makes of a bias
            const float weight = used ? s.weight[row] : 0.f;
            const float act = activate(p.activation, z.v[i][e / 4][e % 4]);
            s.h[at] = dev::from_float<T>(used ? weight * (p.gated() ? act * own : act) : 0.f);
            gradient *= weight;
            slopes(p, own, z.v[i][e / 4][e % 4], gradient);
            s.first[at] = dev::from_float<T>(used ? own : 0.f);
            if (p.gated()) s.second[at] = dev::from_float<T>(used ? gradient : 0.f);
            dbias[e / 4 * 2 + (e & 1)] += used ? gradient : 0.f;
          }
        }
      }
      __syncthreads();  // the tiles are whole
      if (!computes) continue;
      if (p.dright) add_outer(p, dright, s.u, s.first, whole_tiles(rows));
      if (p.dright_gate) add_outer(p, dright_gate, s.u_gate, s.second, whole_tiles(rows));
      if (p.dleft) add_outer(p, dleft, s.h, s.grad, whole_tiles(rows));
    }
    if (!p.dbias || !computes) continue;
    UNROLL
    for (int c = 0; c < 4; ++c) {
      UNROLL
      for (int bit = 4; bit < 32; bit <<= 1) dbias[c] += __shfl_xor_sync(dev::kFullWarp, dbias[c], bit);
      const int unit = warp * 16 + (lane & 3) * 2 + c / 2 * 8 + (c & 1);
      if (lane < 4 && unit < p.block) {
        static_cast<T*>(p.dbias)[int64_t(expert) * p.features + group * p.block + unit] = dev::from_float<T>(dbias[c]);
      }
    }
  }
  if (!computes) return;
  const int64_t at = p.partial ? int64_t(share) * p.experts + expert : int64_t(expert) * p.own + (p.own > 1 ? share : 0);
  store_core<T>(p, dright, p.dright, at * p.block * p.block);
  store_core<T>(p, dright_gate, p.dright_gate, at * p.block * p.block);
  store_core<T>(p, dleft, p.dleft, at * p.block * p.block);
}

// out[i] = sum over j of parts[j, i], in the order of j.
struct HiddenSum {
  const float* parts = nullptr;  // [count, size]
  void* out = nullptr;
  int64_t size = 0;
  int count = 0;
  bool as_float = false;
};
struct HiddenSums {
  HiddenSum of[4];
};
// Grid: (blocks of the largest sum, 4).
template <class T>
__global__ void __launch_bounds__(kHiddenThreads) hidden_sums_kernel(const __grid_constant__ HiddenSums sums) {
  const HiddenSum& p = sums.of[blockIdx.y];
  const int64_t i = int64_t(blockIdx.x) * kHiddenThreads + threadIdx.x;
  if (i >= p.size) return;
  float sum = 0.f;
  for (int j = 0; j < p.count; ++j) sum += p.parts[j * p.size + i];
  if (p.as_float) {
    static_cast<float*>(p.out)[i] = sum;
  } else {
    static_cast<T*>(p.out)[i] = dev::from_float<T>(sum);
  }
}

}  // namespace mpoe::cuda
