// What the kernels of experts.h share: their arguments, operands whose lines may be looked up, and stores of tiles.
#pragma once
#include "cuda/activation.cuh"
#include "cuda/block_gemm.cuh"
#include "cuda/experts/experts.h"

namespace mpoe::cuda {

template <class T>
using ExpertsTile = Tile<T, 64, 64, 32, 32>;
constexpr int kExpertsThreads = 128, kExpertsRows = 64;  // slots of a tile
constexpr int kSlotsAtOnce = 1024;                       // whose tokens the weights' kernel looks up together

struct ExpertsArguments : ExpertsInputs {
  int tiles = 0;                                // at most so many tiles of slots
  bool vector_in = false, vector_out = false;   // lines of inputs, of outputs are whole, aligned runs of 16 bytes
  const int* offsets = nullptr;                 // [E + 1] slots of every expert
  const int64_t *token_of_slot = nullptr, *slot_of_token = nullptr;  // [N], [T, K]
  void* rows = nullptr;                         // forward: results of the slots, without gates [N, G columns]
  // Backward, by slot. h: hidden units times gates; dvalue, dz: gradients of x up and, if gated, of what is activated.
  const void* grad = nullptr;
  void *h = nullptr, *dvalue = nullptr, *dz = nullptr;  // [N, G padded]; h null: not needed
  void *dx_rows = nullptr, *dx_gate_rows = nullptr;     // [N, G width] or null
  float* gate_parts = nullptr;                          // [G, N] or null
  int padded = 0;                                       // `units`, completed to whole 16 bytes

  __host__ __device__ bool gated() const { return up_gate != nullptr; }
  __host__ __device__ int64_t slots() const { return int64_t(tokens) * top_k; }
  // Elements before an expert's weight for a group, of `size` elements each.
  __device__ __forceinline__ int64_t weight(int expert, int group, int size) const {
    return (int64_t(expert) * own + (own > 1 ? group : 0)) * size;
  }
};

// Elements of shared memory for the stages of any product of two `Lines`; `store_tile` needs less.
template <class T>
__host__ __device__ constexpr int stage_elements() {
  constexpr int along = kExpertsRows * padded_stride<T>(ExpertsTile<T>::kK, true);
  constexpr int across = ExpertsTile<T>::kK * padded_stride<T>(kExpertsRows, false);
  return kStages * 2 * (along > across ? along : across);
}

// An operand's tiles of 64 x TileT::kK, copied from lines of global memory, [mn][k] (kMajor) or [k][mn]. Line i begins
// at line(i), a pointer. Everything past the number of lines, or of columns in a line, becomes zero.
template <class T, bool kMajor, class Line>
class Lines {
 public:
  using TileT = ExpertsTile<T>;
  static constexpr bool kResident = false;
  static constexpr int kPerChunk = 16 / static_cast<int>(sizeof(T));
  static constexpr int kStride = padded_stride<T>(kMajor ? TileT::kK : kExpertsRows, kMajor);
  static constexpr int kElements = kStride * (kMajor ? kExpertsRows : TileT::kK);

  __device__ __forceinline__ Lines(const Line& line, int lines, int columns, bool vector)
      : line_(line), lines_(lines), columns_(columns), vector_(vector) {
    if constexpr (kMajor) {  // a thread copies from the same lines at every step
      UNROLL
      for (int i = 0; i < kPerThread; ++i) {
        const int own = line_of(i);
        from_[i] = line(own < lines ? own : 0);
      }
    }
  }

  __device__ __forceinline__ int stride() const { return kStride; }
  __device__ __forceinline__ const T* tile(const T* stage, int /*k*/) const { return stage; }

