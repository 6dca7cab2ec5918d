// A matrix product by one block: operands staged through shared memory with cp.async, or resident
// there; its result by runs of adjacent elements.
#pragma once
#include "cuda/tile.cuh"

namespace mpoe::cuda {

constexpr int kStages = 3;

// The group of a tile; `tile` becomes its number inside the group. Returns `count` for a tile past
// the last group's. All lanes of a warp must call it: each looks at one group of 32.
template <class Tiles>
__device__ __forceinline__ int group_of_tile(int& tile, int count, Tiles&& tiles_of_group) {
  const int lane = threadIdx.x & 31;
  ROLLED
  for (int first = 0; first < count; first += 32) {
    const int tiles = first + lane < count ? tiles_of_group(first + lane) : 0;
    const int sum = dev::sum_up_to(tiles);  // of this group and those before it
    const unsigned ended = __ballot_sync(dev::kFullWarp, sum <= tile);
    const int before = __popc(ended);  // groups that end before the tile
    const bool is_here = before < 32;
    const int skipped =
        __shfl_sync(dev::kFullWarp, is_here ? sum - tiles : sum, is_here ? before : 31);
    tile -= skipped;
    if (is_here)
      return first + before;
  }
  return count;
}

// Elements of a line from some column on: where they are, after the line's first, and how many.
struct Run {
  int offset;
  int count;
};
// The columns of a line of adjacent elements.
struct Adjacent {
  int columns;
  __device__ __forceinline__ Run operator()(int column) const { return {column, columns - column}; }
};

// An operand's tiles of kExtent lines (or of kExtent columns of TileT::kK lines, if not kMajor),
// copied from `data`. Line i begins line(i) elements after it, negative: there is none; column(c)
// is the Run that begins with column c. What is not there becomes zero.
template <class T, class TileT, int kExtent, bool kMajor, class Line, class Column>
class Lines {
 public:
  static constexpr int kPerChunk = 16 / static_cast<int>(sizeof(T));
  static constexpr int kStride = padded_stride<T>(kMajor ? TileT::kK : kExtent);
  static constexpr int kElements = kStride * (kMajor ? kExtent : TileT::kK);  // of one stage

  // vector: what begins at a multiple of 16 bytes in a tile does so in memory, and is there as a
  // whole or not at all.
  __device__ __forceinline__
  Lines(const T* data, const Line& line, const Column& column, bool vector)
      : data_(data), line_(line), column_(column), vector_(vector) {
    if constexpr (kMajor) {  // a thread copies from the same lines at every step
      UNROLL
      for (int i = 0; i < kPerThread; ++i)
        from_[i] = line(line_of(i));
    }
  }

  __device__ __forceinline__ int stride() const { return kStride; }
  __device__ __forceinline__ InShared<T> tile(InShared<T> stage, int /*k*/) const { return stage; }

  // Issues the copies of inner indices [k, k + TileT::kK) into `stage`.
  __device__ __forceinline__ void load(InShared<T> stage, int k) const {
    const InShared<T> own = stage + line_of(0) * kStride + column();
    UNROLL
    for (int i = 0; i < kPerThread; ++i) {
      const InShared<T> to = own + i * (TileT::kThreads / kChunksPerLine) * kStride;
      const int64_t line = kMajor ? from_[kMajor ? i : 0] : line_(k + line_of(i));
      const int64_t from = line < 0 ? 0 : line;
      const int first = column() + (kMajor ? k : 0);
      if (vector_) {
        const auto run = column_(first);
        dev::cp_async16(to.address, data_ + from + run.offset, line >= 0 && run.count > 0);
      } else {
        ROLLED
        for (int j = 0; j < kPerChunk; ++j) {
          const auto run = column_(first + j);
          to.data[j] =
              line < 0 || run.count <= 0 ? dev::from_float<T>(0.f) : data_[from + run.offset];
        }
      }
    }
  }

 private:
  static constexpr int kChunksPerLine = (kMajor ? TileT::kK : kExtent) / kPerChunk;
  static constexpr int kChunks = kChunksPerLine * (kMajor ? kExtent : TileT::kK);
  static constexpr int kPerThread = kChunks / TileT::kThreads;
  static_assert(kChunks % TileT::kThreads == 0 && TileT::kThreads % kChunksPerLine == 0);

