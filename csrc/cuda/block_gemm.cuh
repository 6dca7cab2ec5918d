// A matrix product by one block: operands staged through shared memory with cp.async, or resident there.
#pragma once
#include "cuda/index.cuh"
#include "cuda/tile.cuh"

namespace mpoe::cuda {

constexpr int kStages = 3;

// The group of a tile; `tile` becomes its number inside the group. Returns `count` for a tile past the last group's.
// All lanes of a warp must call it: each looks at one group of 32.
template <class Tiles>
__device__ __forceinline__ int group_of_tile(int& tile, int count, Tiles&& tiles_of_group) {
  const int lane = threadIdx.x & 31;
  ROLLED
  for (int first = 0; first < count; first += 32) {
    const int own = first + lane < count ? tiles_of_group(first + lane) : 0;
    int sum = own;  // of this group and those before it
    UNROLL
    for (int step = 1; step < 32; step <<= 1) {
      const int left = __shfl_up_sync(dev::kFullWarp, sum, static_cast<unsigned>(step));
      if (lane >= step) sum += left;
    }
    const int before = __popc(__ballot_sync(dev::kFullWarp, sum <= tile));  // groups that end before the tile
    const int skipped = __shfl_sync(dev::kFullWarp, before < 32 ? sum - own : sum, before < 32 ? before : 31);
    tile -= skipped;
    if (before < 32) return first + before;
  }
  return count;
}

// One operand's tiles of kExtent (rows mn) x TileT::kK, copied from global memory. mn and k are linear indices;
// everything at or past mn_end, k_end or the operand's limit becomes zero.
template <class T, class TileT, int kExtent, bool kMajor>
class Staged {
 public:
  static constexpr bool kResident = false;
  static constexpr int kPerChunk = 16 / static_cast<int>(sizeof(T));
  static constexpr int kStride = padded_stride<T>(kMajor ? TileT::kK : kExtent, kMajor);
  static constexpr int kElements = kStride * (kMajor ? kExtent : TileT::kK);  // of one stage

  __device__ __forceinline__ Staged(const Operand& operand, int64_t base, int mn_begin, int mn_end, int k_end)
      : operand_(operand),
        base_(static_cast<const T*>(operand.data) + base),
        mn_begin_(mn_begin),
        mn_end_(mn_end),
        k_end_(k_end) {
    UNROLL
    for (int i = 0; i < kFixed; ++i) {
      const int mn = mn_begin_ + fixed_mn(i);
      const Position p = operand_.mn.at(mn < mn_end_ ? mn : 0);
      inner_[i] = p.inner;
      row_[i] = operand_.mn.slot_first && mn < mn_end_ ? operand_.row_of(p.slot) * operand_.slot_stride : 0;
    }
  }

  __device__ __forceinline__ int stride() const { return kStride; }
  __device__ __forceinline__ const T* tile(const T* stage, int /*k*/) const { return stage; }

  // Issues the copies of inner indices [k, k + TileT::kK) into `stage`.
  __device__ __forceinline__ void load(T* stage, int k) const {
    UNROLL
    for (int i = 0; i < kPerThread; ++i) {
      const int chunk = static_cast<int>(threadIdx.x) + i * TileT::kThreads;
      const int line = chunk / kChunksPerLine, column = chunk % kChunksPerLine * kPerChunk;
      if (kChunks % TileT::kThreads != 0 && chunk >= kChunks) break;
      T* to = stage + line * kStride + column;
      const int mn = mn_begin_ + (kMajor ? line : column), kk = k + (kMajor ? column : line);
      if (operand_.vector) {
        copy(to, mn, kk, kMajor ? i : 0);
      } else {
        copy_elements(to, mn, kk);
      }
    }
  }

 private:
  static constexpr int kChunksPerLine = (kMajor ? TileT::kK : kExtent) / kPerChunk;
  static constexpr int kChunks = kChunksPerLine * (kMajor ? kExtent : TileT::kK);
  static constexpr int kPerThread = (kChunks + TileT::kThreads - 1) / TileT::kThreads;
  // Positions along mn that a thread handles: one per chunk, or always the same one.
  static constexpr int kFixed = kMajor ? kPerThread : 1;
  static_assert(kMajor || TileT::kThreads % kChunksPerLine == 0);

