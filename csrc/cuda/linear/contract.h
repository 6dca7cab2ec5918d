// Launches of csrc/cuda/linear/contract.cuh.
#pragma once
#include "common/types.h"
#include "cuda/index.cuh"

namespace mpoe::cuda {

// Throws if the preceding launch failed.
void check_launch(const char* what);

// Launches the product on `stream`. The arguments must be complete: steps.cu fills them.
// tf32: multiply float32 on tensor cores, rounded to tf32.
void contract(Dtype dtype, bool tf32, const ContractArguments& arguments, cudaStream_t stream);

// The kernels of one dtype, each compiled in its own file.
void contract_float(const ContractArguments& arguments, cudaStream_t stream);
void contract_tf32(const ContractArguments& arguments, cudaStream_t stream);
void contract_bfloat16(const ContractArguments& arguments, cudaStream_t stream);
void contract_float16(const ContractArguments& arguments, cudaStream_t stream);

}  // namespace mpoe::cuda
