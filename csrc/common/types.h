// Element types of kernels that know nothing about torch. Everything is in an anonymous namespace:
// files compiled for different instruction sets must not share a copy.
#pragma once

#include <bit>
#include <cstdint>

namespace mpoe {

enum class Dtype : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

constexpr int64_t size_of(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
}

// Bits of a bfloat16 or float16 number.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

namespace {

// The type in which sums of T are accumulated.
template <class T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};

inline float load(float value) {
  return value;
}
inline double load(double value) {
  return value;
}
inline float load(BFloat16 value) {
  return std::bit_cast<float>(static_cast<uint32_t>(value.bits) << 16);
}
inline float load(Float16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fffu);
  // Read as a float whose exponent is 112 too small; the product also makes subnormal numbers
  // normal.
  const float scaled = std::bit_cast<float>(magnitude << 13) * 0x1p112f;
  const uint32_t special = 0x7f800000u | (magnitude & 0x3ffu) << 13;  // infinity or NaN
  return std::bit_cast<float>(sign |
                              (magnitude >= 0x7c00u ? special : std::bit_cast<uint32_t>(scaled)));
}

// Rounds to nearest, ties to even, as torch does.
inline void store(float& out, float value) {
  out = value;
}
inline void store(double& out, double value) {
  out = value;
}
inline void store(BFloat16& out, float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out.bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}
inline void store(Float16& out, float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Normal results: shift the exponent by 112 and round off the low 13 bits; overflow carries into
  // infinity.
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Below 2^-14: adding 0.5 makes the hardware round to multiples of 2^-24.
  const uint32_t subnormal =
      std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t result = magnitude < 0x38800000u ? subnormal : normal;
  if (magnitude >= 0x47800000u)
    result = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  out.bits = static_cast<uint16_t>(result | ((bits >> 16) & 0x8000u));
}

}  // namespace
}  // namespace mpoe
