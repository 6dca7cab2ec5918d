#include "cuda/linear/contract_launch.cuh"

namespace mpoe::cuda {

void contract_float(const ContractArguments& arguments, cudaStream_t stream) {
  launch_contract<float>(arguments, stream);
}

}  // namespace mpoe::cuda
