// The kernels of hidden_experts.h, compiled in one file per dtype.
#pragma once
#include "cuda/hidden_experts/cores.cuh"

namespace mpoe::cuda {

// The forward if `p.out` is given, otherwise the gradients whose pointers are set. They choose the tiles.
void hidden_float(const HiddenArguments& p, const HiddenSums& sums, cudaStream_t stream);
void hidden_tf32(const HiddenArguments& p, const HiddenSums& sums, cudaStream_t stream);
void hidden_bfloat16(const HiddenArguments& p, const HiddenSums& sums, cudaStream_t stream);
void hidden_float16(const HiddenArguments& p, const HiddenSums& sums, cudaStream_t stream);

}  // namespace mpoe::cuda
