"""For pytest -p: registers the emulated CUDA kernels as the backend ``emulated``."""

from __future__ import annotations

from mpoe_kernels.hidden_experts.op import add_kernels
from mpoe_kernels.registry import register_backend

from .emulation import EMULATED, HIDDEN, library

library()
register_backend(EMULATED)
add_kernels("emulated", HIDDEN)
