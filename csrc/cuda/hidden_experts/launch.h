// One file each compiles the kernels of hidden.h for one dtype.
#pragma once
#include "cuda/hidden_experts/cores.cuh"

namespace mpoe::cuda {

// Forward where `p.out` is given, else the gradients that have a place. Tiles are chosen here.
void hidden_float(const HiddenArguments& p, const HiddenSums& sums, cudaStream_t stream);
void hidden_tf32(const HiddenArguments& p, const HiddenSums& sums, cudaStream_t stream);
void hidden_bfloat16(const HiddenArguments& p, const HiddenSums& sums, cudaStream_t stream);
void hidden_float16(const HiddenArguments& p, const HiddenSums& sums, cudaStream_t stream);

}  // namespace mpoe::cuda
