#include "cuda/experts/launch.cuh"

namespace mpoe::cuda {

void experts_tf32(const ExpertsLaunches& p, cudaStream_t stream) { launch_experts<dev::tf32>(p, stream); }

}  // namespace mpoe::cuda
