// Products that every expert has for itself. A slot's row is a matrix [P, K], of which the elements of K are adjacent,
// or a turned one [K, P], of which those of P are; results are dense and lie as what they are made of.
#pragma once
#include "cuda/experts/slots.cuh"
#include "cuda/linear/tiles.cuh"

namespace mpoe::cuda {

// Rows of all slots: [.., P, columns], turned [.., columns, P].
struct SlotRows {
  const void* data = nullptr;
  int columns = 1, step = 0;  // step: elements from one p, turned from one column, to the next
  int64_t stride = 0;         // from one row to the next
  bool vector = false;        // runs of 16 bytes are whole and aligned
};
struct Grouped : Slots {
  bool turned = false;
  int of_slot = 1;  // P
  SlotRows rows;
  const void* blocks = nullptr;  // [E, K, N]
};
// out[s] = activation(rows[row_index[s]] blocks[e] + bias), see Epilogue; its rows, and the bias, are [P, N].
struct GroupedRows : Grouped {
  bool vector_blocks = false, vector_out = false;
  int columns = 1;  // N
  void* out = nullptr;
  Epilogue epilogue;
};
// out[e] = sum of rows[row_index[s]]^T g over its slots, where g are the gradients `grads`. With `blocks`, from the
// same reading: again = rows[row_index[s]] blocks[e], through whose activation g went, and drows[s] = g blocks[e]^T.
struct GroupedBlocks : Grouped {
  int activation = 0, tiles = 1, parts = 1;  // tiles of a block, parts of an expert's rows
  SlotRows grads;                            // [P, N]
  void *drows = nullptr, *again = nullptr;   // with `blocks`, of one tile; null: not needed
  float* out = nullptr;                      // [parts, E, K, N]
};

// What is known in shared memory of a tile's rows: the slot, p, and elements before them in two arrays.
struct RowsInShared {
  int slot[kExpertsRows], part[kExpertsRows];
  int64_t from[2][kExpertsRows];

