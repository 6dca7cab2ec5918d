"""Tensor parallelism of experts on the hidden side: every rank computes a part of the hidden units' groups.

The dense projections are split by PyTorch's own styles, the up projections by columns and the down projection by rows;
the blocks go with their groups. What a rank holds of a group needs nothing of the others, so that the layer's only
traffic is that of the dense network, and in backward the sums of the gates' gradients and of shared blocks' gradients.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from mpoe.models.hidden import hidden_modules

_STYLES = {"up": ColwiseParallel, "gate_proj": ColwiseParallel, "down": RowwiseParallel}


def split_hidden_experts(model: Any, mesh: DeviceMesh) -> Any:
    """Split every feed-forward network with experts on the hidden side over the ranks of a mesh, in place.

    All ranks call it with the same weights, and give the model the same batches. Projections and blocks become
    DTensors; routers, and what else the model has, stay whole on every rank. Make the optimizer afterwards; one that
    takes both kinds at once needs ``foreach=False``.

    Args:
        model: of `convert_to_mpoe` or `load_mpoe`, with ``MPOEConfig(shape="hidden")``.
        mesh: one-dimensional.

    Returns:
        ``model``.

    Raises:
        ValueError: a mesh of several dimensions; no such network; groups that the ranks do not divide; a projection
            for two kinds, or that is no ``nn.Linear``, which PyTorch's styles need. Nothing has been changed then.
    """
    if mesh.ndim != 1:
        raise ValueError(f"mesh must be one-dimensional; got {mesh.ndim} dimensions")
    layers = hidden_modules(model)
    if not layers:
        raise ValueError('model must have experts on the hidden side (MPOEConfig(shape="hidden")); it has none')
    for name, layer in layers.items():
        groups = layer.hidden_features // layer.experts.block_size
        if groups % mesh.size():
            raise ValueError(f"{name} has {groups} groups of hidden units, which {mesh.size()} ranks do not divide")
        if layer.columns:
            raise ValueError(f"{name}: up and gate_proj share one projection, whose halves the ranks would mix")
        for kind, module in layer.projections().items():
            if not isinstance(module, nn.Linear):
                raise ValueError(f"{name}: its {kind} projection must be an nn.Linear; got {type(module).__name__}")
    for layer in layers.values():
        for kind, module in layer.projections().items():
            parallelize_module(module, mesh, _STYLES[kind]())
        layer.experts.split(mesh)
    return model
