"""Loading and saving: `load_mpoe`, and saves with only the MPOE parameters."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from mpoe.config import MPOEConfig
from mpoe.models.base import MPOEModelMixin
from mpoe.models.classes import class_named
from mpoe.models.convert import adopt_class, one_at_a_time
from mpoe.models.find import find_sites
from mpoe.models.report import mpo_modules
from mpoe.models.sites import install_empty
from mpoe.models.table import MODEL_TYPES, TABLE
from mpoe.models.weight_files import (
    BASE_FILE,
    ONLY_FILE,
    check_floating,
    check_repeats,
    check_shapes,
    declared_shapes,
    read_json,
    read_tensors,
    tensors_hash,
    weight_files,
)


def read_mpoe_config(folder: Path) -> tuple[dict[str, Any], type[Any]]:
    """``config.json`` of a saved MPOE model, and its class."""
    if not folder.is_dir():
        raise ValueError(f"path must be a folder written by save_pretrained; {folder} is none")
    if not (folder / "config.json").is_file():
        raise ValueError(f"path must hold config.json; {folder} has none")
    values = read_json(folder / "config.json")
    model_type = values.get("model_type")
    if model_type not in MODEL_TYPES and values.get("mpoe_sites") is None:
        is_dense = str(model_type) in TABLE
        advice = f"a dense {model_type}: load it with transformers, then convert_to_mpoe" if is_dense else model_type
        raise ValueError(
            f"path must hold a converted model (model_type mpoe_...); {folder / 'config.json'} is {advice}"
        )
    names = values.get("architectures")
    found = [class_named(name) for name in names if isinstance(name, str)] if isinstance(names, list) else []
    cls = next((cls for cls in found if hasattr(cls, "config_class")), None)
    if cls is None or cls.config_class.model_type != model_type:
        raise ValueError(
            f"architectures in {folder / 'config.json'} must name an MPOE class of {model_type!r}; got {names}"
        )
    return values, cls


def parsed_mpoe(values: dict[str, Any], folder: Path) -> MPOEConfig:
    """The ``mpoe`` field of a ``config.json``."""
    try:
        return MPOEConfig.from_dict(values["mpoe"])
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{folder / 'config.json'} must hold a valid field 'mpoe'; {error}") from error


def _check_whole(folder: Path, values: dict[str, Any], cls: type[Any]) -> None:
    """Refuse a folder whose weights are damaged or do not match its configuration, before memory is allocated."""
    files = weight_files(folder)
    shapes = declared_shapes(files)
    check_repeats(values, shapes, folder / "config.json")
    parsed_mpoe(values, folder)
    with _refusing(folder, cls), torch.device("meta"):
        skeleton = cls(cls.config_class.from_dict(values))
    check_shapes(skeleton, shapes, folder)
    check_floating(skeleton, files)


@contextlib.contextmanager
def _refusing(folder: Path, cls: type[Any]) -> Iterator[None]:
    """Turn any error that Transformers' constructors raise on unchecked fields into a ValueError."""
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"the JSON files in {folder} do not describe a {cls.__name__} that can be built; {error}"
        ) from error


