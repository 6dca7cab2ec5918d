// The GEMM core: tiles of packed operands, and the copies that pack them. One table per instruction
// set and dtype.
//
// Everything is counted in 32-bit *units* along the inner axis k: one float, or two consecutive
// bfloat16 (what VDPBF16PS multiplies). An odd k of bfloat16 is padded with zero. A packed panel
// holds 32 columns, unit by unit:
//   panel[u][c] = B(k of unit u, column c), zero where k or c is past the end;
//   panels are contiguous.
// The left operand needs no packing: rows are read in place (`multiply_rows`), or, if its transpose
// is in memory, from a packed panel of it (`multiply_columns`: 32 rows of A are the panel's
// columns). Products and sums are float32, summed in the order of k, whatever the number of rows or
// threads.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace mpoe {

constexpr int64_t kUnitBytes = 4;
constexpr int64_t kPanel = 32;   // columns of a packed panel
constexpr int64_t kGranule = 8;  // columns that stay together when columns are permuted
constexpr int64_t kGranules = kPanel / kGranule;  // of a panel
constexpr int64_t kMaxRows = 32;                  // maximum rows of a tile

enum class Activation : int { kNone = 0, kRelu = 1, kGelu = 2, kGeluTanh = 3, kSilu = 4 };

// Where the four granules of a panel are: column offset of each in elements, and how many of its
// columns exist.
struct ColumnMap {
  int64_t offset[kGranules];
  int32_t valid[kGranules];
};

// Output of a linear layer's last product: activation(tile + bias), and the pre-activation if
// requested.
struct Finish {
  const float* bias = nullptr;  // [32], in the order of the tile's columns
  Activation activation = Activation::kNone;
  void* saved = nullptr;  // laid out like the output
  // [rows]: row r adds bias + bias_offset[r]; null: the same for all
  const int64_t* bias_offset = nullptr;
};

using MultiplyRows = void(int64_t rows,
                          int64_t units,
                          const void* a,
                          int64_t a_stride,
                          const void* panel,
                          float* tile,
                          int64_t tile_stride,
                          bool accumulate);
using MultiplyColumns = void(int64_t rows,
                             int64_t units,
                             const void* a,
                             const void* panel,
                             float* tile,
                             int64_t tile_stride,
                             bool accumulate);
using Pack = void(
    void* panels, int64_t panel_units, const void* b, int64_t stride, int64_t k, int64_t columns);

struct GemmKernels {
  int64_t unit;         // elements of k in a unit: 1 or 2
  int64_t best_rows;    // rows of a tile that make best use of the registers, <= kMaxRows
  int64_t longest_sum;  // units to sum in one pass (multiply.h)

  // tile[r][c] = (accumulate: +) sum_u A(r, u) B(u, c), r < rows, c < 32. a_stride is in units,
  // tile_stride in floats. Row r of A starts at a + r * a_stride. Split into tiles of at most
  // best_rows.
  MultiplyRows* multiply_rows;
  // The same for the first 16 columns of the panel only.
  MultiplyRows* multiply_half_panel;
  // multiply_rows with A(r, u) at a[u * 32 + r] and at most best_rows rows, which are columns of a
  // packed panel.
  MultiplyColumns* multiply_columns;
  // out[r * out_stride + c] = sum_k A(r, k) B(c, k): the rows of both are read in place. A few rows
  // of A do not repay packing B. Strides in elements; each sum is the same whatever else is
  // computed.
  void (*multiply_dots)(int64_t rows,
                        int64_t columns,
                        int64_t k,
                        const void* a,
                        int64_t a_stride,
                        const void* b,
                        int64_t b_stride,
                        float* out,
                        int64_t out_stride);

