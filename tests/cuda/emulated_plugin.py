"""For pytest -p: registers the emulated CUDA kernels as the backend ``emulated``."""

from __future__ import annotations

from emulation import EMULATED, library

from mpoe_kernels.registry import register_backend

library()
register_backend(EMULATED)