  // Looks up the rows from `begin` on; what uses them must begin with a barrier.
  template <bool kTurned>
  __device__ __forceinline__ void look_up(const Grouped& of, const SlotRows& grads, int begin, int rows) {
    const int row = threadIdx.x;
    if (row >= kExpertsRows) return;
    const int own = (begin + row) / of.of_slot, p = begin + row - own * of.of_slot;
    const int64_t source = row < rows && of.row_index ? of.row_index[own] : own;
    slot[row] = row < rows ? own : 0;
    part[row] = row < rows ? p : 0;
    const auto place = [&](int64_t line, const SlotRows& in) {
      if (row >= rows) return kTurned ? int64_t(0) : int64_t(-1);
      return line * in.stride + p * (kTurned ? 1 : in.step);
    };
    from[0][row] = place(source, of.rows);
    from[1][row] = place(own, grads);
  }
  // The operand of the rows' columns from `first` on: 64 lines of columns, turned as many lines of 64 rows.
  template <class T, class TileT, bool kMajor, bool kTurned>
  __device__ __forceinline__ auto lines(int which, const SlotRows& in, int first, int rows) const {
    const int left = in.columns - first;
    if constexpr (kTurned) {
      const auto line = [left, step = in.step](int k) { return k < left ? int64_t(k) * step : -1; };
      struct FarRun { int64_t offset; int count; };
      const auto run = [own = from[which], rows](int row) { return FarRun{own[row], rows - row}; };
      return lines_at<T, TileT, kExpertsRows, kMajor>(in.data, int64_t(first) * in.step, line, run, in.vector);
    } else {
      return lines_at<T, TileT, kExpertsRows, kMajor>(
          in.data, first, [own = from[which]](int row) { return own[row]; }, Adjacent{left}, in.vector);
    }
  }
  // Stores the columns from `first` on, of N, of `rows` rows.
  template <bool kTurned, class T, class TileT>
  __device__ __forceinline__ void store(Accumulator<TileT>& sum, T* stages, int rows, int of_slot, int n, int first,
                                        bool owned, bool vector, void* out, const Epilogue& last) const {
    const int left = n - first, columns = left < kExpertsRows ? left : kExpertsRows;
    finish(sum, stages, kTurned ? columns : rows, kTurned ? rows : columns, owned, vector, out, of_slot * n, last,
           [&](int i, int j) {
             const int row = kTurned ? j : i, column = kTurned ? i : j;
             const int at = kTurned ? (first + column) * of_slot + part[row] : part[row] * n + first + column;
             const int count = kTurned ? rows - row : columns - column;
             return Place{slot[row], at, row < rows && column < columns ? count : 0};
           });
  }
};

// sum += rows times block; turned: block times rows, so that what is adjacent in the result are rows. kMajor: of both.
template <bool kTurned, class T, class TileT, bool kMajorRows, bool kMajorBlock, class Rows, class Block>
__device__ __forceinline__ void product(Accumulator<TileT>& sum, const Rows& rows, const Block& block, int size,
                                        int row_count, int columns, T* stages) {
  if constexpr (kTurned) {
    block_gemm<T, TileT, kMajorBlock, kMajorRows>(sum, block, rows, size, columns, row_count, stages);
  } else {
    block_gemm<T, TileT, kMajorRows, kMajorBlock>(sum, rows, block, size, row_count, columns, stages);
  }
}

// Grid: tiles of rows, see RowTile, times tiles of columns. Shared: stages.
template <class T, bool kTurned>
__global__ void __launch_bounds__(kExpertsThreads) grouped_rows_kernel(const __grid_constant__ GroupedRows p) {
  using TileT = ExpertsTile<T>;
  DYN_SHARED(T, stages);
  SHARED_ARRAY(RowsInShared, known, 1);
  const int across = (p.columns + TileT::kN - 1) / TileT::kN, tile = blockIdx.x / across;
  const int first = (blockIdx.x - tile * across) * TileT::kN, columns = p.columns - first, k = p.rows.columns;
  const RowTile t(p, p.of_slot, tile, kExpertsRows);
  if (t.rows <= 0) return;
  known->look_up<kTurned>(p, p.rows, t.begin, t.rows);
  __syncthreads();  // rows are known
  Accumulator<TileT> sum;
  sum.clear();
  if (t.owned) {
    const auto rows = known->lines<T, TileT, !kTurned, kTurned>(0, p.rows, 0, t.rows);
    const auto block = expert_lines<T, false>(p.blocks, int64_t(t.expert) * k * p.columns + first, p.columns, k,
                                              columns, p.vector_blocks);
    product<kTurned, T, TileT, !kTurned, false>(sum, rows, block, k, t.rows, columns, stages);
  }
  known->store<kTurned>(sum, stages, t.rows, p.of_slot, p.columns, first, t.owned, p.vector_out, p.out, p.epilogue);
}

// A tile of rows, all 64 columns at once.
template <class T>
struct WholeTile : ExpertsTile<T> {
  static constexpr int kK = kExpertsRows, kStride = padded_stride<T>(kExpertsRows);
  static constexpr int kElements = kExpertsRows * kStride;
};

// Grid: tiles of a block times parts of an expert's rows; experts, and with `blocks` what none owns. Shared: tiles of
// rows, gradients and the block, and runs of a result.
template <class T, bool kTurned>
__global__ void __launch_bounds__(kExpertsThreads, sizeof(T) == 2 ? 3 : 2)
    grouped_blocks_kernel(const __grid_constant__ GroupedBlocks p) {
  using TileT = ExpertsTile<T>;
  using Whole = WholeTile<T>;
  DYN_SHARED(T, a);
  SHARED_ARRAY(RowsInShared, known, 1);
  T *const g = a + Whole::kElements, *const b = g + Whole::kElements, *const runs = b + Whole::kElements;
  const int expert = blockIdx.y, across = (p.grads.columns + TileT::kN - 1) / TileT::kN;
  const int part = blockIdx.x / p.tiles, tile = blockIdx.x - part * p.tiles;
  const int first_m = tile / across * TileT::kM, first_n = tile % across * TileT::kN;
  const int m = p.rows.columns - first_m, n = p.grads.columns - first_n;
  const bool owned = expert < p.experts;
  const int from = p.of_slot * p.offsets[expert], to = p.of_slot * (owned ? p.offsets[expert + 1] : p.slots);
  const int steps = (to - from + kExpertsRows - 1) / kExpertsRows;
  const int size = (steps + p.parts - 1) / p.parts * kExpertsRows, at = from + size * part;
  for (int i = threadIdx.x; p.blocks && owned && i < kExpertsRows * kExpertsRows; i += kExpertsThreads) {
    const int row = i / kExpertsRows, column = i % kExpertsRows;
    const T* const block = static_cast<const T*>(p.blocks) + int64_t(expert) * m * n;
    b[row * Whole::kStride + column] = row < m && column < n ? block[row * n + column] : dev::from_float<T>(0.f);
  }
  const Resident<T, false> block(b, Whole::kStride);
  Accumulator<TileT> sum, found;
  sum.clear();
  ROLLED
  for (int begin = at; begin < to && begin < at + size; begin += kExpertsRows) {
    const int rows = to - begin < kExpertsRows ? to - begin : kExpertsRows;
    __syncthreads();  // nobody reads the rows before
    known->look_up<kTurned>(p, p.grads, begin, rows);
    __syncthreads();  // rows are known
    if (owned) {  // a product waits for these copies with those of its first step
      known->lines<T, Whole, true, kTurned>(0, p.rows, first_m, rows).load(InShared<T>(a), 0);
      known->lines<T, Whole, true, kTurned>(1, p.grads, first_n, rows).load(InShared<T>(g), 0);
    }
    found.clear();
    if (owned && (p.again || p.activation != kNone)) {
      const Resident<T, !kTurned> own(a, Whole::kStride);
      product<kTurned, T, TileT, !kTurned, false>(found, own, block, m, rows, n, runs);
    }
    if (p.again) known->store<kTurned>(found, runs, rows, p.of_slot, n, 0, owned, p.grads.vector, p.again, {});
    if (owned && p.activation != kNone) {
      with_activation(p.activation, [&](auto activation) {
        found.for_each([&](int row, int column, float& value) {
          T& own = g[row * Whole::kStride + column];
          own = dev::from_float<T>(dev::to_float(own) * activation_slope(activation.value, value));
        });
      });
    }
    if (p.drows) {
      const Resident<T, true> back(b, Whole::kStride);
      const Resident<T, !kTurned> own(g, Whole::kStride);
      found.clear();
      if (owned) product<kTurned, T, TileT, !kTurned, true>(found, own, back, n, rows, m, runs);
      known->store<kTurned>(found, runs, rows, p.of_slot, m, 0, owned, p.rows.vector, p.drows, {});
    }
    if (!owned) continue;
    block_gemm<T, TileT, kTurned, kTurned>(sum, Resident<T, kTurned>(a, Whole::kStride),
                                           Resident<T, kTurned>(g, Whole::kStride), rows, m, n, runs);
  }
  if (!owned) return;
  const int64_t line = (int64_t(part) * p.experts + expert) * p.rows.columns + first_m;
  sum.for_each([&](int row, int column, float& value) {
    if (row < m && column < n) p.out[(line + row) * p.grads.columns + first_n + column] = value;
  });
}

// Compiled in a file per type.
template <class T>
void launch(const GroupedRows& p, cudaStream_t stream);
template <class T>
void launch(const GroupedBlocks& p, cudaStream_t stream);

}  // namespace mpoe::cuda
