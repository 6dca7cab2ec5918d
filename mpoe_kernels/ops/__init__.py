"""The `mpoe::` ops and their public functions. They are defined only here; kernels hang below them."""

from mpoe_kernels.ops.mpo_embedding import mpo_embedding
from mpoe_kernels.ops.mpo_ffn import mpo_ffn
from mpoe_kernels.ops.mpo_linear import grouped_mpo_linear, mpo_linear
from mpoe_kernels.ops.routing import Routing, combine, dispatch, route

__all__ = [
    "Routing",
    "combine",
    "dispatch",
    "grouped_mpo_linear",
    "mpo_embedding",
    "mpo_ffn",
    "mpo_linear",
    "route",
]
