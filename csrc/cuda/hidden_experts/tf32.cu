#include "cuda/hidden_experts/launch.cuh"

namespace mpoe::cuda {

void hidden_tf32(const HiddenArguments& p, const HiddenSums& sums, cudaStream_t stream) {
  launch_hidden<dev::tf32>(p, sums, stream);
}

}  // namespace mpoe::cuda
