#include "cuda/linear/contract.h"

#include <stdexcept>
#include <string>

namespace mpoe::cuda {

void check_launch(const char* what) {
  const auto error = cudaGetLastError();
  if (error) throw std::runtime_error(std::string(what) + " could not be launched: " + cudaGetErrorString(error));
}

void contract(Dtype dtype, bool tf32, const ContractArguments& arguments, cudaStream_t stream) {
  switch (dtype) {
    case Dtype::kFloat32: return tf32 ? contract_tf32(arguments, stream) : contract_float(arguments, stream);
    case Dtype::kBFloat16: return contract_bfloat16(arguments, stream);
    case Dtype::kFloat16: return contract_float16(arguments, stream);
    default: throw std::invalid_argument("CUDA kernels take float32, bfloat16 and float16");
  }
}

}  // namespace mpoe::cuda
