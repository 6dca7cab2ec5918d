"""For pytest -p: registers the emulated CUDA kernels as the backend ``emulated``."""

from __future__ import annotations

from mpoe_kernels.backends import add_kernels, register_backend
from mpoe_kernels.hidden_experts import op as hidden
from mpoe_kernels.neurons import op as neurons
from mpoe_kernels.routing import op as routing

from .emulation import EMULATED, HIDDEN, KERNELS, NEURONS, ROUTING, library

library()
EMULATED.candidates, EMULATED.contraction_reasons = KERNELS.candidates, KERNELS.contraction_reasons
register_backend(EMULATED)
add_kernels("emulated", HIDDEN, hidden.FUNCTIONS)
add_kernels("emulated", NEURONS, neurons.FUNCTIONS)
add_kernels("emulated", ROUTING, routing.FUNCTIONS)
