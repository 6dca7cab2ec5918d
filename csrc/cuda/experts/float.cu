#include "cuda/experts/launch.cuh"

namespace mpoe::cuda {

void experts_float(const ExpertsLaunches& p, cudaStream_t stream) { launch_experts<float>(p, stream); }

}  // namespace mpoe::cuda
