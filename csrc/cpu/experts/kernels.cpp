#include "cpu/experts/kernels.h"

#include "common/cpu_features.h"

namespace mpoe {

// Indexed by whether the dtype is bfloat16.
extern const ExpertKernels kExpertsGeneric[2];
extern const ExpertKernels kExpertsAvx2[2];
extern const ExpertKernels kExpertsAvx512[2];
extern const ExpertKernels kExpertsAvx512Bf16[2];

const ExpertKernels& expert_kernels(Dtype dtype) {
  return MPOE_TABLE_IN_USE(kExperts)[dtype == Dtype::kBFloat16 ? 1 : 0];
}

}  // namespace mpoe
