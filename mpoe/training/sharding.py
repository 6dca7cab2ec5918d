"""FSDP2 in a plain loop: every device keeps a shard of every parameter, gradient and optimizer
state.

`torch.distributed.fsdp.fully_shard` makes every transformer block a unit: its parameters are
gathered just before it runs and freed after it. The rest (embeddings, last norm, head) is another
unit. Cores ``[E, d, i, j, d']`` are sharded along their first axis; kernels see whole cores,
because they run inside a gathered block.

Checkpoints hold whole weights and optimizer state, from which any number of ranks can continue:
parameters are gathered one at a time, and only the first rank keeps their state; on loading every
rank reads its own shard.
"""

import itertools
import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from mpoe.config.checks import check_integer, check_type
from mpoe.layers.router import TopKRouter
from mpoe.models.base import MPOEModelMixin
from mpoe.models.walk import modules_of
from mpoe.training import checkpoints


def shard_model(
    model: Any, mesh: DeviceMesh | None = None, dtype: torch.dtype | None = None
) -> Any:
    """Shard an MPOE model in place over the ranks of a process group; every rank must call it.

    Create the optimizer and bind a `GradientMask` afterwards, because parameters are replaced. All
    ranks start from the first rank's weights, as under DDP. Gradients are averaged over the ranks.

    Args:
        model: from `convert_to_mpoe` or `load_mpoe`, on its device, in the parameters' dtype
            (float32 for training).
        mesh: one-dimensional; default: all ranks.
        dtype: dtype in which parameters are gathered and computed, e.g. bfloat16; gradients are
            reduced in float32, routers are unchanged. Default: the parameters' dtype.

    Returns:
        ``model``.

    Raises:
        TypeError: a model that is not an MPOE model.
        ValueError: a model that is already sharded.
        RuntimeError: there is no process group (start with torchrun and call
            `torch.distributed.init_process_group`).
    """
    check_type("model", model, MPOEModelMixin, "an MPOE model (see convert_to_mpoe)")
    if isinstance(model, FSDPModule):
        raise ValueError("model must not be sharded already; it is")
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "shard_model needs a process group: start with torchrun, call init_process_group first"
        )
    group = None if mesh is None else mesh.get_group()
    with torch.no_grad():
        for tensor in itertools.chain(model.parameters(), model.buffers()):
            dist.broadcast(tensor.detach(), group=group, group_src=0)
    options: dict = {} if mesh is None else {"mesh": mesh}
    if dtype is not None:
        for router in modules_of(model, TopKRouter).values():
            fully_shard(router, **options)
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    names = model._no_split_modules or ()  # the transformer blocks, which Transformers never splits
    for holder in modules_of(model, nn.ModuleList).values():
        for block in holder:
            if type(block).__name__ in names:
                fully_shard(block, **options)
    return fully_shard(model, **options)


def check_sharded(model: Any) -> None:
    """Raise TypeError unless `shard_model` has sharded ``model``."""
    if not isinstance(model, FSDPModule):
        raise TypeError(f"model must be sharded by shard_model; got a plain {type(model).__name__}")


def save_sharded(model: Any, folder: str | Path) -> None:
    """Gather a sharded model in the first rank's memory and save it; `load_mpoe` reads it. All
    ranks call it.

    To continue training later, use `mpoe.training.save_sharded_checkpoint`, which also saves the
    optimizer state.

    Raises:
        TypeError: a model that `shard_model` has not sharded.
    """
    check_sharded(model)
    # the other ranks get an empty state dict
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    if dist.get_rank() == 0:
        model.save_pretrained(folder, state_dict=state)
    dist.barrier()


OPTIMIZER = "optimizer.safetensors"


def save_sharded_checkpoint(
    model: Any,
    optimizer: torch.optim.Optimizer,
    folder: str | Path,
    step: int,
    limit: int | None = None,
) -> Path:
    """Write ``folder/checkpoint-STEP``, complete or not at all; all ranks call it.

    `mpoe.training.find_last_checkpoint` finds it again, `load_mpoe` reads the weights and
    `load_sharded_optimizer` the rest. The loop's random state is not saved: seed it by the step, as
    `GradientMask` does.

    Args:
        model: sharded by `shard_model`.
        optimizer: over its parameters, between steps: gradients are not saved.
        folder: the run's folder, which every rank can read.
        step: number of optimizer steps taken.
        limit: how many checkpoints to keep; default: all.

    Returns:
        The checkpoint's folder.

    Raises:
        TypeError: a model that is not sharded; a step that is not an integer; an optimizer setting
            that JSON cannot hold.
        ValueError: an optimizer parameter that does not belong to the model.
    """
    check_sharded(model)
    check_integer("step", step, 0)
    staged = checkpoints.staging_root(folder) / f"checkpoint-{step}"
    first = dist.get_rank() == 0
    if first:
        checkpoints.clean_leftovers(folder)
    save_sharded(model, staged)
    named = _named_groups(model, optimizer)
    pairs = zip(optimizer.param_groups, named, strict=True)
    groups = [{**group, "params": list(names)} for group, names in pairs]
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, dict] = {}  # what an optimizer keeps that is no tensor
    for name, parameter in itertools.chain.from_iterable(group.items() for group in named):
        # A parameter that has not been trained yet, such as a masked central core, has no state.
        for key, value in sorted(optimizer.state.get(parameter, {}).items()):
            # all ranks take part
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            if not isinstance(whole, Tensor):
                numbers.setdefault(name, {})[key] = whole
            elif first:
                tensors[f"{name}:{key}"] = whole.contiguous().cpu().clone()
    settings = {"groups": json.dumps(groups, default=_as_number), "numbers": json.dumps(numbers)}
    if first:
        save_file(tensors, staged / OPTIMIZER, metadata=settings)
        checkpoints.publish(staged, folder)
        checkpoints.staging_root(folder).rmdir()
        checkpoints.rotate(folder, limit)
    dist.barrier()
    return Path(folder) / staged.name


