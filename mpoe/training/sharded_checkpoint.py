"""Checkpoints of a sharded loop (FSDP2): whole weights and optimizer state, from which any number of ranks can
continue.

Parameters are gathered one at a time, and only the first rank keeps their state; on loading every rank reads its own
shard. (`torch.distributed.checkpoint` would give parameters that were never trained, such as masked central cores, a
state on loading, and with it another bias correction of Adam's.)
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from mpoe.config.checks import check_integer
from mpoe.training import checkpoints
from mpoe.training.sharding import check_sharded, save_sharded

OPTIMIZER = "optimizer.pt"
_SETTINGS = (bool, int, float, str, list, tuple, Tensor, type(None))  # that `torch.load` reads with weights_only


def save_sharded_checkpoint(
    model: Any, optimizer: torch.optim.Optimizer, folder: str | Path, step: int, limit: int | None = None
) -> Path:
    """Write ``folder/checkpoint-STEP``, complete or not at all; all ranks call it.

    `mpoe.training.find_last_checkpoint` finds it again, `load_mpoe` reads the weights and `load_sharded_optimizer` the
    rest. The loop's random state is not saved: seed it by the step, as `GradientMask` does.

    Args:
        model: sharded by `shard_model`.
        optimizer: over its parameters, between steps: gradients are not saved.
        folder: the run's folder, which every rank can read.
        step: number of optimizer steps taken.
        limit: how many checkpoints to keep; default: all.

    Returns:
        The checkpoint's folder.

    Raises:
        TypeError: a model that is not sharded; a step that is not an integer; an optimizer setting that is neither a
            number nor a text, tensor or list.
        ValueError: an optimizer parameter that does not belong to the model.
    """
    check_sharded(model)
    check_integer("step", step, 0)
    staged = checkpoints.staging_root(folder) / f"checkpoint-{step}"
    if dist.get_rank() == 0:
        checkpoints.clean_leftovers(folder)
    save_sharded(model, staged)
    groups, states = _whole(model, optimizer)
    if dist.get_rank() == 0:
        torch.save({"groups": groups, "states": states}, staged / OPTIMIZER)
        checkpoints.publish(staged, folder)
        checkpoints.staging_root(folder).rmdir()
        checkpoints.rotate(folder, limit)
    dist.barrier()
    return Path(folder) / staged.name


def load_sharded_optimizer(model: Any, optimizer: torch.optim.Optimizer, checkpoint: str | Path) -> int:
    """Load an optimizer's state from a checkpoint of `save_sharded_checkpoint`; all ranks call it.

    Args:
        model: ``load_mpoe(checkpoint)``, then sharded by `shard_model`; over any number of ranks.
        optimizer: a new one, over its parameters in the same groups.
        checkpoint: the checkpoint's folder.

    Returns:
        Number of optimizer steps taken.

    Raises:
        ValueError: a checkpoint that is damaged, incomplete or without optimizer state, or parameters that differ.
    """
    if not isinstance(checkpoint, (str, os.PathLike)):
        raise TypeError(f"checkpoint must be the folder of one; got {type(checkpoint).__name__} {checkpoint!r}")
    folder = Path(checkpoint)
    step = checkpoints.step_of(folder)
    if not (folder / OPTIMIZER).is_file():
        raise ValueError(f"checkpoint must be a whole folder written by save_sharded_checkpoint; got {folder}")
    checkpoints.check_whole(folder)
    with checkpoints.reading(folder):
        saved = torch.load(folder / OPTIMIZER, weights_only=True, mmap=True)
        groups, states = list(saved["groups"]), dict(saved["states"])
    names = _names(model, optimizer)
    if [group["params"] for group in groups] != names:
        raise ValueError(f"optimizer must have the groups of parameters of {folder / OPTIMIZER}; they differ")
    state: dict[int, dict[str, Any]] = {}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, name in enumerate(name for group in names for name in group):
        if name in states:
            values = states[name].items()
            state[number] = {key: _like(parameters[number], value, f"{name}:{key}") for key, value in values}
    numbers = [group["params"] for group in optimizer.state_dict()["param_groups"]]
    groups = [{**group, "params": own} for group, own in zip(groups, numbers, strict=True)]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    return step


def _names(model: Any, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    """Names of the parameters in every group."""
    known = {parameter: name for name, parameter in model.named_parameters()}
    try:
        return [[known[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
    except KeyError:
        raise ValueError("optimizer must be over the parameters of model alone; make it after shard_model") from None


def _whole(model: Any, optimizer: torch.optim.Optimizer) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """The groups with the names of their parameters, and by name the parameters' state: on the first rank whole tensors
    on the CPU, on the others none."""
    first = dist.get_rank() == 0
    groups: list[dict[str, Any]] = []
    states: dict[str, dict[str, Any]] = {}
    for group, names in zip(optimizer.param_groups, _names(model, optimizer), strict=True):
        groups.append({**group, "params": names})
        odd = next((value for value in group.values() if not isinstance(value, _SETTINGS)), None)
        if odd is not None:
            raise TypeError(
                f"settings of optimizer must be numbers, texts, tensors or lists of them; got {type(odd).__name__}"
            )
        for name, parameter in zip(names, group["params"], strict=True):
            # A parameter that has not been trained yet, such as a masked central core, has no state.
            for key, value in sorted(optimizer.state.get(parameter, {}).items()):
                whole = value.full_tensor() if isinstance(value, DTensor) else value  # all ranks take part
                if first:
                    states.setdefault(name, {})[key] = whole.detach().cpu() if isinstance(whole, Tensor) else whole
    return groups, states


def _like(parameter: Tensor, whole: Any, what: str) -> Any:
    """``whole`` sharded like its parameter; a step count is unchanged."""
    if not isinstance(whole, Tensor) or not whole.shape:
        return whole
    if whole.shape != parameter.shape:
        raise ValueError(
            f"{what} must have the shape of its parameter, {list(parameter.shape)}; got {list(whole.shape)}"
        )
    if not isinstance(parameter, DTensor):
        return whole
    here = whole.to(parameter.device)
    return distribute_tensor(here, parameter.device_mesh, parameter.placements, src_data_rank=None)
