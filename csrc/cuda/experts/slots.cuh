// What the kernels of experts.h share: their arguments, tiles of slots of one expert, and sums of choices in turn.
#pragma once
#include "cuda/activation.cuh"
#include "cuda/block_gemm.cuh"
#include "cuda/experts/experts.h"

namespace mpoe::cuda {

template <class T>
using ExpertsTile = Tile<T, 64, 64, 32, 32>;
constexpr int kExpertsThreads = 128, kExpertsRows = 64;  // slots of a tile
constexpr int kSlotsAtOnce = 1024;                       // that the weights' kernel looks up together

struct ExpertsArguments : ExpertsInputs {
  int tiles = 0;                               // at most so many tiles of slots of a choice
  int first_group = 0, slice = 1;              // groups of a launch
  bool vector_in = false, vector_out = false;  // lines of inputs, of outputs are whole, aligned runs of 16 bytes
  // Slots are sorted by choice, then by expert: those of choice k and expert e begin at offsets[k (E + 1) + e], and
  // those of tokens without an expert are expert E's.
  const int *offsets = nullptr, *pair_of_slot = nullptr;  // [K (E + 1)], [N]
  int* turns = nullptr;        // [2, G]: tiles that have begun, slots whose rows are written
  void *out = nullptr, *out_gate = nullptr;        // [T, G columns], or gradients of x, x_gate [T, G width] or null
  float *sums = nullptr, *sums_gate = nullptr;     // instead of `out` until the last of more than two choices
  // Backward, by slot, as if from group 0 on. h: hidden units times gates; dvalue, dz: gradients of x up and, if gated,
  // of what is activated.
  const void* grad = nullptr;
  void *h = nullptr, *dvalue = nullptr, *dz = nullptr;  // [N, slice padded]; h null: not needed
  float* gate_parts = nullptr;                          // [G, T, K] or null
  int padded = 0;                                       // `units`, completed to whole 16 bytes

  __host__ __device__ bool gated() const { return up_gate != nullptr; }
  __host__ __device__ int64_t slots() const { return int64_t(tokens) * top_k; }
  __device__ __forceinline__ int begin(int choice, int expert) const {
    return offsets[choice * (experts + 1) + expert];
  }
  __device__ __forceinline__ int end(int choice, int expert) const {
    return expert < experts ? begin(choice, expert + 1) : (choice + 1) * tokens;
  }
  // Elements before an expert's weight for a group, of `size` elements each.
  __device__ __forceinline__ int64_t weight(int expert, int group, int size) const {
    return (int64_t(expert) * own + (own > 1 ? group : 0)) * size;
  }
};

// Elements of shared memory for the stages of any product of two `Lines`, and for runs of its result.
template <class T>
__host__ __device__ constexpr int stage_elements() {
  constexpr int along = kExpertsRows * padded_stride<T>(ExpertsTile<T>::kK);
  constexpr int across = ExpertsTile<T>::kK * padded_stride<T>(kExpertsRows);
  constexpr int stages = kStages * 2 * (along > across ? along : across), runs = run_elements<T, ExpertsTile<T>>();
  return stages > runs ? stages : runs;
}

// The operand of 64 lines that begin at line(i), negative: none, each of `columns` adjacent elements.
template <class T, bool kMajor, class Line>
__device__ __forceinline__ auto expert_lines(const void* data, int64_t first, int columns, bool vector,
                                             const Line& line) {
  return lines_at<T, ExpertsTile<T>, kExpertsRows, kMajor>(data, first, line, Adjacent{columns}, vector);
}
// The operand of adjacent lines of `stride` elements.
template <class T, bool kMajor>
__device__ __forceinline__ auto expert_lines(const void* data, int64_t first, int stride, int lines, int columns,
                                             bool vector) {
  const auto line = [stride, lines](int i) { return i < lines ? int64_t(i) * stride : -1; };
  return expert_lines<T, kMajor>(data, first, columns, vector, line);
}

// The slots of a block's tile, in one group of units. Blocks that add to a token's row do so in the order of its
// choices. Tiles are taken in the order in which blocks begin, so whatever a block waits for has begun before it.
struct SlotTile {
  int group, choice, expert, begin, rows;  // rows = 0: no tile
  bool owned;                              // by an expert

