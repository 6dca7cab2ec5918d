#include "cpu/gemm/gemm.h"

#include <cassert>

#include "common/cpu_features.h"

namespace mpoe {

#if defined(__x86_64__)
namespace {

// Everything except the products is shared with AVX512-BF16.
GemmKernels amx_kernels() {
  GemmKernels kernels = kGemmAvx512Bf16[1];
  kernels.best_rows = kMaxRows;
  // Bfloat16 rounding outweighs that of longer sums, and starting tiles takes time
  kernels.longest_sum = 1024;
  kernels.multiply_rows = amx_multiply_rows;
  kernels.multiply_columns = amx_multiply_columns;
  return kernels;
}

}  // namespace
#endif

const GemmKernels& gemm_kernels(Dtype dtype) {
  assert(dtype == Dtype::kFloat32 || dtype == Dtype::kBFloat16);
  const int index = dtype == Dtype::kBFloat16 ? 1 : 0;
#if defined(__x86_64__)
  static const GemmKernels amx = amx_kernels();
  if (index == 1 && active_isa() == Isa::kAmx)
    return amx;
#endif
  return MPOE_TABLE_IN_USE(kGemm)[index];
}

}  // namespace mpoe
