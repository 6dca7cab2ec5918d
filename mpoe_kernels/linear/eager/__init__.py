"""Pure PyTorch: always available, on every device and dtype, and the baseline for other backends."""