  // In shared memory, of the rows.
  struct Shared {
    int taken, pairs[kExpertsRows], tokens[kExpertsRows];
    float gates[kExpertsRows];
  };
  static __device__ __forceinline__ Shared& shared() {
    SHARED_ARRAY(Shared, of_block, 1);
    return *of_block;
  }

  __device__ __forceinline__ explicit SlotTile(const ExpertsArguments& p) {
    const int tiles = p.tiles * p.top_k, row = threadIdx.x;
    group = blockIdx.x / tiles;
    int tile = blockIdx.x - group * tiles;
    group += p.first_group;
    if (p.top_k > 1) {
      if (row == 0) shared().taken = dev::ticket(p.turns + group);
      __syncthreads();  // the tile is known
      tile = shared().taken;
    }
    choice = tile / p.tiles;
    tile -= choice * p.tiles;
    expert = group_of_tile(tile, p.experts + 1, [&](int e) {
      return (p.end(choice, e) - p.begin(choice, e) + kExpertsRows - 1) / kExpertsRows;
    });
    owned = expert < p.experts;
    rows = 0;
    if (expert > p.experts) return;
    begin = p.begin(choice, expert) + tile * kExpertsRows;
    rows = p.end(choice, expert) - begin;
    rows = rows < kExpertsRows ? rows : kExpertsRows;
    if (row < rows) {
      const int pair = shared().pairs[row] = p.pair_of_slot[begin + row];
      shared().tokens[row] = pair / p.top_k;
    }
    if (row < kExpertsRows) shared().gates[row] = row < rows && owned ? p.gates[shared().pairs[row]] : 0.f;
    __syncthreads();  // rows are known
  }

  // The operand of the rows' columns of this group in `data` [T, G width].
  template <class T>
  __device__ __forceinline__ auto lines(const void* data, int groups, int width, bool vector) const {
    const auto line = [stride = int64_t(groups) * width, rows = rows](int row) {
      return row < rows ? shared().tokens[row] * stride : -1;
    };
    return expert_lines<T, true>(data, int64_t(group) * width, width, vector, line);
  }

  // Until the rows of earlier choices are written; what follows must begin with a barrier.
  __device__ __forceinline__ void wait(const ExpertsArguments& p) const {
    if (choice > 0 && threadIdx.x == 0) dev::wait_for(p.turns + p.groups + group, choice * p.tokens);
  }
  __device__ __forceinline__ void finish(const ExpertsArguments& p) const {
    if (p.top_k == 1) return;
    __syncthreads();  // all rows are written
    if (threadIdx.x == 0) dev::signal(p.turns + p.groups + group, rows);
  }

  // Adds columns from `first` on to the rows of `out` [T, G width]; `sums`: see ExpertsArguments.
  template <class T>
  __device__ __forceinline__ void add(const ExpertsArguments& p, const Accumulator<ExpertsTile<T>>& sum, T* stages,
                                      void* out, float* sums, int width, int first, bool vector) const {
    constexpr int kPer = 16 / static_cast<int>(sizeof(T));
    const bool later = choice > 0, last = choice + 1 == p.top_k;
    for_each_run(sum, stages, rows, width - first, [&](int row, int column, const T* run) {
      const int64_t at = (int64_t(shared().tokens[row]) * p.groups + group) * width + first + column;
      T* const to = static_cast<T*>(out) + at;
      const auto add_some = [&](auto per, int i) {
        constexpr int kOwn = decltype(per)::value;
        dev::Pack<float, kOwn> values = dev::load<kOwn>(run + i);
        if (later) {
          const auto before = sums ? dev::load<kOwn>(sums + at + i) : dev::load<kOwn>(to + i);
          UNROLL
          for (int j = 0; j < kOwn; ++j) values.v[j] += before.v[j];
        }
        sums && !last ? dev::store(values, sums + at + i) : dev::store(values, to + i);
      };
      if (vector) return add_some(std::integral_constant<int, kPer>{}, 0);
      for (int i = 0; i < kPer && first + column + i < width; ++i) add_some(std::integral_constant<int, 1>{}, i);
    });
  }
};

}  // namespace mpoe::cuda
