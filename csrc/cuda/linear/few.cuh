// Grouped product of few rows in one launch: each block computes some columns for a handful of rows, contracting the
// rows with left, central and right in turn. No weight is rebuilt, only the result is written, all sums are in float32.
//
//   u[row, jL, a, iC, iR] = sum_iL x[row, iL, iC, iR] left[iL, jL, a]
//   v[row, jL, jC, b, iR] = sum_(a, iC) u central[a, iC, jC, b]
//   y[row, jL, jC, jR] = activation(sum_(b, iR) v right[b, iR, jR] + bias)      for the block's own jL, jC, jR
#pragma once
#include "cuda/activation.cuh"

namespace mpoe::cuda {

constexpr int kFewThreads = 128;
constexpr int kFewRows = 8;   // results that a thread holds for each of its columns
constexpr int kFewAhead = 4;  // loads of weights in flight

struct FewArguments {
  const void *x = nullptr, *left = nullptr, *central = nullptr, *right = nullptr, *bias = nullptr;
  void *y = nullptr, *pre_activation = nullptr;
  const int* offsets = nullptr;           // [E + 1], or
  const int64_t* expert_of_slot = nullptr;  // [N], negative: none
  const int64_t* row_index = nullptr;     // [N] or null
  const int64_t* out_index = nullptr;     // [N], row of y of every slot; or null
  const float* gates = nullptr;           // by row of y; or null
  int experts = 0, slots = 0, rows = 0;   // rows: per block
  int in_features = 0, out_features = 0, activation = 0;
  int iL = 0, jL = 0, a = 0, iC = 0, jC = 0, b = 0, iR = 0, jR = 0;
  int kept_left = 0, kept_centre = 0, kept_right = 0;  // of jL, jC, jR, per block
  bool vector_left = false, vector_central = false, vector_right = false;  // 16-byte loads
};

// A row-major matrix [k, n] in global memory.
template <class T>
struct WeightRows {
  const T* data;
  int stride;
  int columns;
  bool vector;

  static constexpr int kChunk = 16 / static_cast<int>(sizeof(T));
  struct alignas(16) Chunk {
    T v[kChunk];
  };
  __device__ __forceinline__ Chunk load(int k, int n) const {
    const T* from = data + int64_t(k) * stride + n;
    if (vector) return *reinterpret_cast<const Chunk*>(from);
    Chunk chunk;
    UNROLL
    for (int c = 0; c < kChunk; ++c) chunk.v[c] = n + c < columns ? from[c] : dev::from_float<T>(0.f);
    return chunk;
  }
};

// Calls store(m, n, sum_k value(k, m) weight[k, n]) for m < M. Lanes split the columns and the inner index; `sums`
// holds kFewThreads kFewRows kChunk floats. Every thread of the block must call it; it starts and ends with a barrier.
template <class T, class Value, class Store>
__device__ __forceinline__ void small_product(int M, int K, const WeightRows<T>& weight, float* sums, Value&& value,
                                              Store&& store) {
  constexpr int kChunk = WeightRows<T>::kChunk;
  int lanes = 1;  // along n
  while (lanes < kFewThreads && lanes * kChunk < weight.columns) lanes *= 2;
  const int inner_lanes = kFewThreads / lanes;
  const int thread = threadIdx.x, lane = thread % lanes, inner = thread / lanes;
  for (int n0 = 0; n0 < weight.columns; n0 += lanes * kChunk) {
    const int n = n0 + lane * kChunk;
    for (int m0 = 0; m0 < M; m0 += kFewRows) {
      float acc[kFewRows][kChunk] = {};
      __syncthreads();  // `sums` are free, what value() reads is written
      for (int k0 = inner; k0 < K && n < weight.columns; k0 += kFewAhead * inner_lanes) {
        typename WeightRows<T>::Chunk chunk[kFewAhead];
        UNROLL
        for (int i = 0; i < kFewAhead; ++i) {
          const int k = k0 + i * inner_lanes;
          if (k < K) chunk[i] = weight.load(k, n);
        }
        UNROLL
        for (int i = 0; i < kFewAhead; ++i) {
          const int k = k0 + i * inner_lanes;
          if (k >= K) break;
          UNROLL
          for (int m = 0; m < kFewRows; ++m) {
            const float factor = m0 + m < M ? value(k, m0 + m) : 0.f;
            UNROLL
            for (int c = 0; c < kChunk; ++c) acc[m][c] = fmaf(factor, dev::to_float(chunk[i].v[c]), acc[m][c]);
          }
        }
      }
      UNROLL
      for (int m = 0; m < kFewRows; ++m) {
        UNROLL
        for (int c = 0; c < kChunk; ++c) sums[(m * kChunk + c) * kFewThreads + thread] = acc[m][c];
      }
      __syncthreads();
      for (int i = thread; i < kFewRows * kChunk * lanes; i += kFewThreads) {
        const int m = i / (kChunk * lanes), column = i % (kChunk * lanes);
        if (m0 + m >= M || n0 + column >= weight.columns) continue;
        const float* from = sums + (m * kChunk + column % kChunk) * kFewThreads + column / kChunk;
        float sum = 0.f;
        for (int part = 0; part < inner_lanes; ++part) sum += from[part * lanes];
        store(m0 + m, n0 + column, sum);
      }
    }
  }
  __syncthreads();
}

// -1 if no expert owns the slot.
__device__ __forceinline__ int expert_of(const FewArguments& p, int slot) {
  if (p.expert_of_slot) {
    const int64_t expert = p.expert_of_slot[slot];
    return expert < p.experts ? static_cast<int>(expert) : -1;
  }
  int low = 0, high = p.experts;  // offsets[low] <= slot < offsets[high], if the last one is above it
  if (slot >= p.offsets[high]) return -1;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (p.offsets[middle] <= slot ? low : high) = middle;
  }
  return low;
}