  static __device__ __forceinline__ int line_of(int i) {
    return static_cast<int>(threadIdx.x) / kChunksPerLine + i * (TileT::kThreads / kChunksPerLine);
  }
  static __device__ __forceinline__ int column() {
    return static_cast<int>(threadIdx.x) % kChunksPerLine * kPerChunk;
  }

  const T* const data_;
  const Line line_;
  const Column column_;
  const bool vector_;
  int64_t from_[kMajor ? kPerThread : 1];
};

template <class T, class TileT, int kExtent, bool kMajor, class Line, class Column>
__device__ __forceinline__ auto lines_at(
    const void* data, int64_t first, const Line& line, const Column& column, bool vector) {
  return Lines<T, TileT, kExtent, kMajor, Line, Column>(
      static_cast<const T*>(data) + first, line, column, vector);
}

// An operand already in shared memory, [mn][k] or [k][mn], padded with zeros as far as the product
// may read.
template <class T, bool kMajor>
struct Resident {
  static constexpr int kElements = 0;
  InShared<T> data;
  int row_stride;

  __device__ __forceinline__ Resident(T* place, int row) : data(place), row_stride(row) {}
  __device__ __forceinline__ int stride() const { return row_stride; }
  __device__ __forceinline__ InShared<T> tile(InShared<T> /*stage*/, int k) const {
    return data + (kMajor ? k : k * row_stride);
  }
  __device__ __forceinline__ void load(InShared<T>, int) const {}
};

template <class TileT>
struct Accumulator {
  float v[TileT::kRowTiles][TileT::kColumnTiles][4];