  // Issues the copies of inner indices [k, k + TileT::kK) into `stage`.
  __device__ __forceinline__ void load(T* stage, int k) const {
    UNROLL
    for (int i = 0; i < kPerThread; ++i) {
      const int own = line_of(i), line = kMajor ? own : k + own;
      const int first = column_of(i), column = kMajor ? k + first : first;
      const int count = line < lines_ ? columns_ - column : 0;  // in this line from here on
      const T* from;
      if constexpr (kMajor) {
        from = from_[i] + (count > 0 ? column : 0);
      } else {
        from = line_(count > 0 ? line : 0) + (count > 0 ? column : 0);
      }
      T* const to = stage + own * kStride + first;
      if (vector_) {
        dev::cp_async16(to, from, count <= 0 ? 0 : count < kPerChunk ? count * static_cast<int>(sizeof(T)) : 16);
      } else {
        UNROLL
        for (int j = 0; j < kPerChunk; ++j) to[j] = j < count ? from[j] : dev::from_float<T>(0.f);
      }
    }
  }

 private:
  static constexpr int kChunksPerLine = (kMajor ? TileT::kK : kExpertsRows) / kPerChunk;
  static constexpr int kPerThread = kChunksPerLine * (kMajor ? kExpertsRows : TileT::kK) / kExpertsThreads;

  static __device__ __forceinline__ int line_of(int i) {
    return (static_cast<int>(threadIdx.x) + i * kExpertsThreads) / kChunksPerLine;
  }
  static __device__ __forceinline__ int column_of(int i) {
    return (static_cast<int>(threadIdx.x) + i * kExpertsThreads) % kChunksPerLine * kPerChunk;
  }

  const Line line_;
  const int lines_, columns_;
  const bool vector_;
  const T* from_[kMajor ? kPerThread : 1];
};

// The operand whose lines begin at line(i), see `Lines`.
template <class T, bool kMajor, class Line>
__device__ __forceinline__ Lines<T, kMajor, Line> lines_at(int lines, int columns, bool vector, const Line& line) {
  return Lines<T, kMajor, Line>(line, lines, columns, vector);
}
// The operand of adjacent lines of `stride` elements.
template <class T, bool kMajor>
__device__ __forceinline__ auto lines_from(const void* data, int64_t first, int stride, int lines, int columns,
                                           bool vector) {
  const T* const from = static_cast<const T*>(data) + first;
  return lines_at<T, kMajor>(lines, columns, vector, [from, stride](int i) { return from + int64_t(i) * stride; });
}

// Stores `rows` rows and `columns` columns of a tile, row i where line(i) points. `buffer`: of a tile's size, in shared
// memory; every thread must call it.
template <class T, class Line>
__device__ __forceinline__ void store_tile(const Accumulator<ExpertsTile<T>>& tile, T* buffer, int rows, int columns,
                                           bool vector, Line&& line) {
  constexpr int kStride = padded_stride<T>(kExpertsRows, true), kPer = 16 / static_cast<int>(sizeof(T));
  constexpr int kChunksPerLine = kExpertsRows / kPer;
  static_assert(kExpertsRows * kStride <= stage_elements<T>());
  __syncthreads();  // nobody reads the buffer
  tile.for_each_pair([&](int row, int column, float v0, float v1) {
    *reinterpret_cast<dev::Pack<T, 2>*>(buffer + row * kStride + column) = {
        {dev::from_float<T>(v0), dev::from_float<T>(v1)}};
  });
  __syncthreads();  // the tile is whole
  UNROLL
  for (int i = 0; i < kExpertsRows * kChunksPerLine / kExpertsThreads; ++i) {
    const int chunk = static_cast<int>(threadIdx.x) + i * kExpertsThreads;
    const int row = chunk / kChunksPerLine, column = chunk % kChunksPerLine * kPer;
    if (row >= rows || column >= columns) continue;
    T* const to = line(row) + column;
    const T* const from = buffer + row * kStride + column;
    if (vector) {
      *reinterpret_cast<dev::Pack<T, kPer>*>(to) = *reinterpret_cast<const dev::Pack<T, kPer>*>(from);
    } else {
      for (int j = 0; j < kPer && column + j < columns; ++j) to[j] = from[j];
    }
  }
}

}  // namespace mpoe::cuda
