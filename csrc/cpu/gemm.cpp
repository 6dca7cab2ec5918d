#include "cpu/gemm.h"

#include "common/cpu_features.h"

namespace mpoe {

const GemmKernels& gemm_kernels(Dtype dtype) {
  const int index = dtype == Dtype::kBFloat16 ? 1 : 0;
#if defined(__x86_64__)
  switch (active_isa()) {
    case Isa::kAvx512Bf16: return kGemmAvx512Bf16[index];
    case Isa::kAvx512: return kGemmAvx512[index];
    case Isa::kAvx2: return kGemmAvx2[index];
    case Isa::kGeneric: break;
  }
#endif
  return kGemmGeneric[index];
}

}  // namespace mpoe