  __device__ __forceinline__ int fixed_mn(int i) const {
    const int chunk = static_cast<int>(threadIdx.x) + i * TileT::kThreads;
    return kMajor ? chunk / kChunksPerLine : chunk % kChunksPerLine * kPerChunk;
  }
  __device__ __forceinline__ void copy(T* to, int mn, int k, int fixed) const {
    const T* from = static_cast<const T*>(operand_.data);  // any valid address if nothing is read
    int count = 0;
    if (mn < mn_end_ && k < k_end_) {
      const Position p = operand_.k.at(k);
      const int inner = inner_[fixed] + p.inner;
      count = operand_.limit - inner;
      count = count < 0 ? 0 : count > kPerChunk ? kPerChunk : count;
      const int64_t row = operand_.k.slot_first ? operand_.row_of(p.slot) * operand_.slot_stride : row_[fixed];
      if (count) from = base_ + row + inner;
    }
    dev::cp_async16(to, from, count * static_cast<int>(sizeof(T)));
  }
  __device__ __forceinline__ void copy_elements(T* to, int mn, int k) const {
    for (int j = 0; j < kPerChunk; ++j) {
      const int m = kMajor ? mn : mn + j, kk = kMajor ? k + j : k;
      T value = dev::from_float<T>(0.f);
      if (m < mn_end_ && kk < k_end_) {
        const Position p = operand_.mn.at(m), q = operand_.k.at(kk);
        const int inner = p.inner + q.inner;
        int64_t row = 0;
        if (operand_.mn.slot_first) row = operand_.row_of(p.slot) * operand_.slot_stride;
        if (operand_.k.slot_first) row = operand_.row_of(q.slot) * operand_.slot_stride;
        if (inner < operand_.limit) value = base_[row + inner];
      }
      to[j] = value;
    }
  }

  const Operand& operand_;
  const T* base_;
  int mn_begin_, mn_end_, k_end_;
  int inner_[kFixed];
  int64_t row_[kFixed];
};

// An operand already in shared memory, [mn][k] or [k][mn], padded with zeros as far as the product may read.
template <class T, bool kMajor>
struct Resident {
  static constexpr bool kResident = true;
  static constexpr int kElements = 0;
  const T* data;
  int row_stride;

  __device__ __forceinline__ int stride() const { return row_stride; }
  __device__ __forceinline__ const T* tile(const T* /*stage*/, int k) const {
    return kMajor ? data + k : data + k * row_stride;
  }
  __device__ __forceinline__ void load(T*, int) const {}
};

template <class TileT>
struct Accumulator {
  float v[TileT::kRowTiles][TileT::kColumnTiles][4];

  __device__ __forceinline__ void clear() {
    UNROLL
    for (int i = 0; i < TileT::kRowTiles; ++i) {
      UNROLL
      for (int j = 0; j < TileT::kColumnTiles; ++j) {
        UNROLL
        for (int e = 0; e < 4; ++e) v[i][j][e] = 0.f;
      }
    }
  }
  __device__ __forceinline__ void add(const Accumulator& other) {
    UNROLL
    for (int i = 0; i < TileT::kRowTiles; ++i) {
      UNROLL
      for (int j = 0; j < TileT::kColumnTiles; ++j) {
        UNROLL
        for (int e = 0; e < 4; ++e) v[i][j][e] += other.v[i][j][e];
      }
    }
  }
  __device__ __forceinline__ void multiply(const Accumulator& other) {
    for_each_place([&](int, int, int i, int j, int e) { v[i][j][e] *= other.v[i][j][e]; });
  }
  static constexpr int kLanesPerRow = TileT::kWarpN / 2;
  // Rows are 8 of 32 banks apart: the stores of half a warp, 8 bytes each in four rows, do not conflict.
  static constexpr int kStripStride = TileT::kWarpN + 8;
  static constexpr int kStripFloats = 8 * kStripStride;  // per warp
  static_assert(32 % kLanesPerRow == 0 && kStripStride % 32 == 8);

  // In for_each_row, this thread has the columns own_column() and own_column() + 1.
  static __device__ __forceinline__ int own_column() {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    return warp % TileT::kWarpsN * TileT::kWarpN + lane % kLanesPerRow * 2;
  }
  // Calls f(row, value, value of the next column) so that the lanes with this thread's columns cover every row of their
  // warp's part of the tile. Adjacent lanes have adjacent columns, and the loop is not unrolled: there is one copy of
  // f, whatever it does. strips: kStripFloats per warp in shared memory, which nothing else uses.
  template <class F>
  __device__ __forceinline__ void for_each_row(float* strips, F&& f) const {
    struct alignas(8) Pair {
      float x, y;
    };
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    float* const strip = strips + warp * kStripFloats;
    const int first_row = warp / TileT::kWarpsN * TileT::kWarpM;
    ROLLED
    for (int part = 0; part < 2 * TileT::kRowTiles; ++part) {  // 8 rows each
      UNROLL
      for (int held = 0; held < 2 * TileT::kRowTiles; ++held) {  // registers cannot be indexed at run time
        if (held != part) continue;
        UNROLL
        for (int j = 0; j < TileT::kColumnTiles; ++j) {
          const float(&four)[4] = v[held / 2][j];
          *reinterpret_cast<Pair*>(strip + (lane >> 2) * kStripStride + j * 8 + (lane & 3) * 2) = {
              four[held % 2 * 2], four[held % 2 * 2 + 1]};
        }
      }
      __syncwarp();
      ROLLED
      for (int row = lane / kLanesPerRow; row < 8; row += 32 / kLanesPerRow) {
        const Pair pair = *reinterpret_cast<const Pair*>(strip + row * kStripStride + lane % kLanesPerRow * 2);
        f(first_row + part * 8 + row, pair.x, pair.y);
      }
      __syncwarp();  // the strip is free
    }
  }
  // Calls f(row, column, i, j, e) for every result v[i][j][e] that this thread holds.
  template <class F>
  static __device__ __forceinline__ void for_each_place(F&& f) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int row = warp / TileT::kWarpsN * TileT::kWarpM + (lane >> 2);
    const int column = warp % TileT::kWarpsN * TileT::kWarpN + (lane & 3) * 2;
    UNROLL
    for (int i = 0; i < TileT::kRowTiles; ++i) {
      UNROLL
      for (int j = 0; j < TileT::kColumnTiles; ++j) {
        UNROLL
        for (int e = 0; e < 4; ++e) f(row + i * 16 + e / 2 * 8, column + j * 8 + e % 2, i, j, e);
      }
    }
  }
  // Calls f(row, column, value) for the same.
  template <class F>
  __device__ __forceinline__ void for_each(F&& f) {
    for_each_place([&](int row, int column, int i, int j, int e) { f(row, column, v[i][j][e]); });
  }
  // Calls f(row, column, value, value at column + 1) for every pair of the tile that this thread holds.
  template <class F>
  __device__ __forceinline__ void for_each_pair(F&& f) const {
    for_each_place([&](int row, int column, int i, int j, int e) {
      if (e % 2 == 0) f(row, column, v[i][j][e], v[i][j][e + 1]);
    });
  }
};

