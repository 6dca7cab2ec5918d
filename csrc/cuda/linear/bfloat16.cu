#include "cuda/linear/launch.cuh"
MPOE_LINEAR_LAUNCHES(dev::bf16)
