"""Loading and saving: `load_mpoe`, saves with only the MPOE parameters, and taking components from
a checkpoint."""

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from mpoe.config import MPOEConfig
from mpoe.config.checks import check_choice, check_type, quoted, refusing
from mpoe.data.mappings import read_mapping
from mpoe.layers.cores import MPOCores
from mpoe.layers.feed_forward import KeptFeedForward, RoutedFeedForward
from mpoe.models.base import MPOEModelMixin
from mpoe.models.classes import class_named
from mpoe.models.convert import one_at_a_time
from mpoe.models.table import MODEL_TYPES, TABLE
from mpoe.models.walk import modules_of, mpo_modules
from mpoe.models.weight_files import (
    BASE_FILE,
    ONLY_FILE,
    Tensors,
    check_repeats,
    check_shapes,
    declared_shapes,
    read_tensors,
    tensors_hash,
    weight_files,
)


def read_mpoe_config(folder: Path) -> tuple[dict, type[Any]]:
    """``config.json`` of a saved MPOE model, and its class."""
    if not folder.is_dir():
        raise ValueError(f"path must be a folder written by save_pretrained; {folder} is none")
    if not (folder / "config.json").is_file():
        raise ValueError(f"path must hold config.json; {folder} has none")
    values = read_mapping(folder / "config.json", "configuration")
    model_type = values.get("model_type")
    if model_type not in MODEL_TYPES and values.get("mpoe_sites") is None:
        advice = quoted(model_type)
        if str(model_type) in TABLE:
            advice = f"a dense {model_type}: load it with transformers, then convert_to_mpoe"
        raise ValueError(
            f"path must hold a converted model (model_type mpoe_...); {folder / 'config.json'} is "
            f"{advice}"
        )
    names = values.get("architectures")
    texts = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    cls = next((cls for cls in map(class_named, texts) if hasattr(cls, "config_class")), None)
    if cls is None or cls.config_class.model_type != model_type:
        raise ValueError(
            f"architectures in {folder / 'config.json'} must name an MPOE class of {model_type!r}; "
            f"got {quoted(names)}"
        )
    return values, cls


def parsed_mpoe(values: dict, folder: Path) -> MPOEConfig:
    """The ``mpoe`` field of a ``config.json``."""
    invalid = f"{folder / 'config.json'} must hold a valid field 'mpoe'; "
    with refusing(invalid, (KeyError, ValueError, TypeError)):
        return MPOEConfig.from_dict(values["mpoe"])


def _check_ratios(modules: Mapping[str, MPOCores], ratios: Mapping, folder: Path) -> None:
    for name, cores in modules.items():
        if len(ratios.get(name, ())) != len(cores.rate_ratios):
            raise ValueError(
                f"rate_ratios in {folder / 'config.json'} must have one number for every core of "
                f"{name}"
            )


@one_at_a_time()
def load_mpoe(path: str | Path, base: Any = None, **kwargs: Any) -> Any:
    """Load a model saved with ``save_pretrained``, or MPOE parameters saved with `save_mpoe_only`.

    A folder whose weights are damaged or do not match its configuration is refused before memory is
    allocated.

    Args:
        path: folder. Only safetensors and JSON are read.
        base: for MPOE-only saves, the dense model they were made from (or its folder).
        kwargs: passed to ``from_pretrained``, e.g. ``dtype``.

    Returns:
        A model of the saved class, in eval mode.

    Raises:
        TypeError: ``path`` is not a path.
        ValueError: no such folder, a foreign or damaged checkpoint, missing or unexpected
            parameters, a base that is missing or not the one that the save was made from, an option
            that this function sets itself.
    """
    check_type("path", path, (str, os.PathLike), "the folder of a saved model")
    folder = Path(path)
    values, cls = read_mpoe_config(folder)
    is_only = (folder / ONLY_FILE).is_file()
    if base is not None and not is_only:
        raise ValueError(f"base is for MPOE-only saves; {folder} holds a whole model")
    settled = ("config", "state_dict") if is_only else ("use_safetensors",)
    for name in (*settled, "output_loading_info"):
        if name in kwargs:
            raise ValueError(f"{name} is what load_mpoe sets itself: leave it out")
    files = [folder / ONLY_FILE] if is_only else weight_files(folder)
    theirs, digest = _base_of(folder, cls, base) if is_only else ({}, "")
    shapes = declared_shapes(files)
    check_repeats(values, len(shapes) + len(theirs), folder / "config.json")
    ratios = parsed_mpoe(values, folder).rate_ratios
    # Transformers' constructors raise all kinds of errors on unchecked fields
    unfit = f"the JSON files in {folder} do not describe a {cls.__name__} that can be built; "
    with refusing(unfit), torch.device("meta"):
        skeleton = cls(cls.config_class.from_dict(values))
    if is_only:
        _check_ratios(dict(mpo_modules(skeleton)), ratios, folder)
        kwargs["state_dict"] = _joined(skeleton, files, theirs, digest)
        kwargs["config"] = cls.config_class.from_dict(values)
    else:
        check_shapes(skeleton, shapes, folder)
        declared_shapes(files, skeleton)
        kwargs["use_safetensors"] = True
    with refusing(unfit):
        source = None if is_only else folder
        model, info = cls.from_pretrained(source, output_loading_info=True, **kwargs)
    labels = {"missing": "missing", "unexpected": "unexpected", "mismatched": "of another shape"}
    problems = [
        f"{label}: {', '.join(map(str, sorted(info[f'{kind}_keys'])[:5]))}"
        for kind, label in labels.items()
        if info.get(f"{kind}_keys")
    ]
    if problems:
        raise ValueError(
            f"the weights in {folder} must match its config.json; {'; '.join(problems)}"
        )
    return model


