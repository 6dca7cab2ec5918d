#include "cuda/hidden_experts/launch.cuh"

namespace mpoe::cuda {

void hidden_float(const HiddenArguments& p, const HiddenSums& sums, cudaStream_t stream) {
  launch_hidden<float>(p, sums, stream);
}

}  // namespace mpoe::cuda
