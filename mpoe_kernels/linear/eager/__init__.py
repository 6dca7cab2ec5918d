"""Pure PyTorch: always there, on every device and dtype, and what other backends are measured against."""
