"""Tensor parallelism for experts on the hidden side: every rank computes some of the groups of hidden units.

The dense projections are split with PyTorch's own styles, up projections by columns and the down projection by rows;
the blocks are split with their groups. Groups are independent, so the layer's only communication is that of the dense
network and, in the backward, the sums of the gates' and shared blocks' gradients.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from mpoe.models.kept import hidden_modules

_STYLES = {"up": ColwiseParallel, "gate_proj": ColwiseParallel, "down": RowwiseParallel}


def split_hidden_experts(model: Any, mesh: DeviceMesh) -> Any:
    """Split every feed-forward network with experts on the hidden side over the ranks of a mesh, in place.

    All ranks must call it with the same weights and pass the same batches to the model. Projections and blocks become
    DTensors; routers and all other parameters are replicated. Create the optimizer afterwards; one with both kinds of
    parameters needs ``foreach=False``.

    Args:
        model: from `convert_to_mpoe` or `load_mpoe`, with ``MPOEConfig(shape="hidden")``.
        mesh: one-dimensional.

    Returns:
        ``model``.

    Raises:
        ValueError: a mesh of several dimensions; no such network; a number of groups that is not divisible by the
            number of ranks; a fused projection, or one that is not an ``nn.Linear``, which PyTorch's styles need. The
            model is then unchanged.
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
