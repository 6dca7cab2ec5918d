"""For pytest -p: registers the emulated CUDA kernels as the backend ``emulated``."""

from __future__ import annotations

from mpoe_kernels.registry import register_backend

from .emulation import EMULATED, library

library()
register_backend(EMULATED)
