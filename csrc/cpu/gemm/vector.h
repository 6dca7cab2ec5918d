// Vectors of the instruction set that the including file is compiled for, with the compilers'
// vector extension. Everything is in an anonymous namespace: files compiled for different
// instruction sets must not share a copy.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/types.h"
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace mpoe {
namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16;  // floats per vector
constexpr int kTileRows = 14, kTileVectors = 2;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
constexpr int kTileRows = 6, kTileVectors = 2;
#else
constexpr int kWidth = 4;  // SSE2, NEON
#if defined(__aarch64__)
constexpr int kTileRows = 8,
              kTileVectors = 2;  // 32 registers; sums for four pipelines of multiply-adds
#else
constexpr int kTileRows = 6, kTileVectors = 2;
#endif
#endif

using Floats = float __attribute__((vector_size(4 * kWidth)));
using Words = uint32_t __attribute__((vector_size(4 * kWidth)));
using Halves = uint16_t __attribute__((vector_size(2 * kWidth)));

template <class V>
inline V load_vector(const void* address) {
  V value;
  std::memcpy(&value, address, sizeof value);
  return value;
}
template <class V>
inline void store_vector(void* address, V value) {
  std::memcpy(address, &value, sizeof value);
}

// `0 + value` would be an addition, since 0 + -0 is 0; `value - 0` is value: one broadcast, from
// memory if it is there.
inline Floats splat(float value) {
  return value - Floats{};
}

// Keeps an operand of several products in a register: compilers would load it again for each where
// they are few.
template <class V>
inline void keep([[maybe_unused]] V& value) {
#if defined(__AVX2__)
  asm("" : "+v"(value));
#endif
}

inline Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// Compilers convert a vector in two halves and put them together.
inline Words widen(Halves value) {
#if defined(__AVX512F__)
  return (Words)_mm512_cvtepu16_epi32((__m256i)value);
#elif defined(__AVX2__)
  return (Words)_mm256_cvtepu16_epi32((__m128i)value);
#else
  return __builtin_convertvector(value, Words);
#endif
}

// kWidth floats from and to memory of T.
inline Floats load_floats(const float* address) {
  return load_vector<Floats>(address);
}
inline Floats load_floats(const BFloat16* address) {
  return (Floats)(widen(load_vector<Halves>(address)) << 16);
}
#if defined(__AVX512BF16__)
inline Halves round_to_bfloat16(Floats value) {
  return (Halves)_mm512_cvtneps_pbh((__m512)value);
}
inline Words bfloat16_bits(Floats value) {
  return widen(round_to_bfloat16(value));
}
#else
inline Words bfloat16_bits(Floats value) {
  const Words bits = (Words)value;
  const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Words nan = (Words)(value != value);
  return (rounded & ~nan) | (nan & 0x7fc0u);
}
inline Halves round_to_bfloat16(Floats value) {
  return __builtin_convertvector(bfloat16_bits(value), Halves);
}
#endif
inline void store_floats(float* address, Floats value) {
  store_vector(address, value);
}
inline void store_floats(BFloat16* address, Floats value) {
  store_vector(address, round_to_bfloat16(value));
}

// One number in every place: two copies of a bfloat16 number shifted to one float.
inline Floats splat_of(const float* address) {
  return splat(*address);
}
inline Floats splat_of(const BFloat16* address) {
  using Pairs = uint16_t __attribute__((vector_size(4 * kWidth)));
  return (Floats)((Words)(address->bits - Pairs{}) << 16);
}

// The sum of a vector's numbers, by halves. In registers: a loop over elements in memory waits for
// its own stores.
inline float sum_of(Floats value) {
  using Quarters = float __attribute__((vector_size(16)));
#if defined(__AVX512F__)
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256((__m512)value),
                                     _mm512_extractf32x8_ps((__m512)value, 1));
#elif defined(__AVX2__)
  const __m256 eight = (__m256)value;
#endif
#if defined(__AVX2__)
  const Quarters four =
      (Quarters)_mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
#else
  const Quarters four = value;
#endif
#if defined(__SSE2__)
  const Quarters two = four + (Quarters)_mm_movehl_ps((__m128)four, (__m128)four);
  return two[0] + two[1];
#else
  return (four[0] + four[2]) + (four[1] + four[3]);
#endif
}

inline float load_float(const char* address) {
  float value;
  std::memcpy(&value, address, 4);
  return value;
}

// acc + a0 b0 (+ a1 b1 for bfloat16), for one unit `a` and a vector of units `b`, in kSteps
// multiply-adds, each loading its operands: the first for all rows, then the second, so that
// registers hold one step's operands at a time. kRows: rows of a tile, as many as leave registers
// for the operands.
template <class T>
struct UnitProduct;

template <>
struct UnitProduct<float> {
  static constexpr int kSteps = 1, kRows = kTileRows;
  using Operand = Floats;
  template <int step>
  static inline Operand broadcast(const char* address) {
    return splat(load_float(address));
  }
  template <int step>
  static inline Operand load(const char* address) {
    return load_vector<Floats>(address);
  }
  static inline Floats multiply(Floats acc, Operand a, Operand b) {
    return multiply_add(a, b, acc);
  }
};

template <>
struct UnitProduct<BFloat16> {
#if defined(__AVX512BF16__)
  static constexpr int kSteps = 1, kRows = kTileRows;
  using Operand = __m512i;
  template <int step>
  static inline Operand broadcast(const char* address) {
    int value;
    std::memcpy(&value, address, 4);
    return _mm512_set1_epi32(value);
  }
  template <int step>
  static inline Operand load(const char* address) {
    return _mm512_loadu_si512(address);
  }
  static inline Floats multiply(Floats acc, Operand a, Operand b) {
    return (Floats)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
  }
#else
  static constexpr int kSteps = 2, kRows = kTileRows - 1;  // the mask needs a register too
  using Operand = Floats;
  template <int step>
  static inline Operand half(Words units) {
    return (Floats)(step == 0 ? units << 16 : units & 0xffff0000u);
  }
  template <int step>
  static inline Operand broadcast(const char* address) {
    return half<step>((Words)splat(load_float(address)));
  }
  template <int step>
  static inline Operand load(const char* address) {
    return half<step>(load_vector<Words>(address));
  }
  static inline Floats multiply(Floats acc, Operand a, Operand b) {
    return multiply_add(a, b, acc);
  }
#endif
};

// out = in, rounded.
template <class T>
inline void store_row(const float* in, T* out, int64_t count) {
  int64_t c = 0;
  for (; c + kWidth <= count; c += kWidth)
    store_floats(out + c, load_floats(in + c));
  for (; c < count; ++c)
    store(out[c], in[c]);
}

}  // namespace
}  // namespace mpoe