# ------------------------------------------------------------- MPOE-only saves


def _is_mpoe(name: str) -> bool:
    parts = name.split(".")
    return "experts" in parts or "router" in parts or "cores" in parts


def save_mpoe_only(model: Any, path: str | Path, base: Any) -> None:
    """Save only routers, experts and MPO cores, with a hash that identifies the dense model that
    holds the rest.

    Args:
        model: an MPOE model whose other parameters are still the base's.
        path: folder to write; ``config.json``, the parameters and a hash of the base's share.
        base: the dense model, or its folder.

    Raises:
        TypeError: a model that is not an MPOE model, a path of another type.
        ValueError: a model without weights, parameters outside the MPOE modules that differ from
            the base (save with save_pretrained then), a folder that holds a whole model.
        NotADirectoryError: ``path`` is a file, or a link that does not lead to a folder.
    """
    check_type("model", model, MPOEModelMixin, "an MPOE model (see convert_to_mpoe)")
    check_type("path", path, (str, os.PathLike), "a folder's path")
    state = model.state_dict()
    if any(value.is_meta for value in state.values()):
        raise ValueError("model must hold weights; it is on the device meta, without any")
    dense, name = _base_model(base, type(model))
    theirs = dense.state_dict()
    rest = {n: value for n, value in state.items() if not _is_mpoe(n)}
    differing = [
        n
        for n, value in rest.items()
        if n not in theirs or not torch.equal(value.cpu(), theirs[n].cpu())
    ]
    if differing:
        raise ValueError(
            f"{len(differing)} parameters outside the MPOE modules differ from the base, e.g. "
            f"{', '.join(differing[:3])}; save the whole model with save_pretrained"
        )
    folder = Path(path)
    if "\0" in str(folder) or (not folder.is_dir() and (folder.exists() or folder.is_symlink())):
        raise NotADirectoryError(f"path must be a folder; {str(folder)!r} is none")
    whole = sorted(p.name for p in folder.glob("model*.safetensors*"))
    if whole:
        raise ValueError(f"path must not hold a whole model; {folder} has {', '.join(whole)}")
    model.complete_config()
    model.config.architectures = [type(model).__name__]
    mpoe_tensors = {n: value.contiguous().cpu() for n, value in state.items() if _is_mpoe(n)}
    identity = {"base": name, "class": type(dense).__name__, "sha256": tensors_hash(rest)}
    folder.mkdir(parents=True, exist_ok=True)
    # Moved into place, the config last: an interrupted save leaves nothing that looks like a model.
    with tempfile.TemporaryDirectory(prefix=".incomplete-", dir=folder) as aside:
        staged = Path(aside)
        save_file(mpoe_tensors, staged / ONLY_FILE, metadata={"format": "pt"})
        (staged / BASE_FILE).write_text(json.dumps(identity, indent=2) + "\n", encoding="utf-8")
        model.config.save_pretrained(staged)
        for file in (ONLY_FILE, BASE_FILE, "config.json"):
            os.replace(staged / file, folder / file)


def _base_model(base: Any, cls: type[Any]) -> tuple[PreTrainedModel, str]:
    dense_class = cls.dense_class
    wanted = f"base must be a {dense_class.__name__} or its folder; "
    if isinstance(base, (str, Path)):
        if not str(base) or not Path(base).is_dir():
            raise ValueError(
                f"base must be a dense model or its folder; {str(base)!r} is not a folder"
            )
        # Transformers raises several kinds for a folder that has no model of this class
        with refusing(f"{wanted}{base}: "):
            return dense_class.from_pretrained(base, use_safetensors=True), str(base)
    if type(base) is not dense_class:
        raise ValueError(f"{wanted}got {type(base).__name__}")
    return base, str(getattr(base.config, "_name_or_path", "") or "")


def _base_of(folder: Path, cls: type[Any], base: Any) -> tuple[Tensors, str]:
    """The dense model's parameters, and the hash that an MPOE-only save has of those that it
    needs."""
    if not (folder / BASE_FILE).is_file():
        raise ValueError(f"an MPOE-only save must hold {BASE_FILE}; {folder} has none")
    identity = read_mapping(folder / BASE_FILE, "base's description")
    if base is None:
        raise ValueError(
            f"{folder} holds MPOE parameters only; give the dense model they belong to as base "
            f"(saved from {identity.get('base') or identity.get('class')!r})"
        )
    return _base_model(base, cls)[0].state_dict(), str(identity.get("sha256"))


