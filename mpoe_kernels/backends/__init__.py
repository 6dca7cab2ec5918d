"""Backends: tables of the ops' kernels. Importing this package registers them all."""

from mpoe_kernels.backends.cuda import CUDA
from mpoe_kernels.backends.eager import EAGER
from mpoe_kernels.backends.native import NATIVE
from mpoe_kernels.backends.triton import TRITON
from mpoe_kernels.registry import BackendError, available_backends, backend_reasons, register_backend, use_backend

__all__ = ["BackendError", "available_backends", "backend_reasons", "use_backend"]

register_backend(EAGER)
register_backend(NATIVE)
register_backend(TRITON)
register_backend(CUDA)
