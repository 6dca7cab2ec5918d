"""Checkpoints that were cut, changed, swapped or made to harm, and what loading them must say."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

HEADER = 8  # bytes of the header's length


@dataclass(frozen=True)
class Damage:
    """``spoil`` changes a saved model's folder; `load_mpoe` must refuse it with a message that matches ``message``."""

    name: str
    spoil: Callable[[Path], None]
    message: str


class Evil:
    """What a pickle would run: it leaves a mark in the folder where it was unpickled."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch pwned",)


def weights(folder: Path) -> Path:
    return folder / "model.safetensors"


def cut_weights(folder: Path) -> None:
    os.truncate(weights(folder), weights(folder).stat().st_size // 2)


def empty_weights(folder: Path) -> None:
    weights(folder).write_bytes(b"")


def flip_in_header(folder: Path) -> None:
    data = bytearray(weights(folder).read_bytes())
    data[data.index(b'"shape"') + 9] ^= 0x40
    weights(folder).write_bytes(data)


def integers_as_weights(folder: Path) -> None:
    """A header that says integers of the same size: their bits would become numbers around 1e9."""
    data = weights(folder).read_bytes()
    at = data.index(b'"F32"', data.index(b"experts.up.central"))
    weights(folder).write_bytes(data[: at + 1] + b"I" + data[at + 2 :])


def huge_header(folder: Path) -> None:
    weights(folder).write_bytes((1 << 62).to_bytes(HEADER, "little") + weights(folder).read_bytes()[HEADER:])


def huge_shape(folder: Path) -> None:
    """A header that asks for an exabyte, in a file whose length fits (holes take no space on a disk)."""
    entry = {"dtype": "F32", "shape": [1 << 20, 1 << 20], "data_offsets": [0, 1 << 42]}
    header = json.dumps({"lm_head.weight": entry}).encode()
    with weights(folder).open("wb") as file:
        file.write(len(header).to_bytes(HEADER, "little") + header)
        file.truncate(HEADER + len(header) + (1 << 42))


def shape_beyond_the_file(folder: Path) -> None:
    entry = {"dtype": "F32", "shape": [1 << 31, 1 << 31], "data_offsets": [0, 1 << 62]}
    header = json.dumps({"lm_head.weight": entry}).encode()
    weights(folder).write_bytes(len(header).to_bytes(HEADER, "little") + header)


def pickled_weights(folder: Path) -> None:
    weights(folder).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))


def pickle_as_safetensors(folder: Path) -> None:
    weights(folder).write_bytes(pickle.dumps(Evil()))


def foreign_weights(folder: Path) -> None:
    save_file({"some.weight": torch.ones(3)}, weights(folder))


def swapped_shapes(folder: Path) -> None:
    tensors = load_file(weights(folder))
    name = next(name for name in tensors if name.endswith("experts.up.central"))
    tensors[name] = tensors[name].transpose(0, 1).contiguous()[..., :-1].contiguous()
    save_file(tensors, weights(folder))


def index_of(folder: Path, name: str) -> None:
    os.rename(weights(folder), folder / "a.safetensors")
    names = dict.fromkeys(load_file(folder / "a.safetensors"), "a.safetensors")
    values = {"metadata": {"total_size": 1}, "weight_map": {**names, next(iter(names)): name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(values))


def shard_outside(folder: Path) -> None:
    shutil.copy(weights(folder), folder.parent / "outside.safetensors")
    index_of(folder, "../outside.safetensors")


def shard_absolute(folder: Path) -> None:
    shutil.copy(weights(folder), folder.parent / "outside.safetensors")
    index_of(folder, str((folder.parent / "outside.safetensors").resolve()))


def shard_absent(folder: Path) -> None:
    index_of(folder, "b.safetensors")


def change_config(**changes: object) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        file = folder / "config.json"
        values = json.loads(file.read_text())
        mpoe = {name: changes[name] for name in changes if name in values["mpoe"]}
        values["mpoe"] |= mpoe
        values |= {name: value for name, value in changes.items() if name not in mpoe}
        file.write_text(json.dumps(values))

    return spoil


def deep_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"a":' + "[" * 100_000)


def list_as_config(folder: Path) -> None:
    (folder / "config.json").write_text("[1, 2]")


def index_of_nothing(folder: Path) -> None:
    weights(folder).unlink()
    (folder / "model.safetensors.index.json").write_text('{"metadata": {}, "weight_map": {"a": 3}}')


DAMAGES = [
    Damage("weights cut short", cut_weights, "must be a whole safetensors file"),
    Damage("weights empty", empty_weights, "must be a whole safetensors file"),
    Damage("bit flipped in the header", flip_in_header, "must be a whole safetensors file"),
    Damage("header that calls weights integers", integers_as_weights, "must hold floating-point numbers; the header"),
    Damage("header of 4 exabytes", huge_header, "must be a whole safetensors file"),
    Damage("tensor of 4 terabytes in a sparse file", huge_shape, "must be of the shape"),
    Damage("tensor of 16 exabytes", shape_beyond_the_file, "must be a whole safetensors file"),
    Damage("pickle beside the config", pickled_weights, r"must hold model\.safetensors"),
    Damage("pickle named safetensors", pickle_as_safetensors, "must be a whole safetensors file"),
    Damage("weights of another model", foreign_weights, r"weights in .* must match its config\.json"),
    Damage("a tensor of another shape", swapped_shapes, "experts.up.central must be of the shape"),
    Damage("shard in the parent folder", shard_outside, "must name files of its own folder; got '../outside"),
    Damage("shard by absolute path", shard_absolute, "must name files of its own folder; got '/"),
    Damage("shard that is absent", shard_absent, r"names b\.safetensors"),
    Damage("config of a trillion numbers", change_config(d_model=1_000_000, d_ff=1_000_000), "must be of the shape"),
    Damage("config of a billion layers", change_config(num_layers=10**9), "num_layers in .* must fit the weights"),
    Damage("config of a billion experts", change_config(num_experts=10**9), "must be of the shape"),
    Damage(
        "config of a bad field", change_config(num_experts="many"), "valid field 'mpoe'; num_experts must be an integer"
    ),
    Damage(
        "config of another class",
        change_config(architectures=["os.system"]),
        "architectures in .* must name an MPOE class of",
    ),
    Damage("config that is a list", list_as_config, "must hold a JSON object; got list"),
    Damage("index that names no files", index_of_nothing, "weight_map in .* must map names of parameters"),
    Damage("config of deep brackets", deep_config, "must be a JSON file"),
]
