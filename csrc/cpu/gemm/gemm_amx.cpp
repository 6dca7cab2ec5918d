// bfloat16 products with AMX: tiles of 16 rows of 64 bytes, C [16, 16] += A [16, 16 units] B [16
// units, 16]. Sixteen units of a packed panel already are two such B, and rows read in place are A.
// Two by two of them make 32 x 32. AVX512-BF16 does short sums and the remainders of others:
// starting tiles takes as long as 300 of its instructions. The choice depends only on units, since
// the number of rows at a time may depend on the number of threads.

#include <immintrin.h>

#include <algorithm>

#include "cpu/gemm/gemm.h"
#include "cpu/gemm/pack.h"

namespace mpoe {
namespace {

constexpr int64_t kSide = 16;       // rows of a tile, and units or columns of its rows
constexpr int64_t kTileBytes = 64;  // of a tile's row
constexpr int64_t kPanelRow = kPanel * 4;
constexpr int64_t kShortSum = 2 * kSide;  // fewer units than this do not justify tiles

const GemmKernels& vectors = kGemmAvx512Bf16[1];

// Units that AMX tiles multiply.
int64_t tile_units(int64_t units) {
  return units < kShortSum ? 0 : units / kSide * kSide;
}

// The tile intrinsics do not tell the compiler what memory they read: all pending writes must come
// before them.
inline void finish_writes(const void* memory) {
  asm volatile("" : : "r"(memory) : "memory");
}

// What LDTILECFG reads (Intel's Architecture Instruction Set Extensions, chapter 3).
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0..3: C, two by two; 4 and 5: A; 6 and 7: B.
void shape_tiles(int64_t rows) {
  TileShapes shapes;
  const auto set = [&](int tile, int64_t tile_rows, int64_t bytes) {
    shapes.rows[tile] = static_cast<uint8_t>(tile_rows);
    shapes.row_bytes[tile] = static_cast<uint16_t>(bytes);
  };
  // A tile must have at least one row, even if it is not used.
  const int64_t upper = std::min(rows, kSide), lower = std::max<int64_t>(rows - kSide, 1);
  for (int v = 0; v < 2; ++v) {
    set(v, upper, kTileBytes);
    set(2 + v, lower, kTileBytes);
    set(6 + v, kSide, kTileBytes);
  }
  set(4, upper, kTileBytes);
  set(5, lower, kTileBytes);
  finish_writes(&shapes);
  _tile_loadconfig(&shapes);
}

// C (accumulate: +)= `steps` steps of 16 units. both: more than 16 rows.
template <bool both>
void multiply_tiles(int64_t steps,
                    const char* a,
                    int64_t a_row,
                    const char* panel,
                    float* tile,
                    int64_t tile_stride,
                    bool accumulate) {
  const int64_t bytes = tile_stride * 4;
  float* const below = tile + kSide * tile_stride;
  if (accumulate) {
    _tile_loadd(0, tile, bytes);
    _tile_loadd(1, tile + kSide, bytes);
    if (both) {
      _tile_loadd(2, below, bytes);
      _tile_loadd(3, below + kSide, bytes);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    if (both) {
      _tile_zero(2);
      _tile_zero(3);
    }
  }
  const char* a_below = a + kSide * a_row;
  for (; steps > 0; --steps) {
    _tile_loadd(4, a, a_row);
    _tile_loadd(6, panel, kPanelRow);
    _tile_loadd(7, panel + kTileBytes, kPanelRow);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (both) {
      _tile_loadd(5, a_below, a_row);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    a += kTileBytes;
    a_below += kTileBytes;
    panel += kSide * kPanelRow;
  }
  _tile_stored(0, tile, bytes);
  _tile_stored(1, tile + kSide, bytes);
  if (both) {
    _tile_stored(2, below, bytes);
    _tile_stored(3, below + kSide, bytes);
  }
}

void multiply_shaped(int64_t rows,
                     int64_t steps,
                     const char* a,
                     int64_t a_row,
                     const char* panel,
                     float* tile,
                     int64_t tile_stride,
                     bool accumulate) {
  finish_writes(a);
  (rows > kSide ? multiply_tiles<true>
                : multiply_tiles<false>)(steps, a, a_row, panel, tile, tile_stride, accumulate);
}

}  // namespace

void amx_multiply_rows(int64_t rows,
                       int64_t units,
                       const void* a,
                       int64_t a_stride,
                       const void* panel,
                       float* tile,
                       int64_t tile_stride,
                       bool accumulate) {
  const char* const left = static_cast<const char*>(a);
  const char* const right = static_cast<const char*>(panel);
  const int64_t whole = tile_units(units);
  if (whole > 0) {
    // Whole tiles first rather than equal ones: changing the shape takes as long as a tile's sum.
    for (int64_t first = 0; first < rows; first += kMaxRows) {
      const int64_t count = std::min(kMaxRows, rows - first);
      if (first == 0 || count < kMaxRows)
        shape_tiles(count);
      multiply_shaped(count,
                      whole / kSide,
                      left + first * a_stride * 4,
                      a_stride * 4,
                      right,
                      tile + first * tile_stride,
                      tile_stride,
                      accumulate);
    }
    _tile_release();
  }
  if (whole == units)
    return;
  vectors.multiply_rows(rows,
                        units - whole,
                        left + whole * 4,
                        a_stride,
                        right + whole * kPanelRow,
                        tile,
                        tile_stride,
                        accumulate || whole > 0);
}

void amx_multiply_columns(int64_t rows,
                          int64_t units,
                          const void* a,
                          const void* panel,
                          float* tile,
                          int64_t tile_stride,
                          bool accumulate) {
  // Units of a row are apart in a panel of A but adjacent in a tile: transposed piece by piece,
  // into rows of an odd number of cache lines.
  constexpr int64_t kPiece = 128, kRow = (kPiece + kSide) * 4;
  alignas(64) char turned[kPanel * kRow];
  const char* const left = static_cast<const char*>(a);
  const char* const right = static_cast<const char*>(panel);
  const int64_t whole = tile_units(units);
  for (int64_t first = 0; first < whole; first += kPiece) {
    const int64_t count = std::min(kPiece, whole - first);
    for (int64_t r = 0; r < rows; r += kSide)
      for (int64_t u = 0; u < count; u += kSide)
        transpose_units(
            left + (first + u) * kPanelRow + r * 4, kPanelRow, turned + r * kRow + u * 4, kRow);
    if (first == 0)
      shape_tiles(rows);
    multiply_shaped(rows,
                    count / kSide,
                    turned,
                    kRow,
                    right + first * kPanelRow,
                    tile,
                    tile_stride,
                    accumulate || first > 0);
  }
  if (whole > 0)
    _tile_release();
  if (whole == units)
    return;
  for (int64_t r = 0; r < rows; r += vectors.best_rows)
    vectors.multiply_columns(std::min(vectors.best_rows, rows - r),
                             units - whole,
                             left + whole * kPanelRow + r * 4,
                             right + whole * kPanelRow,
                             tile + r * tile_stride,
                             tile_stride,
                             accumulate || whole > 0);
}

}  // namespace mpoe
