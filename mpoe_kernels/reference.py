"""The reference: obvious loops in any dtype, including float64. Only tests import it."""

from mpoe_kernels.linear.reference import (
    grouped_mpo_linear_reference,
    mpo_embedding_reference,
    mpo_ffn_reference,
    weight_reference,
)
from mpoe_kernels.routing.reference import combine_reference, dispatch_reference, route_reference

__all__ = [
    "combine_reference",
    "dispatch_reference",
    "grouped_mpo_linear_reference",
    "mpo_embedding_reference",
    "mpo_ffn_reference",
    "route_reference",
    "weight_reference",
]
