"""`hidden_experts`: many experts per token between two dense products. This folder contains the
whole op.

`op.py` defines it (schema, fake kernel, autograd, autocast, public function) and registers its
kernels; `reference.py` is its definition as loops; `eager.py`, `native.py` and so on are its
kernels. `routed` routes and computes tokens in one call.
"""

from mpoe_kernels.hidden_experts.native import routed
from mpoe_kernels.hidden_experts.op import ACTIVATIONS, hidden_experts

__all__ = ["ACTIVATIONS", "hidden_experts", "routed"]
