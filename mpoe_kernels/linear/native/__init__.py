"""The compiled CPU kernels of csrc/cpu/linear."""
