"""CUDA C++ kernels."""