  // out[r * stride + c] = tile[r * 32 + c] for c < columns, rounded.
  void (*store)(const float* tile, int64_t rows, int64_t columns, void* out, int64_t stride);
  // The same with permuted columns, bias and activation. Row r goes to out + row_offset[r], or r *
  // stride if null.
  void (*finish)(const float* tile,
                 int64_t rows,
                 void* out,
                 const int64_t* row_offset,
                 int64_t stride,
                 const ColumnMap& columns,
                 const Finish& finish);
  // Stores into a packed operand. The tile's columns 0..15 and 16..31 hold the two elements of 16
  // units (bfloat16), or its columns are 32 units (float). Granule g of row r goes to unit
  // row_unit[r * row_stride + which[g]] + unit_offset[g]; there are 32 / (8 * unit) granules of 8
  // units.
  void (*store_units)(const float* tile,
                      int64_t rows,
                      void* out,
                      const int32_t* row_unit,
                      int64_t row_stride,
                      const int32_t* which,
                      const int32_t* unit_offset);

  // Panels of B from row-major B [k, columns] (rows `stride` apart), or from its transpose
  // [columns, k]. Panels start `panel_units` units apart (>= those of k: they may be parts of
  // longer ones).
  Pack* pack;
  Pack* pack_transposed;
  // One panel of B [k, .] whose granules are placed by `columns`; missing columns are zero.
  void (*pack_granules)(
      void* panel, const void* b, int64_t stride, int64_t k, const ColumnMap& columns);

  // out[c * out_stride + r] = in[r * in_stride + c]
  void (*transpose)(const void* in,
                    int64_t in_stride,
                    int64_t rows,
                    int64_t columns,
                    void* out,
                    int64_t out_stride);
  // dz = grad * activation'(saved); `saved` is the output for relu and the pre-activation for the
  // rest.
  void (*activation_backward)(
      Activation activation, const void* grad, const void* saved, void* dz, int64_t count);
  // sum[c] += row[c]
  void (*add_row)(const void* row, float* sum, int64_t count);
  // out[c] = in[c], rounded. `out` may be `in` itself: elements are read in order and before they
  // are written, and none of `out` is larger than one of `in`.
  void (*round_row)(const float* in, void* out, int64_t count);
};

// Indexed by is_bfloat16.
extern const GemmKernels kGemmGeneric[2];
extern const GemmKernels kGemmAvx2[2];
extern const GemmKernels kGemmAvx512[2];
extern const GemmKernels kGemmAvx512Bf16[2];
// For bfloat16, up to 32 rows, and only if active_isa() is kAmx.
MultiplyRows amx_multiply_rows;
MultiplyColumns amx_multiply_columns;

// The kernels of the instruction set in use; kFloat32 or kBFloat16.
const GemmKernels& gemm_kernels(Dtype dtype);

// Calls f(kernels, element) with those of `dtype` and a value of its element type.
template <class F>
void with_element_type(Dtype dtype, const F& f) {
  if (dtype == Dtype::kBFloat16)
    f(gemm_kernels(dtype), BFloat16{});
  else
    f(gemm_kernels(dtype), float{});
}

inline int64_t ceil_divide(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}
inline int64_t round_up(int64_t a, int64_t b) {
  return ceil_divide(a, b) * b;
}

// A run of items [first, last).
struct Span {
  int64_t first, last;

  int64_t size() const { return last - first; }
};

// Splits `count` rows into equal tiles of at most `most`.
template <class F>
inline void for_each_tile(int64_t count, int64_t most, const F& f) {
  const int64_t parts = ceil_divide(count, most);
  for (int64_t p = 0; p < parts; ++p) {
    const int64_t first = count * p / parts;
    f(first, count * (p + 1) / parts - first);
  }
}

// Row stride, in elements, of a left operand with `k` elements per row, for scratch memory that
// multiply_rows reads: an odd number of cache lines. Rows a multiple of 4 KiB apart share one set
// of the L1 cache, and a tile's 14 rows do not fit its 8 ways: float32 with k = 3072 ran at 72
// instead of 100 GFLOP/s.
inline int64_t row_stride(const GemmKernels& gemm, int64_t k) {
  const int64_t line = 16 * gemm.unit;
  return (ceil_divide(k, line) | 1) * line;
}

}  // namespace mpoe