  __device__ __forceinline__ void clear() {
    for_each_place([&](int, int, int i, int j, int e) { v[i][j][e] = 0.f; });
  }
  __device__ __forceinline__ void add(const Accumulator& other) {
    for_each_place([&](int, int, int i, int j, int e) { v[i][j][e] += other.v[i][j][e]; });
  }
  // Calls f(row, column, i, j, e) for every result v[i][j][e] that this thread holds.
  template <class F>
  static __device__ __forceinline__ void for_each_place(F&& f) {
    const int lane = threadIdx.x & 31;
    const int warp = threadIdx.x >> 5;
    const int row = warp / TileT::kWarpsN * TileT::kWarpM + (lane >> 2);
    const int column = warp % TileT::kWarpsN * TileT::kWarpN + (lane & 3) * 2;
    UNROLL
    for (int i = 0; i < TileT::kRowTiles; ++i) {
      UNROLL
      for (int j = 0; j < TileT::kColumnTiles; ++j) {
        UNROLL
        for (int e = 0; e < 4; ++e)
          f(row + i * 16 + e / 2 * 8, column + j * 8 + e % 2, i, j, e);
      }
    }
  }
  // Calls f(row, column, value) for the same.
  template <class F>
  __device__ __forceinline__ void for_each(F&& f) {
    for_each_place([&](int row, int column, int i, int j, int e) { f(row, column, v[i][j][e]); });
  }
  // Calls f(row, column, value, value at column + 1) for every pair of the tile that this thread
  // holds.
  template <class F>
  __device__ __forceinline__ void for_each_pair(F&& f) const {
    for_each_place([&](int row, int column, int i, int j, int e) {
      if (e % 2 == 0)
        f(row, column, v[i][j][e], v[i][j][e + 1]);
    });
  }
};

// Elements of the memory that `for_each_run` needs.
template <class T, class TileT>
__host__ __device__ constexpr int run_elements() {
  return TileT::kM * padded_stride<T>(TileT::kN);
}
// Calls f(row, column, run) for the runs of 16 bytes of the first `rows` rows and `columns` columns
// of a tile, rounded, in `buffer`, which is shared memory: adjacent threads have adjacent runs.
// Every thread of the block must call it.
template <class T, class TileT, class F>
__device__ __forceinline__ void for_each_run(
    const Accumulator<TileT>& tile, T* buffer, int rows, int columns, F&& f) {
  constexpr int kStride = padded_stride<T>(TileT::kN);
  constexpr int kPer = 16 / static_cast<int>(sizeof(T));
  constexpr int kPerLine = TileT::kN / kPer;
  __syncthreads();  // nobody reads the buffer
  tile.for_each_pair([&](int row, int column, float v0, float v1) {
    *reinterpret_cast<dev::Pack<T, 2>*>(buffer + row * kStride + column) = {
        {dev::from_float<T>(v0), dev::from_float<T>(v1)}};
  });
  __syncthreads();  // the tile is whole
  UNROLL
  for (int i = 0; i < TileT::kM * kPerLine / TileT::kThreads; ++i) {
    const int run = static_cast<int>(threadIdx.x) + i * TileT::kThreads;
    const int row = run / kPerLine;
    const int column = run % kPerLine * kPer;
    if (row >= rows || column >= columns)
      continue;
    f(row, column, buffer + row * kStride + column);
  }
}

// acc += A B over inner indices [0, size). Every thread of the block must call it; rows and columns
// of the tile at or past `rows`, `columns` are not computed (whole warps at a time). `stages` holds
// kStages tiles of both operands. The leading barrier frees `stages` and publishes resident
// operands.
template <class T, class TileT, bool kMajorA, bool kMajorB, class A, class B>
__device__ __forceinline__ void block_gemm(
    Accumulator<TileT>& acc, const A& a, const B& b, int size, int rows, int columns, T* stages) {
  using F = Fragments<T>;
  constexpr int kStage = A::kElements + B::kElements;
  const int lane = threadIdx.x & 31;
  const int warp = threadIdx.x >> 5;
  const int row = warp / TileT::kWarpsN * TileT::kWarpM;
  const int column = warp % TileT::kWarpsN * TileT::kWarpN;
  const int steps = (size + TileT::kK - 1) / TileT::kK;
  const InShared<T> memory(stages);
  int filled = 0;  // the next stage to fill
  int used = 0;    // the next stage to use
  const auto after = [](int stage) {
    return stage + 1 == kStages ? 0 : stage + 1;
  };
  const auto load = [&](int step) {
    const InShared<T> stage = memory + filled * kStage;
    a.load(stage, step * TileT::kK);
    b.load(stage + A::kElements, step * TileT::kK);
    filled = after(filled);
  };
  __syncthreads();  // stages free, resident operands written
  UNROLL
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < steps)
      load(step);
    dev::cp_async_commit();
  }
  for (int step = 0; step < steps; ++step) {
    dev::cp_async_wait<kStages - 2>();
    // This step's tiles have arrived, and nobody reads the stage that is loaded next.
    __syncthreads();
    if (step + kStages - 1 < steps)
      load(step + kStages - 1);
    dev::cp_async_commit();
    const InShared<T> stage = memory + used * kStage;
    used = after(used);
    if (row >= rows || column >= columns)
      continue;
    const InShared<T> tile_a = a.tile(stage, step * TileT::kK);
    const InShared<T> tile_b = b.tile(stage + A::kElements, step * TileT::kK);
    Accumulator<TileT> part;  // of one step, if long sums would lose accuracy
    if constexpr (F::kPartialSums)
      part.clear();
    Accumulator<TileT>& sums = F::kPartialSums ? part : acc;
    UNROLL_BY_2  // float32 takes four steps, for which registers are missing
    for (int k = 0; k < TileT::kK; k += F::kStep) {
      typename F::A fa[TileT::kRowTiles];
      UNROLL
      for (int i = 0; i < TileT::kRowTiles; ++i) {
        F::template load_a<kMajorA>(fa[i], tile_a, a.stride(), row + i * 16, k, lane);
      }
      UNROLL
      for (int j = 0; j < TileT::kColumnTiles; j += 2) {
        typename F::B fb[2];
        F::template load_b<kMajorB>(fb[0], fb[1], tile_b, b.stride(), column + j * 8, k, lane);
        UNROLL
        for (int i = 0; i < TileT::kRowTiles; ++i) {
          F::multiply(sums.v[i][j], fa[i], fb[0]);
          F::multiply(sums.v[i][j + 1], fa[i], fb[1]);
        }
      }
    }
    if constexpr (F::kPartialSums)
      acc.add(part);
  }
}

}  // namespace mpoe::cuda
