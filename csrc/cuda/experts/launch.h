// The kernels of experts.h, compiled in one file per dtype.
#pragma once
#include "cuda/experts/weights.cuh"

namespace mpoe::cuda {

struct ExpertsLaunches : ExpertsArguments {
  bool is_backward = false;
  WeightGradients weights;
  void* dbias = nullptr;
  PartsSums parts;
};

// The tiles of the forward, or the gradients whose pointers are set.
void experts_float(const ExpertsLaunches& p, cudaStream_t stream);
void experts_tf32(const ExpertsLaunches& p, cudaStream_t stream);
void experts_bfloat16(const ExpertsLaunches& p, cudaStream_t stream);
void experts_float16(const ExpertsLaunches& p, cudaStream_t stream);

}  // namespace mpoe::cuda