def load_sharded_optimizer(
    model: Any, optimizer: torch.optim.Optimizer, checkpoint: str | Path
) -> int:
    """Load an optimizer's state from a checkpoint of `save_sharded_checkpoint`; all ranks call it.

    Args:
        model: ``load_mpoe(checkpoint)``, then sharded by `shard_model`; over any number of ranks.
        optimizer: a new one, over its parameters in the same groups.
        checkpoint: the checkpoint's folder.

    Returns:
        Number of optimizer steps taken.

    Raises:
        TypeError: what is no path.
        ValueError: a checkpoint that is damaged, incomplete or without optimizer state, or
            parameters that differ.
    """
    check_type("checkpoint", checkpoint, (str, os.PathLike), "the folder of one")
    folder = Path(checkpoint)
    step = checkpoints.step_of(folder)
    if not (folder / OPTIMIZER).is_file():
        raise ValueError(
            f"checkpoint must be a whole folder written by save_sharded_checkpoint; got {folder}"
        )
    checkpoints.check_whole(folder)
    with checkpoints.reading(folder), safe_open(folder / OPTIMIZER, framework="pt") as file:
        groups, states = (
            json.loads((file.metadata() or {})[what]) for what in ("groups", "numbers")
        )
        for name, _, key in (whole.rpartition(":") for whole in file.keys()):  # noqa: SIM118
            states.setdefault(name, {})[key] = file.get_tensor(f"{name}:{key}")
    named = _named_groups(model, optimizer)
    if [group["params"] for group in groups] != list(map(list, named)):
        raise ValueError(
            f"optimizer must have the groups of parameters that {folder / OPTIMIZER} lists; they "
            "differ"
        )
    state: dict[int, dict] = {}
    for number, (name, parameter) in enumerate(
        itertools.chain.from_iterable(group.items() for group in named)
    ):
        for key, value in states.get(name, {}).items():
            is_like = isinstance(value, Tensor) and value.dim() > 0  # not a count of steps
            if is_like and value.shape != parameter.shape:
                raise ValueError(
                    f"{name}:{key} in {folder} must have the shape of its parameter; got "
                    f"{list(value.shape)}"
                )
            if is_like and isinstance(parameter, DTensor):
                value = distribute_tensor(
                    value.to(parameter.device),
                    parameter.device_mesh,
                    parameter.placements,
                    src_data_rank=None,
                )
            state.setdefault(number, {})[key] = value
    numbered = optimizer.state_dict()["param_groups"]
    for now, then in zip(numbered, groups, strict=True):
        now |= {
            name: _setting(now.get(name), value) for name, value in then.items() if name != "params"
        }
    optimizer.load_state_dict({"state": state, "param_groups": numbered})
    return step


def _named_groups(model: Any, optimizer: torch.optim.Optimizer) -> list[dict[str, Tensor]]:
    """The optimizer's parameters by name, of every group, in its order."""
    known = {parameter: name for name, parameter in model.named_parameters()}
    try:
        return [
            {known[parameter]: parameter for parameter in group["params"]}
            for group in optimizer.param_groups
        ]
    except KeyError:
        raise ValueError(
            "optimizer must be over the parameters of model alone; make it after shard_model"
        ) from None


def _as_number(value: Any) -> Any:
    """For JSON: an optimizer may keep its rate in a tensor."""
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    raise TypeError(
        f"settings of optimizer must be numbers, texts or lists of them; got {type(value).__name__}"
    )


def _setting(now: Any, saved: Any) -> Any:
    """Convert a value from JSON to the optimizer's current type: JSON has neither tuples nor
    tensors."""
    if isinstance(now, Tensor):
        return torch.full_like(now, saved)
    return tuple(saved) if isinstance(saved, list) else saved
