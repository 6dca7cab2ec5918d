#include "cuda/linear/contract_launch.cuh"

namespace mpoe::cuda {

void contract_float16(const ContractArguments& arguments, cudaStream_t stream) {
  launch_contract<dev::fp16>(arguments, stream);
}

}  // namespace mpoe::cuda
