#include "cuda/linear/contract_launch.cuh"

namespace mpoe::cuda {

void contract_tf32(const ContractArguments& arguments, cudaStream_t stream) {
  launch_contract<dev::tf32>(arguments, stream);
}

}  // namespace mpoe::cuda
