"""`neuron_experts`: experts of their own hidden neurons. This folder contains the whole op.

`op.py` defines it (schema, fake kernel, autograd, autocast, public function) and registers its
kernels; `reference.py` is its definition as loops; `eager.py`, `native.py`, `triton.py` and
`cuda.py` are its kernels.
"""

from mpoe_kernels.neurons.op import neuron_experts

__all__ = ["neuron_experts"]
