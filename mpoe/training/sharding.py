"""FSDP2 in a plain loop: every device keeps a shard of every parameter, gradient and optimizer state.

`torch.distributed.fsdp.fully_shard` makes every transformer block a unit: its parameters are gathered just before it
runs and freed after it. The rest (embeddings, last norm, head) is another unit. Cores ``[E, d, i, j, d']`` are sharded
along their first axis; kernels see whole cores, because they run inside a gathered block.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from mpoe.layers.router import TopKRouter
from mpoe.models.base import MPOEModelMixin


def shard_model(model: Any, mesh: DeviceMesh | None = None, dtype: torch.dtype | None = None) -> Any:
    """Shard an MPOE model in place over the ranks of a process group; every rank must call it.

    Create the optimizer and bind a `GradientMask` afterwards, because parameters are replaced. All ranks start from the
    first rank's weights, as under DDP. Gradients are averaged over the ranks.

    Args:
        model: from `convert_to_mpoe` or `load_mpoe`, on its device, in the parameters' dtype (float32 for training).
        mesh: one-dimensional; default: all ranks.
        dtype: dtype in which parameters are gathered and computed, e.g. bfloat16; gradients are reduced in float32,
            routers are unchanged. Default: the parameters' dtype.

    Returns:
        ``model``.

    Raises:
        TypeError: a model that is not an MPOE model.
        ValueError: a model that is already sharded.
        RuntimeError: there is no process group (start with torchrun and call `torch.distributed.init_process_group`).
    """
    if not isinstance(model, MPOEModelMixin):
        raise TypeError(f"model must be an MPOE model (see convert_to_mpoe); got {type(model).__name__}")
    if isinstance(model, FSDPModule):
        raise ValueError("model must not be sharded already; it is")
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError("shard_model needs a process group: start with torchrun, call init_process_group first")
    module: Any = model
    group = None if mesh is None else mesh.get_group()
    with torch.no_grad():
        for tensor in itertools.chain(module.parameters(), module.buffers()):
            dist.broadcast(tensor.detach(), group=group, group_src=0)
    options: dict[str, Any] = {} if mesh is None else {"mesh": mesh}
    if dtype is not None:
        for router in [part for part in module.modules() if isinstance(part, TopKRouter)]:
            fully_shard(router, **options)
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for block in list(_blocks(module)):
        fully_shard(block, **options)
    return fully_shard(module, **options)


def check_sharded(model: object) -> None:
    """Raise TypeError unless `shard_model` has sharded ``model``."""
    if not isinstance(model, FSDPModule):
        raise TypeError(f"model must be sharded by shard_model; got a plain {type(model).__name__}")


def _blocks(model: Any) -> Iterator[nn.Module]:
    """The transformer blocks: modules in module lists that Transformers itself never splits."""
    names = set(model._no_split_modules)
    for holder in model.modules():
        if isinstance(holder, nn.ModuleList):
            yield from (block for block in holder if type(block).__name__ in names)


def save_sharded(model: Any, folder: str | Path) -> None:
    """Gather a sharded model in the first rank's memory and save it; `load_mpoe` reads it. All ranks call it.

    To continue training later, use `mpoe.training.save_sharded_checkpoint`, which also saves the optimizer state.

    Raises:
        TypeError: a model that `shard_model` has not sharded.
    """
    check_sharded(model)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)  # the other ranks get an empty state dict
    module: Any = model
    state = get_model_state_dict(module, options=options)
    if dist.get_rank() == 0:
        module.save_pretrained(folder, state_dict=state)
    dist.barrier()
