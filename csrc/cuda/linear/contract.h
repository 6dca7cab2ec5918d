// Launches of csrc/cuda/linear/contract.cuh.
#pragma once
#include "common/types.h"
#include "cuda/index.cuh"

namespace mpoe::cuda {

// Throws if the launch before it failed.
void check_launch(const char* what);

// Starts the product on `stream`. Fills nothing of the arguments: see steps.cu for who does.
// tf32: multiply float32 on tensor cores, rounded to tf32.
void contract(Dtype dtype, bool tf32, const ContractArguments& arguments, cudaStream_t stream);

// One file each compiles the kernels of one dtype.
void contract_float(const ContractArguments& arguments, cudaStream_t stream);
void contract_tf32(const ContractArguments& arguments, cudaStream_t stream);
void contract_bfloat16(const ContractArguments& arguments, cudaStream_t stream);
void contract_float16(const ContractArguments& arguments, cudaStream_t stream);

}  // namespace mpoe::cuda
