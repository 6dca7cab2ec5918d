"""Checkpoints of a sharded loop (FSDP2): whole weights and optimizer state, from which any number of ranks can
continue.

Parameters are gathered one at a time, and only the first rank keeps their state; on loading every rank reads its own
shard. Tensors are safetensors, the rest is JSON.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from mpoe.config.checks import check_integer
from mpoe.models.weight_files import declared_shapes, read_json
from mpoe.training import checkpoints
from mpoe.training.sharding import check_sharded, save_sharded

TENSORS, SETTINGS = "optimizer.safetensors", "optimizer.json"


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
        TypeError: a model that is not sharded; a step that is not an integer; an optimizer setting that JSON cannot
            hold.
        ValueError: an optimizer parameter that does not belong to the model.
    """
    check_sharded(model)
    check_integer("step", step, 0)
    staged = checkpoints.staging_root(folder) / f"checkpoint-{step}"
    if dist.get_rank() == 0:
        checkpoints.clean_leftovers(folder)
    save_sharded(model, staged)
    names = _names(model, optimizer)
    groups = [{**group, "params": own} for group, own in zip(optimizer.param_groups, names, strict=True)]
    tensors, numbers = _gathered(optimizer, names)
    settings = json.dumps({"groups": groups, "numbers": numbers}, indent=1, default=_as_number)
    if dist.get_rank() == 0:
        (staged / SETTINGS).write_text(settings, encoding="utf-8")
        save_file(tensors, staged / TENSORS)
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
    if not (folder / SETTINGS).is_file():
        raise ValueError(f"checkpoint must be a whole folder written by save_sharded_checkpoint; got {folder}")
    checkpoints.check_whole(folder)
    try:
        optimizer.load_state_dict(_read(folder, model, optimizer))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder} must hold an optimizer's state of save_sharded_checkpoint; {error!r}") from error
    return step


def _read(folder: Path, model: Any, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A state dict of ``optimizer``, with this rank's part of every tensor."""
    saved, names = read_json(folder / SETTINGS), _names(model, optimizer)
    if [group["params"] for group in saved["groups"]] != names:
        raise ValueError(f"optimizer must have the groups of parameters that {folder / SETTINGS} lists; they differ")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbered = {name: number for number, name in enumerate(name for group in names for name in group)}
    state: dict[int, dict[str, Any]] = {}
    for name, values in saved["numbers"].items():
        state.setdefault(numbered[name], {}).update(values)
    with safe_open(folder / TENSORS, framework="pt") as file:
        for key, shape in declared_shapes([folder / TENSORS]).items():
            name, _, value = key.rpartition(":")
            parameter = parameters[numbered[name]]
            if shape not in ((), tuple(parameter.shape)):
                raise ValueError(f"{key} in {folder / TENSORS} must have the shape of its parameter; got {list(shape)}")
            whole = file.get_tensor(key)
            if isinstance(parameter, DTensor) and whole.shape == parameter.shape:  # not a step count
                here, mesh = whole.to(parameter.device), parameter.device_mesh
                whole = distribute_tensor(here, mesh, parameter.placements, src_data_rank=None)
            state.setdefault(numbered[name], {})[value] = whole
    groups: list[dict[str, Any]] = optimizer.state_dict()["param_groups"]
    for group, values in zip(groups, saved["groups"], strict=True):
        group |= {name: _setting(group.get(name), value) for name, value in values.items() if name != "params"}
    return {"state": state, "param_groups": groups}


def _names(model: Any, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    """Names of the parameters in every group."""
    known = {parameter: name for name, parameter in model.named_parameters()}
    try:
        return [[known[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
    except KeyError:
        raise ValueError("optimizer must be over the parameters of model alone; make it after shard_model") from None


def _gathered(
    optimizer: torch.optim.Optimizer, names: list[list[str]]
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """All state, in the same order on every rank: whole tensors on the CPU (only on the first rank), and values that
    are not tensors."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, dict[str, Any]] = {}
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    for name, parameter in zip((name for group in names for name in group), parameters, strict=True):
        # A parameter that has not been trained yet, such as a masked central core, has no state.
        for key, value in sorted(optimizer.state.get(parameter, {}).items()):
            whole = value.full_tensor() if isinstance(value, DTensor) else value  # all ranks take part
            if not isinstance(whole, Tensor):
                numbers.setdefault(name, {})[key] = whole
            elif dist.get_rank() == 0:
                tensors[f"{name}:{key}"] = whole.detach().contiguous().cpu().clone()
    return tensors, numbers


def _as_number(value: Any) -> Any:
    """For JSON: an optimizer may keep its rate in a tensor."""
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    raise TypeError(f"settings of optimizer must be numbers, texts or lists of them; got {type(value).__name__}")


def _setting(now: Any, saved: Any) -> Any:
    """Convert a value from JSON to the optimizer's current type: JSON has neither tuples nor tensors."""
    if isinstance(now, Tensor):
        return torch.full_like(now, saved)
    return tuple(saved) if isinstance(saved, list) else saved
