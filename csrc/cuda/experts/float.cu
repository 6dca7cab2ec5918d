#include "cuda/experts/launch.cuh"

namespace mpoe::cuda {

template void launch<float>(const ExpertsLaunches&, cudaStream_t);

}  // namespace mpoe::cuda
