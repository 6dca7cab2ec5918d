"""What the Triton kernels of several ops share: devices, launches, tuning."""
