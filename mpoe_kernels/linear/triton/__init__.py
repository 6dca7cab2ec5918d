"""Triton kernels. Importing this package does not import Triton: a kernel's module is imported when it first runs."""
