#include "cuda/experts/launch.cuh"

namespace mpoe::cuda {

void experts_float16(const ExpertsLaunches& p, cudaStream_t stream) { launch_experts<dev::fp16>(p, stream); }

}  // namespace mpoe::cuda
