#include "cuda/linear/launch.cuh"

namespace mpoe::cuda {

template void launch<dev::tf32>(const RebuiltArguments&, int, cudaStream_t);
template void launch<dev::tf32>(const GradientArguments&, dim3, cudaStream_t);

}  // namespace mpoe::cuda
