"""Backends: kernels that hang below the ops. Importing this package registers those that exist."""

from mpoe_kernels.backends.cuda import CUDA
from mpoe_kernels.backends.eager import EAGER
from mpoe_kernels.backends.native import NATIVE
from mpoe_kernels.backends.registry import register_backend
from mpoe_kernels.backends.triton import TRITON

register_backend(EAGER)
register_backend(NATIVE)
register_backend(TRITON)
register_backend(CUDA)
