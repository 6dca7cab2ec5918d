"""`hidden_experts`: many experts per token between two dense products. The op's whole story stands in this folder.

`op.py` defines it (schema, fake, autograd, autocast, public function) and says who computes it; `reference.py` is its
definition as loops; `eager.py`, `native.py` and so on are its kernels. `routed` decides and computes few tokens in one
call.
"""

from mpoe_kernels.hidden_experts.native import routed
from mpoe_kernels.hidden_experts.op import ACTIVATIONS, hidden_experts

__all__ = ["ACTIVATIONS", "hidden_experts", "routed"]
