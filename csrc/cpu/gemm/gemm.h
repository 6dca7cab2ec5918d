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

constexpr std::int64_t kPanel = 32;    // columns of a packed panel
constexpr std::int64_t kGranule = 8;   // columns that stay together when columns are permuted
constexpr std::int64_t kMaxRows = 32;  // maximum rows of a tile

enum class Activation : int { kNone = 0, kRelu = 1, kGelu = 2, kGeluTanh = 3, kSilu = 4 };

// Where the four granules of a panel are: column offset of each in elements, and how many of its
// columns exist.
struct ColumnMap {
  std::int64_t offset[kPanel / kGranule];
  std::int32_t valid[kPanel / kGranule];
};

// Output of a linear layer's last product: activation(tile + bias), and the pre-activation if
// requested.
struct Finish {
  const float* bias = nullptr;  // [32], in the order of the tile's columns
  Activation activation = Activation::kNone;
  void* saved = nullptr;  // laid out like the output
  // [rows]: row r adds bias + bias_offset[r]; null: the same for all
  const std::int64_t* bias_offset = nullptr;
};

struct GemmKernels {
  std::int64_t unit;         // elements of k in a unit: 1 or 2
  std::int64_t best_rows;    // rows of a tile that make best use of the registers, <= kMaxRows
  std::int64_t longest_sum;  // units to sum in one pass (multiply.h)

  // tile[r][c] = (accumulate: +) sum_u A(r, u) B(u, c), r < rows, c < 32. a_stride is in units,
  // tile_stride in floats. Row r of A starts at a + r * a_stride. Split into tiles of at most
  // best_rows.
  void (*multiply_rows)(std::int64_t rows,
                        std::int64_t units,
                        const void* a,
                        std::int64_t a_stride,
                        const void* panel,
                        float* tile,
                        std::int64_t tile_stride,
                        bool accumulate);
  // The same for the first 16 columns of the panel only.
  void (*multiply_half_panel)(std::int64_t rows,
                              std::int64_t units,
                              const void* a,
                              std::int64_t a_stride,
                              const void* panel,
                              float* tile,
                              std::int64_t tile_stride,
                              bool accumulate);
  // multiply_rows with A(r, u) at a[u * 32 + r] and at most best_rows rows, which are columns of a
  // packed panel.
  void (*multiply_columns)(std::int64_t rows,
                           std::int64_t units,
                           const void* a,
                           const void* panel,
                           float* tile,
                           std::int64_t tile_stride,
                           bool accumulate);
  // out[r * out_stride + c] = sum_k A(r, k) B(c, k): the rows of both are read in place. A few rows
  // of A do not repay packing B. Strides in elements; each sum is the same whatever else is
  // computed.
  void (*multiply_dots)(std::int64_t rows,
                        std::int64_t columns,
                        std::int64_t k,
                        const void* a,
                        std::int64_t a_stride,
                        const void* b,
                        std::int64_t b_stride,
                        float* out,
                        std::int64_t out_stride);

  // out[r * stride + c] = tile[r * 32 + c] for c < columns, rounded.
  void (*store)(
      const float* tile, std::int64_t rows, std::int64_t columns, void* out, std::int64_t stride);
  // The same with permuted columns, bias and activation. Row r goes to out + row_offset[r], or r *
  // stride if null.
  void (*finish)(const float* tile,
                 std::int64_t rows,
                 void* out,
                 const std::int64_t* row_offset,
                 std::int64_t stride,
                 const ColumnMap& columns,
                 const Finish& finish);
  // Stores into a packed operand. The tile's columns 0..15 and 16..31 hold the two elements of 16
  // units (bfloat16), or its columns are 32 units (float). Granule g of row r goes to unit
  // row_unit[r * row_stride + which[g]] + unit_offset[g]; there are 32 / (8 * unit) granules of 8
  // units.
  void (*store_units)(const float* tile,
                      std::int64_t rows,
                      void* out,
                      const std::int32_t* row_unit,
                      std::int64_t row_stride,
                      const std::int32_t* which,
                      const std::int32_t* unit_offset);

  // Panels of B from row-major B [k, columns] (rows `stride` apart), or from its transpose
  // [columns, k]. Panels start `panel_units` units apart (>= those of k: they may be parts of
  // longer ones).
  void (*pack)(void* panels,
               std::int64_t panel_units,
               const void* b,
               std::int64_t stride,
               std::int64_t k,
               std::int64_t columns);
  void (*pack_transposed)(void* panels,
                          std::int64_t panel_units,
                          const void* b,
                          std::int64_t stride,
                          std::int64_t k,
                          std::int64_t columns);
  // One panel of B [k, .] whose granules are placed by `columns`; missing columns are zero.
  void (*pack_granules)(
      void* panel, const void* b, std::int64_t stride, std::int64_t k, const ColumnMap& columns);

  // out[c * out_stride + r] = in[r * in_stride + c]
  void (*transpose)(const void* in,
                    std::int64_t in_stride,
                    std::int64_t rows,
                    std::int64_t columns,
                    void* out,
                    std::int64_t out_stride);
  // dz = grad * activation'(saved); `saved` is the output for relu and the pre-activation for the
  // rest.
  void (*activation_backward)(
      Activation activation, const void* grad, const void* saved, void* dz, std::int64_t count);
  // sum[c] += row[c]
  void (*add_row)(const void* row, float* sum, std::int64_t count);
  // out[c] = in[c], rounded
  void (*round_row)(const float* in, void* out, std::int64_t count);
};

// Indexed by is_bfloat16.
extern const GemmKernels kGemmGeneric[2];
extern const GemmKernels kGemmAvx2[2];
extern const GemmKernels kGemmAvx512[2];
extern const GemmKernels kGemmAvx512Bf16[2];
// For bfloat16, up to 32 rows, and only if active_isa() is kAmx.
void amx_multiply_rows(std::int64_t rows,
                       std::int64_t units,
                       const void* a,
                       std::int64_t a_stride,
                       const void* panel,
                       float* tile,
                       std::int64_t tile_stride,
                       bool accumulate);
void amx_multiply_columns(std::int64_t rows,
                          std::int64_t units,
                          const void* a,
                          const void* panel,
                          float* tile,
                          std::int64_t tile_stride,
                          bool accumulate);

// The kernels of the instruction set in use; kFloat32 or kBFloat16.
const GemmKernels& gemm_kernels(Dtype dtype);

inline std::int64_t ceil_divide(std::int64_t a, std::int64_t b) {
  return (a + b - 1) / b;
}
inline std::int64_t round_up(std::int64_t a, std::int64_t b) {
  return ceil_divide(a, b) * b;
}

// A run of items [first, last).
struct Span {
  std::int64_t first, last;
};

// Splits `count` rows into equal tiles of at most `most`.
template <class F>
inline void for_each_tile(std::int64_t count, std::int64_t most, const F& f) {
  const std::int64_t parts = ceil_divide(count, most);
  for (std::int64_t p = 0; p < parts; ++p) {
    const std::int64_t first = count * p / parts;
    f(first, count * (p + 1) / parts - first);
  }
}

// Row stride, in elements, of a left operand with `k` elements per row, for scratch memory that
// multiply_rows reads: an odd number of cache lines. Rows a multiple of 4 KiB apart share one set
// of the L1 cache, and a tile's 14 rows do not fit its 8 ways: float32 with k = 3072 ran at 72
// instead of 100 GFLOP/s.
inline std::int64_t row_stride(const GemmKernels& gemm, std::int64_t k) {
  const std::int64_t line = 16 * gemm.unit;
  return (ceil_divide(k, line) | 1) * line;
}

}  // namespace mpoe
