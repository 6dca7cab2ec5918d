"""The grouped MPO linear: its op, its reference, and the kernels of every backend."""

from mpoe_kernels.linear import examples as examples
