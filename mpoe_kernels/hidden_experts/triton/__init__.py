"""Triton kernels. Importing this package imports no Triton: a kernel's module is imported when it first runs."""
