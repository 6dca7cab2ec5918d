#include "cuda/experts/launch.cuh"
template void mpoe::cuda::launch<dev::bf16>(const mpoe::cuda::ExpertsLaunches&, cudaStream_t);
