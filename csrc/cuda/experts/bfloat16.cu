#include "cuda/experts/launch.cuh"

namespace mpoe::cuda {

template void launch<dev::bf16>(const ExpertsLaunches&, cudaStream_t);

}  // namespace mpoe::cuda
