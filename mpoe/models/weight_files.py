"""Checks what a checkpoint's safetensors files declare, before any tensor is read or any memory is
allocated.

A checkpoint may come from anywhere. Only the files that its own folder names are opened, and the
sizes they declare are compared with what its configuration describes before a model of that size is
built.
"""

import hashlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed

from mpoe.config.checks import is_file_name, quoted, refusing
from mpoe.data.mappings import read_mapping

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# of a save that holds MPOE parameters only (see `mpoe.models.checkpoint`)
ONLY_FILE = "mpoe_only.safetensors"
BASE_FILE = "mpoe_base.json"
# An absent parameter is reported by name later; a configuration of a far larger model is refused at
# once.
_SLACK = 1 << 20
# Fields of Transformers' configurations that say how often a module is repeated.
_REPEATS = ("num_layers", "num_decoder_layers", "n_layer", "num_hidden_layers")

_UNREADABLE = (SafetensorError, OSError, ValueError, TypeError, RuntimeError)
Shapes = dict[str, tuple[int, ...]]
Tensors = dict[str, Tensor]


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text under a temporary name (a rank's own; a killed run's is taken over), sync
    it, rename it."""
    is_parallel = distributed.is_available() and distributed.is_initialized()
    rank = distributed.get_rank() if is_parallel else 0
    scratch = path.with_name(f".incomplete-{rank}-{path.name}")
    with scratch.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)


def write_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a file of safetensors as a whole or not at all."""
    with tempfile.TemporaryDirectory(prefix=".incomplete-", dir=file.parent) as aside:
        staged = Path(aside) / file.name
        save_file({name: value.contiguous() for name, value in tensors.items()}, staged, metadata)
        os.replace(staged, file)


def first_line(error: Exception) -> str:
    """The message of an error, without the long advice that torch adds; its type if it has no
    message."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def weight_files(folder: Path) -> list[Path]:
    """``model.safetensors`` of a folder, or the shards that its index names.

    Raises:
        ValueError: neither is there, the index is malformed, or it names a file outside the folder
            or an absent one.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = folder / INDEX
    if not index.is_file():
        raise ValueError(f"path must hold {WEIGHTS} or {INDEX}; {folder} has neither")
    shards = read_mapping(index, "index").get("weight_map")
    are_names = isinstance(shards, dict) and all(isinstance(n, str) for n in shards.values())
    if not shards or not are_names:
        raise ValueError(f"weight_map in {index} must map names of parameters to names of files")
    names = sorted(set(shards.values()))
    for name in names:
        if not is_file_name(name):
            raise ValueError(f"{index} must name files of its own folder; got {name!r}")
        if not (folder / name).is_file():
            raise ValueError(f"{index} names {name}; {folder} has no such file")
    return [folder / name for name in names]


def check_links(folder: Path) -> None:
    """Refuse a folder in which a link leads out of it: nothing from elsewhere shall get into an
    output. A snapshot in the hub's cache may lead to the blobs beside it.

    Raises:
        ValueError: that names the link.
    """
    for path in folder.rglob("*"):
        check_link(path, folder)


def check_link(path: Path, folder: Path) -> None:
    """As `check_links`, of one file in ``folder``."""
    if not path.is_symlink():
        return
    real = folder.resolve()
    blobs = real.parents[1] / "blobs" if real.parent.name == "snapshots" else real
    target = Path(os.path.realpath(path))
    if not (target.is_relative_to(real) or target.is_relative_to(blobs)):
        raise ValueError(
            f"{path} must not be a link that leads out of its folder; put the file itself there"
        )


def check_weight_files(folder: Path, model: Any = None) -> None:
    """Refuse damaged safetensors files, an index that names files elsewhere, and integers where
    ``model`` has none (ValueError); other files are not opened."""
    if (folder / WEIGHTS).is_file() or (folder / INDEX).is_file():
        declared_shapes(weight_files(folder), model)


def declared_shapes(files: Sequence[Path], model: Any = None) -> Shapes:
    """Shapes by name from the headers of safetensors files; no tensor is read.

    Raises:
        ValueError: a file that is not a safetensors file, is truncated, or whose header contradicts
            its length; one that declares integers where ``model`` has floating-point parameters, as
            they would become weights.
    """
    state = {} if model is None else model.state_dict()
    floating = {name for name, value in state.items() if value.is_floating_point()}
    shapes: Shapes = {}
    for file in files:
        dtypes: dict[str, str] = {}
        with (
            refusing(f"{file} must be a whole safetensors file; ", _UNREADABLE),
            safe_open(file, framework="np") as opened,  # torch would reserve the file in memory
        ):
            for name in opened.keys():  # noqa: SIM118
                part = opened.get_slice(name)
                shapes[name] = tuple(part.get_shape())
                dtypes[name] = str(part.get_dtype())
        for name in sorted(floating & dtypes.keys()):
            if not dtypes[name].startswith(("F", "BF")):
                raise ValueError(
                    f"{name} must hold floating-point numbers; the header of {file} says "
                    f"{dtypes[name]}"
                )
    return shapes


def read_tensors(files: Sequence[Path]) -> Tensors:
    """All tensors of safetensors files, by name.

    Raises:
        ValueError: as `declared_shapes`.
    """
    declared_shapes(files)
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def read_with_metadata(file: Path) -> tuple[Tensors, dict[str, str]]:
    """The tensors of a safetensors file by name, and its metadata; ValueError as
    `declared_shapes`."""
    declared_shapes([file])
    # opened once: another process may replace the file
    with safe_open(file, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        return tensors, opened.metadata() or {}


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in order of names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().contiguous().cpu()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_repeats(values: Mapping[str, Any], tensors: int, file: Path) -> None:
    """Refuse a configuration with more layers than its weights have tensors (ValueError)."""
    for name in _REPEATS:
        count = values.get(name)
        if isinstance(count, int) and count > tensors:
            raise ValueError(
                f"{name} in {file} must fit the weights beside it, {tensors} tensors; got "
                f"{quoted(count)}"
            )


def check_shapes(model: Any, shapes: Shapes, folder: Path) -> None:
    """Compare a model without memory (on the device ``meta``) with what its weight files declare.

    Raises:
        ValueError: a parameter of another shape, or a model that is far larger than its weights.
    """
    held = 0
    for name, value in model.state_dict().items():
        if name not in shapes:
            continue
        if tuple(value.shape) != shapes[name]:
            raise ValueError(
                f"{name} must be of the shape {list(value.shape)} that {folder / 'config.json'} "
                f"describes; the weights have {list(shapes[name])}"
            )
        held += value.numel()
    described = sum(parameter.numel() for parameter in model.parameters())  # tied ones once
    if described > 2 * held + _SLACK:
        raise ValueError(
            f"weights in {folder} must match its config.json; it describes {described:,} numbers, "
            f"they hold {held:,}"
        )
