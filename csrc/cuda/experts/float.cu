#include "cuda/experts/launch.cuh"
template void mpoe::cuda::launch<float>(const mpoe::cuda::ExpertsLaunches&, cudaStream_t);
