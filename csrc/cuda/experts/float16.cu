#include "cuda/experts/launch.cuh"
template void mpoe::cuda::launch<dev::fp16>(const mpoe::cuda::ExpertsLaunches&, cudaStream_t);
