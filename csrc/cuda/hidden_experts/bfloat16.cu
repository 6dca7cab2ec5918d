#include "cuda/hidden_experts/launch.cuh"

namespace mpoe::cuda {

void hidden_bfloat16(const HiddenArguments& p, const HiddenSums& sums, cudaStream_t stream) {
  launch_hidden<dev::bf16>(p, sums, stream);
}

}  // namespace mpoe::cuda
