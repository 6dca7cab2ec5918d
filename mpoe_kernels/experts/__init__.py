"""Many experts per token, in two forms: between two dense products (`hidden_experts`), and as
hidden neurons of their own (`neuron_experts`). This folder contains both ops.

`op.py` defines them (schemas, fake kernels, autograd, autocast, public functions) and registers
their kernels; `reference.py` is their definition as loops; the rest are their kernels.
`routed_hidden` and `routed_neurons` route and compute tokens in one call.
"""

from mpoe_kernels.experts.native import routed_hidden, routed_neurons
from mpoe_kernels.experts.op import ACTIVATIONS, hidden_experts, neuron_experts

__all__ = ["ACTIVATIONS", "hidden_experts", "neuron_experts", "routed_hidden", "routed_neurons"]
