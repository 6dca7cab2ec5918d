"""Shared by the Triton kernels of several ops: devices, launches, tuning."""