// Shared memory that for_each_row needs for a whole block.
template <class TileT>
constexpr std::size_t strip_bytes() {
  return sizeof(float) * Accumulator<TileT>::kStripFloats * (TileT::kThreads / 32);
}

// acc += A B over inner indices [k_begin, k_end). Every thread of the block must call it; rows and columns of the tile
// at or past `rows`, `columns` are not computed (whole warps at a time). `stages` holds kStages tiles of both operands.
// The leading barrier frees `stages` and publishes resident operands.
template <class T, class TileT, bool kMajorA, bool kMajorB, class A, class B>
__device__ __forceinline__ void block_gemm(Accumulator<TileT>& acc, const A& a, const B& b, int k_begin, int k_end,
                                           int rows, int columns, T* stages) {
  using F = Fragments<T>;
  constexpr int kStage = A::kElements + B::kElements;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int row = warp / TileT::kWarpsN * TileT::kWarpM, column = warp % TileT::kWarpsN * TileT::kWarpN;
  const int steps = (k_end - k_begin + TileT::kK - 1) / TileT::kK;
  const auto load = [&](int step) {
    T* stage = stages + step % kStages * kStage;
    a.load(stage, k_begin + step * TileT::kK);
    b.load(stage + A::kElements, k_begin + step * TileT::kK);
  };
  __syncthreads();  // stages free, resident operands written
  UNROLL
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < steps) load(step);
    dev::cp_async_commit();
  }
  for (int step = 0; step < steps; ++step) {
    dev::cp_async_wait<kStages - 2>();
    __syncthreads();  // this step's tiles have arrived, and nobody reads the stage that is loaded next
    if (step + kStages - 1 < steps) load(step + kStages - 1);
    dev::cp_async_commit();
    if (row >= rows || column >= columns) continue;
    const T* stage = stages + step % kStages * kStage;
    const T* tile_a = a.tile(stage, step * TileT::kK);
    const T* tile_b = b.tile(stage + A::kElements, step * TileT::kK);
    Accumulator<TileT> part;  // of one step, if long sums would lose accuracy
    if constexpr (F::kPartialSums) part.clear();
    Accumulator<TileT>& sums = F::kPartialSums ? part : acc;
    UNROLL
    for (int k = 0; k < TileT::kK; k += F::kStep) {
      typename F::A fa[TileT::kRowTiles];
      typename F::B fb[TileT::kColumnTiles];
      UNROLL
      for (int i = 0; i < TileT::kRowTiles; ++i) {
        F::template load_a<kMajorA>(fa[i], tile_a, a.stride(), row + i * 16, k, lane);
      }
      UNROLL
      for (int j = 0; j < TileT::kColumnTiles; j += 2) {
        if (B::kResident && column + j * 8 >= columns) continue;  // not allocated
        F::template load_b<kMajorB>(fb[j], fb[j + 1], tile_b, b.stride(), column + j * 8, k, lane);
      }
      UNROLL
      for (int i = 0; i < TileT::kRowTiles; ++i) {
        UNROLL
        for (int j = 0; j < TileT::kColumnTiles; ++j) {
          if (B::kResident && column + j / 2 * 16 >= columns) continue;
          F::multiply(sums.v[i][j], fa[i], fb[j]);
        }
      }
    }
    if constexpr (F::kPartialSums) acc.add(part);
  }
}

}  // namespace mpoe::cuda