// Grid: (groups of columns, groups of rows).
template <class T>
__global__ void __launch_bounds__(kFewThreads) few_kernel(const __grid_constant__ FewArguments p) {
  DYN_SHARED(float, shared);
  const int first = blockIdx.y * p.rows;
  const int count = first + p.rows < p.slots ? p.rows : p.slots - first;
  int rest = blockIdx.x;
  const int right = rest % (p.jR / p.kept_right) * p.kept_right;
  rest /= p.jR / p.kept_right;
  const int centre = rest % (p.jC / p.kept_centre) * p.kept_centre;
  const int left = rest / (p.jC / p.kept_centre) * p.kept_left;

  const int own_rows = p.rows * p.kept_left * p.iR;  // of u and v: one for each iR of each kept jL
  int* const experts = reinterpret_cast<int*>(shared);  // of the block's rows
  float* const sums = shared + kFewThreads;
  float* const u = sums + kFewThreads * kFewRows * WeightRows<T>::kChunk;  // [a, iC, row, jL, iR]
  float* const v = u + p.a * p.iC * own_rows;                               // [row, b, iR, jL, jC]
  const int v_row = p.b * p.iR * p.kept_left * p.kept_centre;

  if (static_cast<int>(threadIdx.x) < count) experts[threadIdx.x] = expert_of(p, first + threadIdx.x);
  __syncthreads();
  for (int row = 0; row < count; ++row) {
    const int expert = experts[row];
    if (expert < 0) {
      for (int i = threadIdx.x; i < p.a * p.iC * p.kept_left * p.iR; i += kFewThreads) {
        const int k = i / (p.kept_left * p.iR), m = i % (p.kept_left * p.iR);
        u[k * own_rows + row * p.kept_left * p.iR + m] = 0.f;
      }
      continue;
    }
    const int64_t x_row = p.row_index ? p.row_index[first + row] : first + row;
    const T* const x = static_cast<const T*>(p.x) + x_row * p.in_features;
    const int inside = p.iC * p.iR;
    const WeightRows<T> weight{static_cast<const T*>(p.left) + (int64_t(expert) * p.iL * p.jL + left) * p.a, p.jL * p.a,
                               p.kept_left * p.a, p.vector_left};
    small_product<T>(
        inside, p.iL, weight, sums,
        [&](int k, int m) {
          const int i = k * inside + m;
          return i < p.in_features ? dev::to_float(x[i]) : 0.f;
        },
        [&](int m, int n, float sum) {
          const int at = n / p.a * p.iR + m % p.iR;
          u[(n % p.a * p.iC + m / p.iR) * own_rows + row * p.kept_left * p.iR + at] = sum;
        });
  }
  const WeightRows<T> central{static_cast<const T*>(p.central) + int64_t(centre) * p.b, p.jC * p.b,
                              p.kept_centre * p.b, p.vector_central};
  small_product<T>(
      count * p.kept_left * p.iR, p.a * p.iC, central, sums, [&](int k, int m) { return u[k * own_rows + m]; },
      [&](int m, int n, float sum) {
        const int row = m / (p.kept_left * p.iR), jl = m / p.iR % p.kept_left;
        const int inner = n % p.b * p.iR + m % p.iR;
        v[row * v_row + (inner * p.kept_left + jl) * p.kept_centre + n / p.b] = sum;
      });
  for (int row = 0; row < count; ++row) {
    const int expert = experts[row];
    const auto write = [&](int m, int n, float sum, bool owned) {
      const int column = (left + m / p.kept_centre) * p.jC * p.jR + (centre + m % p.kept_centre) * p.jR + right + n;
      if (column >= p.out_features) return;
      const int64_t to = p.out_index ? p.out_index[first + row] : first + row;
      const int64_t at = to * p.out_features + column;
      if (owned && p.bias) sum += dev::to_float(static_cast<const T*>(p.bias)[column]);
      if (p.pre_activation) static_cast<T*>(p.pre_activation)[at] = dev::from_float<T>(sum);
      T result = dev::from_float<T>(owned ? activate(p.activation, sum) : 0.f);
      if (p.gates && owned) result = dev::from_float<T>(p.gates[to] * dev::to_float(result));
      static_cast<T*>(p.y)[at] = result;
    };
    if (expert < 0) {
      for (int i = threadIdx.x; i < p.kept_left * p.kept_centre * p.kept_right; i += kFewThreads) {
        write(i / p.kept_right, i % p.kept_right, 0.f, false);
      }
      continue;
    }
    const WeightRows<T> weight{static_cast<const T*>(p.right) + int64_t(expert) * p.b * p.iR * p.jR + right, p.jR,
                               p.kept_right, p.vector_right};
    const float* const values = v + row * v_row;
    small_product<T>(
        p.kept_left * p.kept_centre, p.b * p.iR, weight, sums,
        [&](int k, int m) { return values[k * p.kept_left * p.kept_centre + m]; },
        [&](int m, int n, float sum) { write(m, n, sum, true); });
  }
}

}  // namespace mpoe::cuda
