#include "cuda/experts/launch.cuh"

namespace mpoe::cuda {

void experts_bfloat16(const ExpertsLaunches& p, cudaStream_t stream) { launch_experts<dev::bf16>(p, stream); }

}  // namespace mpoe::cuda
