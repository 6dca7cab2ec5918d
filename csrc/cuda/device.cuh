// The device layer: the only file with inline PTX, and the only access that kernels have to CUDA.
// Under nvcc these are instructions; under MPOE_CUDA_EMULATED (plain C++20), their twins in
// tests/emulator/twins.h.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#if defined(MPOE_CUDA_EMULATED)
#include "emulator/cuda_emulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define UNROLL _Pragma("unroll")
#define UNROLL_BY_2 _Pragma("unroll 2")
#define ROLLED _Pragma("unroll 1")
#define DYN_SHARED(T, name)                                    \
  extern __shared__ __align__(128) unsigned char raw_##name[]; \
  T* name = reinterpret_cast<T*>(raw_##name)
#define SHARED_ARRAY(T, name, count) __shared__ T name[count]
#define LAUNCH(kernel, grid, block, smem, stream, ...)                        \
  do {                                                                        \
    if ((smem) > 48 * 1024)                                                   \
      (void)cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),       \
                                 cudaFuncAttributeMaxDynamicSharedMemorySize, \
                                 static_cast<int>(smem));                     \
    (kernel)<<<(grid), (block), (smem), (stream)>>>(__VA_ARGS__);             \
  } while (0)

namespace dev {

using bf16 = __nv_bfloat16;
using fp16 = __half;

// D[16 x 8] += A[16 x 16] B[16 x 8], A row-major, B column-major, D in float32.
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4],
                                             const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]);
#define MMA_M16N8K16(T, type)                                                         \
  template <>                                                                         \
  __device__ __forceinline__ void mma_m16n8k16<T>(                                    \
      float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {                \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type               \
                 ".f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};\n"          \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                     \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1])); \
  }
MMA_M16N8K16(bf16, "bf16")
MMA_M16N8K16(fp16, "f16")
// An address in shared memory as instructions take it, computed once: the compiler would find it
// anew for each of them.
using Shared = uint32_t;
__device__ __forceinline__ Shared shared_address(const void* p) {
  uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(p));
  asm volatile("" : "+r"(address));
  return address;
}
// Four 8 x 8 matrices of 16-bit numbers; lane l passes row l % 8 of matrix l / 8. Conflict-free if
// the eight rows of a matrix start in different groups of four banks.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], Shared row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3},[%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], Shared row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3},[%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}
// Copies 16 bytes, or writes zeros if there are none; both addresses are 16-byte aligned.
__device__ __forceinline__ void cp_async16(Shared shared, const void* global, bool there) {
  // clang-format off
  asm volatile("{.reg .pred none;\n"
               "setp.eq.u32 none,%2,0;\n"
               "cp.async.cg.shared.global [%0],[%1],16,none;}\n"
               :
               : "r"(shared), "l"(global), "r"(static_cast<uint32_t>(there))
               : "memory");
  // clang-format on
}
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;\n" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

}  // namespace dev
#endif

namespace dev {

// Conversions to and from the accumulator's float32; rounding to nearest, ties to even.
__device__ __forceinline__ float to_float(float value) {
  return value;
}
__device__ __forceinline__ float to_float(bf16 value) {
  return __bfloat162float(value);
}
__device__ __forceinline__ float to_float(fp16 value) {
  return __half2float(value);
}
template <class T>
__device__ __forceinline__ T from_float(float value) {
  if constexpr (sizeof(T) == 4)
    return value;
  else if constexpr (std::is_same_v<T, bf16>)
    return __float2bfloat16(value);
  else
    return __float2half(value);
}

constexpr unsigned kFullWarp = 0xffffffffu;

// Sum over the lanes of a warp up to this one.
__device__ __forceinline__ int sum_up_to(int value) {
  UNROLL
  for (int step = 1; step < 32; step <<= 1) {
    const int left = __shfl_up_sync(kFullWarp, value, static_cast<unsigned>(step));
    if (static_cast<int>(threadIdx.x & 31) >= step)
      value += left;
  }
  return value;
}

// kPer adjacent elements, moved at once.
template <class T, int kPer>
struct alignas(sizeof(T) * kPer) Pack {
  T v[kPer];
};
// Adjacent elements as floats, moved at once.
template <int kPer, class T>
__device__ __forceinline__ Pack<float, kPer> load(const T* from) {
  const Pack<T, kPer> pack = *reinterpret_cast<const Pack<T, kPer>*>(from);
  Pack<float, kPer> values;
  UNROLL
  for (int i = 0; i < kPer; ++i)
    values.v[i] = to_float(pack.v[i]);
  return values;
}
template <int kPer, class T>
__device__ __forceinline__ void store(const Pack<float, kPer>& values, T* to) {
  Pack<T, kPer> pack;
  UNROLL
  for (int i = 0; i < kPer; ++i)
    pack.v[i] = from_float<T>(values.v[i]);
  *reinterpret_cast<Pack<T, kPer>*>(to) = pack;
}

}  // namespace dev

namespace mpoe::cuda {

// Throws if the preceding launch failed.
inline void check_launch(const char* what) {
  const auto error = cudaGetLastError();
  if (error)
    throw std::runtime_error(std::string(what) +
                             " could not be launched: " + cudaGetErrorString(error));
}

}  // namespace mpoe::cuda
