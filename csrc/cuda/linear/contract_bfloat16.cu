#include "cuda/linear/contract_launch.cuh"

namespace mpoe::cuda {

void contract_bfloat16(const ContractArguments& arguments, cudaStream_t stream) {
  launch_contract<dev::bf16>(arguments, stream);
}

}  // namespace mpoe::cuda
