// CUDA's vocabulary for a host compiler: keywords, built-in types and number formats, as csrc/cuda
// uses them.
#pragma once
#if defined(__CUDACC__)
#error "the emulator is for host compilers only"
#endif

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __grid_constant__

// device.cuh defines the same macros for nvcc.
#define UNROLL
#define UNROLL_BY_2
#define ROLLED
#define DYN_SHARED(T, name) T* name = reinterpret_cast<T*>(::emu::dynamic_shared())
#define SHARED_ARRAY(T, name, count) \
  static char name##_key;            \
  T* name = reinterpret_cast<T*>(::emu::static_shared(&name##_key, sizeof(T) * (count)))
#define LAUNCH(kernel, grid, block, smem, stream, ...)                          \
  do {                                                                          \
    (void)(stream);                                                             \
    ::emu::launch((grid), (block), (smem), ::emu::bind((kernel), __VA_ARGS__)); \
  } while (0)

struct uint3 {
  unsigned x;
  unsigned y;
  unsigned z;
};
struct dim3 {
  unsigned x;
  unsigned y;
  unsigned z;
  constexpr dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
using cudaStream_t = struct CUstream_st*;
using cudaError_t = int;
inline cudaError_t cudaGetLastError() {
  return 0;
}
inline const char* cudaGetErrorString(cudaError_t) {
  return "no error";
}

struct alignas(2) __nv_bfloat16 {
  std::uint16_t bits;
};
struct alignas(2) __half {
  std::uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 value) {
  return std::bit_cast<float>(std::uint32_t(value.bits) << 16);
}
inline __nv_bfloat16 __float2bfloat16(float value) {  // to nearest, ties to even
  const std::uint32_t u = std::bit_cast<std::uint32_t>(value);
  if ((u & 0x7fffffffu) > 0x7f800000u)
    return {std::uint16_t(0x7fff)};
  return {std::uint16_t((u + 0x7fffu + ((u >> 16) & 1)) >> 16)};
}
inline float __half2float(__half value) {
  return static_cast<float>(std::bit_cast<_Float16>(value.bits));
}
inline __half __float2half(float value) {
  return {std::bit_cast<std::uint16_t>(static_cast<_Float16>(value))};
}
inline float __uint_as_float(unsigned bits) {
  return std::bit_cast<float>(bits);
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return unsigned((std::uint64_t(a) * b) >> 32);
}
