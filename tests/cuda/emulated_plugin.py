"""For pytest -p: registers the emulated CUDA kernels as the backend ``emulated``."""

from .emulation import register

register()
