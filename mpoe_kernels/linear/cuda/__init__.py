"""The compiled CUDA kernels of csrc/cuda."""
