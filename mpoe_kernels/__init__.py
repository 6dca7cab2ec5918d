"""Kernels of parameter-efficient mixtures of experts: MPO algebra, plans, routing and grouped MPO
products."""

from mpoe_kernels.backends import BackendError, available_backends, backend_reasons
from mpoe_kernels.contract import ContractionPlan, plan_contraction
from mpoe_kernels.define import use_backend
from mpoe_kernels.embedding.op import mpo_embedding
from mpoe_kernels.experts import hidden_experts, neuron_experts
from mpoe_kernels.linear.ffn import mpo_ffn
from mpoe_kernels.linear.op import grouped_mpo_linear, mpo_linear
from mpoe_kernels.mpo import (
    Decomposition,
    MPOBlocks,
    MPOShape,
    decompose,
    decompose_with_errors,
    expert_weights,
    fold,
    reconstruct,
)
from mpoe_kernels.routing.op import Routing, combine, dispatch, route
from mpoe_kernels.version import __version__

__all__ = [
    "BackendError",
    "ContractionPlan",
    "Decomposition",
    "MPOBlocks",
    "MPOShape",
    "Routing",
    "__version__",
    "available_backends",
    "backend_reasons",
    "combine",
    "decompose",
    "decompose_with_errors",
    "dispatch",
    "expert_weights",
    "fold",
    "grouped_mpo_linear",
    "hidden_experts",
    "mpo_embedding",
    "mpo_ffn",
    "mpo_linear",
    "neuron_experts",
    "plan_contraction",
    "reconstruct",
    "route",
    "use_backend",
]