def _joined(skeleton: nn.Module, files: list[Path], theirs: Tensors, digest: str) -> Tensors:
    """All parameters of an MPOE-only save's model: those in its file, and copies of the base's."""
    wanted = {name: tuple(value.shape) for name, value in skeleton.state_dict().items()}
    mpoe_names = {name for name in wanted if _is_mpoe(name)}
    shapes = declared_shapes(files, skeleton)
    odd = sorted(
        name
        for name in {*shapes, *mpoe_names}
        if name not in mpoe_names or shapes.get(name) != wanted[name]
    )[:5]
    if odd:
        raise ValueError(f"{files[0]} must hold the parameters its config names; differing: {odd}")
    rest = {
        name: theirs[name].clone() for name in wanted if name not in mpoe_names and name in theirs
    }
    if tensors_hash(rest) != digest:
        raise ValueError(
            f"base must be the model that {files[0].parent} was saved from; its weights differ "
            "(SHA-256)"
        )
    return {**rest, **read_tensors(files)}


# ------------------------------------------------------------- components of a model, by the
# original's names


COMPONENTS = ("word_embed", "mlp", "attention", "pooler")
_ALIASES = {"ffn": "mlp", "embedding": "word_embed", "embeddings": "word_embed"}
# Words in a module's name that identify its component; the first component that matches wins
# (BERT's FFN is at `encoder.layer.0.…`, its attention's output at `…attention.output.dense`).
_WORDS = {
    "pooler": ("pooler",),
    "word_embed": ("shared", "embed", "wte", "lm_head"),
    "attention": ("attn", "attention"),
    "mlp": ("experts", "mlp", "feed_forward", "densereludense", "intermediate", "output"),
}


def component_of(name: str) -> str:
    """The component (one of `COMPONENTS`) that a module of this name belongs to."""
    for component, words in _WORDS.items():
        if any(word in name.lower() for word in words):
            return component
    return "mlp"


def parse_components(text: str | None, option: str = "update_mpo_layer") -> tuple[str, ...] | None:
    """'mlp, attention' -> ('mlp', 'attention'); None means all. Raises ValueError on unknown names,
    for ``option``."""
    if text is None:
        return None
    parts = [part.strip().lower() for part in text.split(",") if part.strip()]
    names = dict.fromkeys(_ALIASES.get(part, part) for part in parts)
    for name in names:
        check_choice(option, name, COMPONENTS)
    if not names:
        raise ValueError(
            f"{option} must name at least one of {', '.join(COMPONENTS)}; got {text!r}"
        )
    return tuple(names)


@torch.no_grad()
def load_layers(model: Any, path: str | Path, components: Sequence[str]) -> list[str]:
    """Replace the parameters of ``components`` in ``model`` by those of a checkpoint, dense
    projections that stay too.

    Args:
        model: an MPOE model, changed in place.
        path: folder of a saved MPOE model of the same family, whole or MPOE-only (without dense
            projections).
        components: of word_embed, mlp (experts with their routers), attention and pooler.

    Returns:
        Names of the modules that were loaded.

    Raises:
        TypeError: a model that is not an MPOE model.
        ValueError: no checkpoint there, a component that the model does not have in MPO form,
            parameters that are missing in the checkpoint or of another shape.
    """
    check_type("model", model, MPOEModelMixin, "an MPOE model (see convert_to_mpoe)")
    folder = Path(path)
    cores_of = dict(mpo_modules(model))
    ratios = parsed_mpoe(read_mpoe_config(folder)[0], folder).rate_ratios
    whole = list(modules_of(model, RoutedFeedForward))
    inside = tuple(f"{name}." for name in whole)
    component = {name: component_of(name) for name in cores_of if not name.startswith(inside)}
    component |= dict.fromkeys(whole, "mlp")
    missing = sorted(set(components) - set(component.values()))
    if missing:
        raise ValueError(
            f"components must be in MPO form in the model; {', '.join(missing)} is not"
        )
    names = [name for name, _ in model.named_modules() if component.get(name) in components]
    is_only = (folder / ONLY_FILE).is_file()
    files = [folder / ONLY_FILE] if is_only else weight_files(folder)
    shapes = declared_shapes(files, model)
    parts = [model.get_submodule(name) for name in names]
    for layer in list(parts):
        if isinstance(layer, KeptFeedForward):
            parts += layer.projections().values()
    ids = {id(value) for part in parts for value in part.state_dict(keep_vars=True).values()}
    wanted = {
        key: value
        for key, value in model.state_dict(keep_vars=True).items()
        if id(value) in ids and (_is_mpoe(key) or not is_only)
    }
    for key, parameter in wanted.items():
        if shapes.get(key) != (size := tuple(parameter.shape)):
            raise ValueError(
                f"{folder} must hold {key} {size}, as the model does; it has {shapes.get(key)}"
            )
    changed = {name: cores for name, cores in cores_of.items() if name.startswith(tuple(names))}
    _check_ratios(changed, ratios, folder)
    tensors = read_tensors(files)
    for key, parameter in wanted.items():
        parameter.copy_(tensors[key])
    for name, cores in changed.items():
        cores.rate_ratios = tuple(ratios[name])
    return names
