// Copies that pack operands into panels, and transpositions. A panel (gemm.h) holds 32 columns of B
// unit by unit, a unit in one word of 32 bits: one float, or two bfloat16 of the same column, of
// which the first is in the low half. Words of a panel, in memory order:
//
//   bfloat16   unit 0   B(0,0) B(1,0)   B(0,1) B(1,1)   ..   B(0,31) B(1,31)
//              unit 1   B(2,0) B(3,0)   B(2,1) B(3,1)   ..
//   float      unit 0   B(0,0)          B(0,1)          ..   B(0,31)
//              unit 1   B(1,0)          B(1,1)          ..
//
// B is read as it is in memory (`pack`), with its granules elsewhere (`pack_granules`), or from its
// transpose (`pack_transposed`).
#pragma once

#include "cpu/gemm/gemm.h"
#include "cpu/gemm/vector.h"

namespace mpoe {
namespace {

// Columns that are packed together from B's transpose, in blocks of as many units.
constexpr int64_t kHalfPanel = kPanel / 2;

// 32 units of one panel row from one row (float) or two rows (bfloat16; `next` null: zeros) of B.
inline void interleave(const float* row, const float*, float* units) {
  std::memcpy(units, row, kPanel * 4);
}
inline void interleave(const BFloat16* row, const BFloat16* next, float* units) {
#if defined(__AVX512BW__)
  // Half 2c of the result is row[c], half 2c + 1 is next[c], which counts from 32 on.
  alignas(64) static constexpr uint16_t kOrder[64] = {
      0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
      11, 43, 12, 44, 13, 45, 14, 46, 15, 47, 16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53,
      22, 54, 23, 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63};
  const __m512i low = _mm512_loadu_si512(row);
  const __m512i high = next == nullptr ? _mm512_setzero_si512() : _mm512_loadu_si512(next);
  _mm512_storeu_si512(units, _mm512_permutex2var_epi16(low, _mm512_load_si512(kOrder), high));
  _mm512_storeu_si512(units + 16,
                      _mm512_permutex2var_epi16(low, _mm512_load_si512(kOrder + 32), high));
#else
  for (int64_t c = 0; c < kPanel; c += kWidth) {
    Words value = widen(load_vector<Halves>(row + c));
    if (next != nullptr)
      value |= widen(load_vector<Halves>(next + c)) << 16;
    store_vector(units + c, value);
  }
#endif
}

// The same for the first `columns` < 32 columns.
template <class T>
inline void interleave_part(const T* row, const T* next, int64_t columns, float* units) {
  T padded[2][kPanel] = {};
  std::memcpy(padded[0], row, columns * sizeof(T));
  if (next != nullptr)
    std::memcpy(padded[1], next, columns * sizeof(T));
  interleave(padded[0], padded[1], units);
}

// Panels of B, see gemm.h. Reads B row by row, kGroup panels at a time.
template <class T>
void pack(
    void* panels, int64_t panel_units, const void* b, int64_t stride, int64_t k, int64_t columns) {
  constexpr int64_t unit = 4 / sizeof(T);
  // Panels written at the same time: enough to use whole pages of B, few enough for the ways of a
  // cache set.
  constexpr int64_t kGroup = 4;
  constexpr int64_t kAhead = 8;  // units
  const int64_t units = ceil_divide(k, unit);
  const T* source = static_cast<const T*>(b);
  for (int64_t first = 0; first < columns; first += kGroup * kPanel) {
    const int64_t last = columns < first + kGroup * kPanel ? columns : first + kGroup * kPanel;
    for (int64_t u = 0; u < units; ++u) {
      const T* row = source + u * unit * stride;
      const T* next = unit == 2 && u * unit + 1 < k ? row + stride : nullptr;
      // Rows are in different pages, and the hardware does not prefetch across pages: fetch what
      // comes kAhead units later, in this group, or from B's first row on in the next one.
      const int64_t next_group = kGroup * kPanel - units * unit * stride;
      const int64_t ahead = kAhead * unit * stride + (u + kAhead < units ? 0 : next_group);
      for (int64_t c = first; c < last; c += kPanel) {
        float* target = static_cast<float*>(panels) + c * panel_units + u * kPanel;
        __builtin_prefetch(row + ahead + c);
        __builtin_prefetch(row + ahead + (unit == 2 ? stride : kPanel / 2) + c);
        if (c + kPanel <= columns)
          interleave(row + c, next == nullptr ? nullptr : next + c, target);
        else
          interleave_part(row + c, next == nullptr ? nullptr : next + c, columns - c, target);
      }
    }
  }
}

// One panel whose granules are where `columns` says.
template <class T>
void pack_granules(
    void* panel, const void* b, int64_t stride, int64_t k, const ColumnMap& columns) {
  constexpr int64_t unit = 4 / sizeof(T);
  const T* source = static_cast<const T*>(b);
  float* target = static_cast<float*>(panel);
  T rows[2][kPanel] = {};
  for (int64_t first = 0; first < k; first += unit) {
    for (int64_t i = 0; i < unit; ++i) {
      const bool exists = first + i < k;
      for (int64_t g = 0; g < kGranules; ++g) {
        T* granule = rows[i] + g * kGranule;
        const T* from = source + (first + i) * stride + columns.offset[g];
        if (exists && columns.valid[g] == kGranule) {
          std::memcpy(granule, from, kGranule * sizeof(T));
        } else {
          const int64_t valid = exists ? columns.valid[g] : 0;
          for (int64_t c = 0; c < kGranule; ++c)
            granule[c] = c < valid ? from[c] : T{};
        }
      }
    }
    interleave(rows[0], rows[1], target + first / unit * kPanel);
  }
}

#if defined(__AVX512F__)
// Transposes 16 x 16 words, rows in registers.
inline void transpose_words(__m512i row[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(row[i], row[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(row[i], row[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    row[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    row[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    row[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    row[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(row[i], row[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(row[i], row[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(row[i + 8], row[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(row[i + 8], row[i + 12], 0xdd);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    row[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    row[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}
#endif

// 16 columns x 16 units from [column][unit] to [unit][column]; false: not available, nothing is
// done.
inline bool transpose_units(const char* from, int64_t from_bytes, char* to, int64_t to_bytes) {
#if defined(__AVX512F__)
  __m512i rows[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i)
    rows[i] = _mm512_loadu_si512(from + i * from_bytes);
  transpose_words(rows);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i)
    _mm512_storeu_si512(to + i * to_bytes, rows[i]);
  return true;
#else
  (void)from, (void)from_bytes, (void)to, (void)to_bytes;
  return false;
#endif
}

// Panels of B from its transpose [columns, k], half a panel at a time.
template <class T>
void pack_transposed(
    void* panels, int64_t panel_units, const void* b, int64_t stride, int64_t k, int64_t columns) {
  constexpr int64_t unit = 4 / sizeof(T);
  const int64_t units = ceil_divide(k, unit), whole = k / unit;
  const T* source = static_cast<const T*>(b);
  for (int64_t first = 0; first < columns; first += kHalfPanel) {
    float* panel =
        static_cast<float*>(panels) + first / kPanel * kPanel * panel_units + first % kPanel;
    const T* rows = source + first * stride;
    int64_t u = 0;
    if (first + kHalfPanel <= columns)
      for (; u + kHalfPanel <= whole; u += kHalfPanel)
        if (!transpose_units(reinterpret_cast<const char*>(rows + u * unit),
                             stride * sizeof(T),
                             reinterpret_cast<char*>(panel + u * kPanel),
                             kPanel * 4))
          break;
    // What is left: a few units, or columns.
    for (; u < units; ++u)
      for (int64_t c = 0; c < kHalfPanel; ++c) {
        T pair[unit] = {};
        if (first + c < columns)
          for (int64_t i = 0; i < unit && u * unit + i < k; ++i)
            pair[i] = rows[c * stride + u * unit + i];
        std::memcpy(panel + u * kPanel + c, pair, 4);
      }
  }
  // The other half of the last panel has no columns.
  const int64_t end = round_up(columns, kHalfPanel);
  if (end % kPanel == 0)
    return;
  float* panel = static_cast<float*>(panels) + end / kPanel * kPanel * panel_units + kHalfPanel;
  for (int64_t u = 0; u < units; ++u)
    std::memset(panel + u * kPanel, 0, kHalfPanel * 4);
}

// Side of the blocks that are transposed in registers; 0: there are none.
template <class T>
constexpr int64_t kBlockSide =
#if defined(__AVX512F__)
    sizeof(T) == 4 ? 16 : 8;
#elif defined(__SSE2__)
    sizeof(T) == 4 ? 4 : 8;
#else
    0;
#endif

inline void transpose_block(const float* in, int64_t in_stride, float* out, int64_t out_stride) {
#if defined(__AVX512F__)
  transpose_units(reinterpret_cast<const char*>(in),
                  in_stride * 4,
                  reinterpret_cast<char*>(out),
                  out_stride * 4);
#elif defined(__SSE2__)
  __m128 row[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
    row[i] = _mm_loadu_ps(in + i * in_stride);
  _MM_TRANSPOSE4_PS(row[0], row[1], row[2], row[3]);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
    _mm_storeu_ps(out + i * out_stride, row[i]);
#else
  (void)in, (void)in_stride, (void)out, (void)out_stride;
#endif
}
inline void transpose_block(const BFloat16* in,
                            int64_t in_stride,
                            BFloat16* out,
                            int64_t out_stride) {
#if defined(__SSE2__)
  __m128i a[8], b[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i)
    a[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i * in_stride));
  const auto interleave_halves = [](const __m128i* from, __m128i* to) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      to[2 * i] = _mm_unpacklo_epi16(from[i], from[i + 4]);
      to[2 * i + 1] = _mm_unpackhi_epi16(from[i], from[i + 4]);
    }
  };
  interleave_halves(a, b);
  interleave_halves(b, a);
  interleave_halves(a, b);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i * out_stride), b[i]);
#else
  (void)in, (void)in_stride, (void)out, (void)out_stride;
#endif
}

// Whole blocks in registers, then the rest element by element.
template <class T>
void transpose(const void* in,
               int64_t in_stride,
               int64_t rows,
               int64_t columns,
               void* out,
               int64_t out_stride) {
  constexpr int64_t side = kBlockSide<T>;
  const T* from = static_cast<const T*>(in);
  T* to = static_cast<T*>(out);
  int64_t whole_rows = 0, whole_columns = 0;
  if constexpr (side > 0) {
    whole_rows = rows / side * side;
    whole_columns = whole_rows == 0 ? 0 : columns / side * side;
    for (int64_t r = 0; r < whole_rows; r += side)
      for (int64_t c = 0; c < whole_columns; c += side)
        transpose_block(from + r * in_stride + c, in_stride, to + c * out_stride + r, out_stride);
  }
  for (int64_t c = 0; c < columns; ++c)
    for (int64_t r = c < whole_columns ? whole_rows : 0; r < rows; ++r)
      to[c * out_stride + r] = from[r * in_stride + c];
}

}  // namespace
}  // namespace mpoe
