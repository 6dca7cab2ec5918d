#include "cuda/linear/launch.cuh"

namespace mpoe::cuda {

template void launch<float>(const RebuiltArguments&, int, cudaStream_t);
template void launch<float>(const GradientArguments&, dim3, cudaStream_t);

}  // namespace mpoe::cuda