@one_at_a_time
def load_mpoe(path: str | Path, base: Any = None, **kwargs: Any) -> Any:
    """Load a model saved with ``save_pretrained``, or MPOE parameters saved with `save_mpoe_only`.

    Args:
        path: folder. Only safetensors and JSON are read.
        base: for MPOE-only saves, the dense model they were made from (or its folder).
        kwargs: passed to ``from_pretrained``, e.g. ``dtype``; MPOE-only saves take ``dtype`` alone.

    Returns:
        A model of the saved class, in eval mode.

    Raises:
        TypeError: ``path`` is not a path.
        ValueError: no such folder, a foreign or damaged checkpoint, missing or unexpected parameters, a base that is
            missing or not the one that the save was made from.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path must be the folder of a saved model; got {type(path).__name__} {path!r}")
    folder = Path(path)
    values, cls = read_mpoe_config(folder)
    if (folder / ONLY_FILE).is_file():
        unknown = sorted(set(kwargs) - {"dtype"})
        if unknown:
            raise ValueError(f"{folder} holds MPOE parameters only; load_mpoe takes dtype for it, got {unknown}")
        model = _load_only(folder, values, cls, base)
        return model.to(kwargs["dtype"]) if kwargs.get("dtype") is not None else model
    if base is not None:
        raise ValueError(f"base is for MPOE-only saves; {folder} holds a whole model")
    _check_whole(folder, values, cls)
    with _refusing(folder, cls):
        model, info = cls.from_pretrained(folder, use_safetensors=True, output_loading_info=True, **kwargs)
    problems = [
        f"{label}: {', '.join(map(str, sorted(info[key])[:5]))}"
        for key, label in (
            ("missing_keys", "missing"),
            ("unexpected_keys", "unexpected"),
            ("mismatched_keys", "of another shape"),
        )
        if info.get(key)
    ]
    if problems:
        raise ValueError(f"the weights in {folder} must match its config.json; {'; '.join(problems)}")
    return model


# ------------------------------------------------------------- MPOE-only saves


def _is_mpoe(name: str) -> bool:
    parts = name.split(".")
    return "experts" in parts or "router" in parts or "cores" in parts


def _own(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in model.state_dict().items() if _is_mpoe(name)}


def _rest(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in model.state_dict().items() if not _is_mpoe(name)}


def save_mpoe_only(model: Any, path: str | Path, base: Any) -> None:
    """Save only routers and experts, with a hash that identifies the dense model that holds the rest.

    Args:
        model: an MPOE model whose other parameters are still the base's.
        path: folder to write; ``config.json``, the parameters and a hash of the base's share.
        base: the dense model, or its folder.

    Raises:
        TypeError: a model that is not an MPOE model, a path of another type.
        ValueError: parameters outside the MPOE modules that differ from the base (save with save_pretrained then),
            a folder that holds a whole model.
        NotADirectoryError: ``path`` is a file, or a link that does not lead to a folder.
    """
    if not isinstance(model, MPOEModelMixin):
        raise TypeError(f"model must be an MPOE model (see convert_to_mpoe); got {type(model).__name__}")
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path must be a folder's path; got {type(path).__name__}")
    module: Any = model
    dense, name = _base_model(base, type(model))
    theirs = dense.state_dict()
    rest = _rest(module)
    differing = [n for n, value in rest.items() if n not in theirs or not torch.equal(value.cpu(), theirs[n].cpu())]
    if differing:
        raise ValueError(
            f"{len(differing)} parameters outside the MPOE modules differ from the base, e.g. "
            f"{', '.join(differing[:3])}; save the whole model with save_pretrained"
        )
    folder = Path(path)
    if "\0" in str(folder):
        raise ValueError(f"path must be a folder's path; got {str(folder)!r}")
    if not folder.is_dir() and (folder.exists() or folder.is_symlink()):
        raise NotADirectoryError(f"path must be a folder; {folder} is none")
    whole = sorted(p.name for p in folder.glob("model*.safetensors*"))
    if whole:
        raise ValueError(f"path must not hold a whole model; {folder} has {', '.join(whole)}")
    module.write_rate_ratios()
    module.config.architectures = [type(module).__name__]
    own = {n: value.contiguous().cpu() for n, value in _own(module).items()}
    identity = {"base": name, "class": type(dense).__name__, "sha256": tensors_hash(rest)}
    folder.mkdir(parents=True, exist_ok=True)
    # Written elsewhere and moved into place, the config last: an interrupted save leaves nothing that looks like a
    # model.
    with tempfile.TemporaryDirectory(prefix=".incomplete-", dir=folder) as aside:
        staged = Path(aside)
        save_file(own, staged / ONLY_FILE, metadata={"format": "pt"})
        (staged / BASE_FILE).write_text(json.dumps(identity, indent=2) + "\n", encoding="utf-8")
        module.config.save_pretrained(staged)
        for file in (ONLY_FILE, BASE_FILE, "config.json"):
            os.replace(staged / file, folder / file)


def _base_model(base: Any, cls: type[Any]) -> tuple[PreTrainedModel, str]:
    dense_class = cls.dense_class
    if isinstance(base, (str, Path)):
        if not str(base) or not Path(base).is_dir():
            raise ValueError(f"base must be a dense model or its folder; {str(base)!r} is not a folder")
        try:
            return dense_class.from_pretrained(base, use_safetensors=True), str(base)
        except Exception as error:  # Transformers raises several kinds for a folder that has no model of this class
            raise ValueError(f"base must be a {dense_class.__name__} or its folder; {base}: {error}") from error
    if type(base) is not dense_class:
        raise ValueError(f"base must be a {dense_class.__name__} or its folder; got {type(base).__name__}")
    return base, str(getattr(base.config, "_name_or_path", "") or "")


def _load_only(folder: Path, values: dict[str, Any], cls: type[Any], base: Any) -> Any:
    if not (folder / BASE_FILE).is_file():
        raise ValueError(f"an MPOE-only save must hold {BASE_FILE}; {folder} has none")
    identity = read_json(folder / BASE_FILE)
    if base is None:
        raise ValueError(
            f"{folder} holds MPOE parameters only; give the dense model they belong to as base "
            f"(saved from {identity.get('base') or identity.get('class')!r})"
        )
    parsed, files = parsed_mpoe(values, folder), [folder / ONLY_FILE]
    dense, _ = _base_model(base, cls)
    with torch.device("meta"):
        skeleton = type(dense)(dense.config)
    # Without memory: a damaged config may ask for more than is available.
    install_empty(skeleton, find_sites(skeleton, parsed), parsed)
    shapes, expected = declared_shapes(files), {name: tuple(value.shape) for name, value in _own(skeleton).items()}
    if shapes != expected:
        odd = sorted(name for name in {*shapes, *expected} if shapes.get(name) != expected.get(name))[:5]
        raise ValueError(f"{files[0]} must hold the parameters its config names; differing: {odd}")
    check_floating(skeleton, files)
    model = copy.deepcopy(dense)
    install_empty(model, find_sites(model, parsed), parsed)
    if tensors_hash(_rest(model)) != identity.get("sha256"):
        raise ValueError(f"base must be the model that {folder} was saved from; its weights differ (SHA-256)")
    adopt_class(model, cls, parsed)
    model.config.conversion_errors = values.get("conversion_errors")
    for name, cores in mpo_modules(model):
        if len(parsed.rate_ratios.get(name, ())) != len(cores.rate_ratios):
            raise ValueError(f"rate_ratios in {folder / 'config.json'} must have one number for every core of {name}")
        cores.rate_ratios = tuple(parsed.rate_ratios[name])
    model.load_state_dict(read_tensors(files), strict=False)
    return model.eval()
