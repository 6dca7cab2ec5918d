// Gradients of weights and biases: sums over an expert's slots, in their order. Also the sums of parts.
#pragma once
#include "cuda/experts/slots.cuh"

namespace mpoe::cuda {

// One side of a sum of outer products: lines of `stride` elements by slot, or by the slot's token.
struct SummedLines {
  const void* data = nullptr;
  int width = 0, step = 0;  // elements of a group; from one group to the next
  bool by_token = false, vector = true;
  int64_t stride = 0;  // from one line to the next
};
// out[e, g, i, j] = sum over slots s of e of a[s, g, i] b[s, g, j]; with shared weights summed over g too.
struct WeightGradient {
  SummedLines a, b;
  void* out = nullptr;  // null: not needed
};
struct WeightGradients {
  WeightGradient of[3];
  int tiles = 0;              // most tiles of one weight
  int share = 1, shares = 1;  // groups per share; shares of a launch
  int first_share = 0;        // parts of a shared weight's sum before the launch's
  bool partial = false;       // `out` is float32 [parts, E, .., ..]
};

// Grid: (weights times tiles, three kinds, shares). Shared: stages.
template <class T>
__global__ void __launch_bounds__(kExpertsThreads, sizeof(T) == 2 ? 4 : 2)
    experts_weights_kernel(const __grid_constant__ ExpertsArguments p, const __grid_constant__ WeightGradients all) {
  using TileT = ExpertsTile<T>;
  DYN_SHARED(T, stages);
  SHARED_ARRAY(int, slots, kSlotsAtOnce);
  SHARED_ARRAY(int, tokens, kSlotsAtOnce);
  const WeightGradient& own = all.of[blockIdx.y];
  if (!own.out) return;
  const int weight = blockIdx.x / all.tiles, tile = blockIdx.x - weight * all.tiles;
  const int across = (own.b.width + TileT::kN - 1) / TileT::kN;
  const int i = tile / across * TileT::kM, j = tile % across * TileT::kN;
  if (i >= own.a.width) return;
  const int own_groups = p.own > 1 ? p.slice : 1, expert = weight / own_groups, share = blockIdx.z;
  const int first = p.first_group + (p.own > 1 ? weight - expert * own_groups : share * all.share);
  const int end = p.first_group + p.slice, most = first + (p.own > 1 ? 1 : all.share), last = most < end ? most : end;
  Accumulator<TileT> sum;
  sum.clear();
  int count = 1;  // of the expert's slots
  for (int done = 0; done < count; done += kSlotsAtOnce) {
    __syncthreads();  // nobody reads the slots before
    count = 0;
    for (int choice = 0; choice < p.top_k; ++choice) {
      const int begin = p.begin(choice, expert), end = p.end(choice, expert), shift = count - begin - done;
      for (int s = begin + threadIdx.x; s < end; s += kExpertsThreads) {
        if (s + shift < 0 || s + shift >= kSlotsAtOnce) continue;
        slots[s + shift] = s;
        tokens[s + shift] = p.pair_of_slot[s] / p.top_k;
      }
      count += end - begin;
    }
    const int here = count - done < kSlotsAtOnce ? count - done : kSlotsAtOnce;
    __syncthreads();  // slots are known
    for (int group = first; group < last; ++group) {
      const auto operand = [&](const SummedLines& lines, int from) {
        const int* const rows = lines.by_token ? tokens : slots;
        return expert_lines<T, false>(lines.data, int64_t(group) * lines.step + from, lines.width - from, lines.vector,
                                      [=, stride = lines.stride](int s) { return s < here ? rows[s] * stride : -1; });
      };
      block_gemm<T, TileT, false, false>(sum, operand(own.a, i), operand(own.b, j), here, own.a.width - i,
                                         own.b.width - j, stages);
    }
  }
  const int64_t number = all.partial ? int64_t(all.first_share + share) * p.experts + expert
                                     : int64_t(expert) * p.own + (p.own > 1 ? first : 0);
  const int64_t at = (number * own.a.width + i) * own.b.width + j;
  sum.for_each([&](int row, int column, float& value) {
    if (i + row >= own.a.width || j + column >= own.b.width) return;
    const int64_t place = at + int64_t(row) * own.b.width + column;
    if (all.partial) {
      static_cast<float*>(own.out)[place] = value;
    } else {
      static_cast<T*>(own.out)[place] = dev::from_float<T>(value);
    }
  });
}

// dbias[e, unit] = sum of d, see ExpertsArguments, over e's slots. Grid: (E, 32 of the slice's units each).
template <class T>
__global__ void __launch_bounds__(kExpertsThreads)
    experts_bias_kernel(const __grid_constant__ ExpertsArguments p, const void* d, void* dbias) {
  constexpr int kTogether = kExpertsThreads / 32, kAhead = 8;  // slots at once; loads in flight
  SHARED_ARRAY(float, parts, kExpertsThreads);
  const int expert = blockIdx.x, unit = p.first_group * p.units + blockIdx.y * 32 + (threadIdx.x & 31);
  const int units = (p.first_group + p.slice) * p.units;
  const T* const from = static_cast<const T*>(d) + unit / p.units * p.padded + unit % p.units;
  float sum = 0.f;
  for (int choice = 0; choice < p.top_k; ++choice) {
    const int end = unit < units ? p.end(choice, expert) : 0;
    for (int slot = p.begin(choice, expert) + (threadIdx.x >> 5); slot < end; slot += kTogether * kAhead) {
      UNROLL
      for (int k = 0; k < kAhead; ++k) {
        const int own = slot + k * kTogether;
        if (own < end) sum += dev::to_float(from[int64_t(own) * p.slice * p.padded]);
      }
    }
  }
  parts[threadIdx.x] = sum;
  __syncthreads();  // parts are whole
  if (threadIdx.x >= 32 || unit >= units) return;
  for (int other = 1; other < kTogether; ++other) sum += parts[other * 32 + threadIdx.x];
  static_cast<T*>(dbias)[int64_t(expert) * p.groups * p.units + unit] = dev::from_float<T>(sum);
}

// out[i] = sum over j of parts[j, i], in the order of j.
struct PartsSum {
  const float* parts = nullptr;  // [count, size]
  void* out = nullptr;
  int64_t size = 0;
  int count = 0;
  bool as_float = false;
};
struct PartsSums {
  PartsSum of[4];
};
// Grid: (blocks of the largest sum, 4).
template <class T>
__global__ void __launch_bounds__(kExpertsThreads) parts_sums_kernel(const __grid_constant__ PartsSums sums) {
  const PartsSum& p = sums.of[blockIdx.y];
  const int64_t i = int64_t(blockIdx.x) * kExpertsThreads + threadIdx.x;
  if (i >= p.size) return;
  float sum = 0.f;
  for (int j = 0; j < p.count; ++j) sum += p.parts[j * p.size + i];
  if (p.as_float) {
    static_cast<float*>(p.out)[i] = sum;
  } else {
    static_cast<T*>(p.out)[i] = dev::from_float<T>(sum);
  }
}

struct ExpertsLaunches : ExpertsArguments {
  bool is_backward = false;
  WeightGradients weights;
  void* dbias = nullptr;
  PartsSums parts;
};
// The tiles of the forward, or the gradients whose pointers are set; compiled in a file per type.
template <class T>
void launch(const ExpertsLaunches& p, cudaStream_t stream);

}  // namespace mpoe::cuda
