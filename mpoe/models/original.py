"""Reads checkpoints of the original implementation (RUCAIBox/MPOE, T5), with its key names and order of cores.

There, a weight matrix is ``nn.Linear``'s ``[out, in]``, core k is ``[d, out_k, in_k, d']``, and the central core, index
2 of 5, is saved once per expert although all share it::

    <layer>.sffn.experts.<e>.wi_mpo.tensor_set.<k>      moe_type switch; router: <layer>.sffn.switch.weight, .bias
    <layer>.moe_layer.experts.w1_mpo.<k>                moe_type moe, [E, ...] each but the central core; b1, b2;
                                                        router: <layer>.moe_layer.gate.w_gating [in, E]
    <layer>.DenseReluDense.wi_mpo.tensor_set.<k>        moe_type none
    <layer>.sffn.experts.<e>.wi.weight                  the baselines without MPO, full matrices: switch,
    <layer>.moe_layer.experts.w1                        and moe, [E, in, out]
    <layer>.SelfAttention.q_mpo.tensor_set.<k>          attention
    shared_mpo.tensor_set.<k>                           embedding, [d, vocabulary_k, model_k, d']
"""

from __future__ import annotations

import copy
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import T5ForConditionalGeneration

from mpoe.config import MPOEConfig
from mpoe.config.checks import check_type
from mpoe.layers.cores import rate_ratios
from mpoe.models.convert import adopt_class, converted_class, one_at_a_time
from mpoe.models.find import find_sites
from mpoe.models.report import mpo_modules
from mpoe.models.sites import EmbeddingSite, FFNSite, LinearSite, install_empty
from mpoe.models.weight_files import first_line, read_tensors
from mpoe_kernels import MPOShape, reconstruct

CENTRAL = 2
_FFN = r"(?:encoder|decoder)\.block\.\d+\.layer\.\d+"
_CORE = re.compile(
    rf"(?:(?P<ffn>{_FFN})\.(?:sffn\.experts\.(?P<expert>\d+)|moe_layer\.experts|DenseReluDense)\.(?P<kind>w[io12])|"
    rf"(?P<linear>{_FFN}\.(?:SelfAttention|EncDecAttention)\.[qkvo])|shared)_mpo(?:\.tensor_set)?\.(?P<core>\d+)"
)
_FULL = re.compile(
    rf"(?P<ffn>{_FFN})\.(?:sffn\.experts\.(?P<expert>\d+)\.(?=w[io]\.)|moe_layer\.experts\.(?=w[12]$))"
    r"(?P<kind>w[io12])(?:\.weight)?"
)
_ROUTER = re.compile(rf"(?P<ffn>{_FFN})\.(?:sffn\.switch\.(?P<part>weight|bias)|moe_layer\.gate\.w_gating)")
# the same table again, under the names of modules that share it, and the biases of moe_type moe
_COPIES = re.compile(r"(?:(?:encoder|decoder)\.embed_tokens|lm_head_mpo)\.tensor_set\.\d+")
_BIAS = re.compile(rf"{_FFN}\.moe_layer\.experts\.b[12]")
_KINDS = {"wi": "up", "w1": "up", "wo": "down", "w2": "down"}


def _read(source: str | Path | Mapping[str, Tensor]) -> dict[str, Tensor]:
    if isinstance(source, Mapping):
        return dict(source)
    check_type("source", source, (str, os.PathLike), "a state dict or a path")
    path = Path(source)
    if path.is_dir():
        names = ("model.safetensors", "pytorch_model.bin")
        found = next((path / name for name in names if (path / name).is_file()), None)
        if found is None:
            raise ValueError(f"source must hold {' or '.join(names)}; {path} has neither")
        path = found
    if not path.is_file():
        raise ValueError(f"source must be a checkpoint of the original, or its folder; {path} is none")
    if path.suffix == ".safetensors":
        return read_tensors([path])
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for files that are not checkpoints or hold more than tensors
        raise ValueError(f"source must hold tensors and nothing else; {path}: {first_line(error)}") from error
    if not isinstance(tensors, Mapping) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ValueError(f"source must map names to tensors; {path} holds something else")
    return dict(tensors)


def _joined(name: str, place: int, parts: dict[int, Tensor], count: int) -> Tensor:
    """The tensors of all experts, of which the central core must be the same."""
    missing = sorted(set(range(count)) - set(parts))
    if missing:
        what = f"every core of {name}; core {place}" if place >= 0 else f"every expert of {name}; that"
        raise ValueError(f"the checkpoint must hold {what} of expert {missing[0]} is not there")
    if place != CENTRAL:
        return torch.stack([parts[e] for e in range(count)])
    if not all(torch.equal(part, parts[0]) for part in parts.values()):
        raise ValueError(f"the experts of {name} must share their central core; they differ")
    return parts[0]


class _Checkpoint:
    """Tensors of the original by names of our modules and parameters.

    Attributes:
        chains: module -> index of core -> experts' cores, in our order ``[E or nothing, d, in_k, out_k, d']``.
        parameters: routers ``[E, in]``, experts without MPO ``[E, in, out]``, and what has the same name in both.
        biases: of the original's routers, and of its experts of moe_type moe.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.chains: dict[str, dict[int, Tensor]] = {}
        self.parameters: dict[str, Tensor] = {}
        self.biases: dict[str, Tensor] = {}
        self.moe_type, self.num_experts = "none", 1
        parts: dict[tuple[str, int], dict[int, Tensor]] = {}  # (module, core or -1) -> expert or -1 -> tensor
        for key, tensor in tensors.items():
            found, router = _CORE.fullmatch(key) or _FULL.fullmatch(key), _ROUTER.fullmatch(key)
            if found:
                self.moe_type = "switch" if ".sffn." in key else "moe" if ".moe_layer." in key else self.moe_type
                part = {name: value for name, value in found.groupdict().items() if value is not None}
                place, expert = int(part.get("core", -1)), int(part.get("expert", -1))
                name = f"{part.get('linear', 'shared')}.cores"
                if "ffn" in part:
                    name = f"{part['ffn']}.DenseReluDense.experts.{_KINDS[part['kind']]}"
                if name != "shared.cores" and (place, expert) != (-1, -1):  # moe_type moe has matrices as ours
                    tensor = tensor.T if place < 0 else tensor.transpose(-2, -3)
                parts.setdefault((name, place), {})[expert] = tensor
            elif router and router["part"] != "bias":
                name = f"{router['ffn']}.DenseReluDense.router.weight"
                self.parameters[name] = tensor if router["part"] else tensor.T
            elif router or _BIAS.fullmatch(key):
                self.biases[key] = tensor
            elif not _COPIES.fullmatch(key):
                self.parameters[key] = tensor
        count = 1 + max((expert for experts in parts.values() for expert in experts), default=0)
        for (name, place), experts in parts.items():
            value = experts[-1] if -1 in experts else _joined(name, place, experts, count)
            if place >= 0:
                self.chains.setdefault(name, {})[place] = value
            elif (name, 0) not in parts:  # besides its cores the original may keep the matrix that they came from
                self.parameters[f"{name}.weight"] = value
            if ".experts." in name and value.dim() == (3 if place < 0 else 5):
                self.num_experts = value.shape[0]

    def shape(self, name: str, in_features: int, out_features: int) -> MPOShape:
        """Shape of a chain, with factors and bonds read from the cores."""
        chain = self.chains[name]
        if sorted(chain) != list(range(len(chain))):
            raise ValueError(f"the checkpoint must hold every core of {name}; it has {sorted(chain)}")
        sizes = [tuple(chain[k].shape[-4:]) for k in range(len(chain))]
        bonds = [size[3] for size in sizes[:-1]]
        ins, outs = [size[1] for size in sizes], [size[2] for size in sizes]
        return MPOShape(tuple(ins), tuple(outs), bonds, CENTRAL, in_features, out_features)


def _config(checkpoint: _Checkpoint, base: Any) -> MPOEConfig:
    names = list(checkpoint.chains)
    dense = [name for name in checkpoint.parameters if _is_expert(name)]
    held = [*names, *dense]
    targets = [
        target
        for target, mark in (("ffn", ".experts."), ("attention", "Attention."), ("embedding", "shared."))
        if any(mark in name for name in held)
    ]
    if not targets:
        raise ValueError(
            "source must be a checkpoint of the original implementation; it holds no MPO cores and no experts"
        )
    every = MPOEConfig(shape="separable", target_modules=targets)
    patterns: dict[str, Any] = {}
    for site in find_sites(base, every):
        if isinstance(site, FFNSite) and f"{site.name}.experts.up.weight" in dense:
            continue
        if isinstance(site, FFNSite) and f"{site.name}.experts.up" in names:
            shapes = {k: checkpoint.shape(f"{site.name}.experts.{k}", *site.weight(k).shape) for k in ("up", "down")}
            patterns[re.escape(site.name)] = shapes
        elif isinstance(site, (LinearSite, EmbeddingSite)) and f"{site.name}.cores" in names:
            patterns[re.escape(site.name)] = checkpoint.shape(f"{site.name}.cores", *site.weight.shape)
        else:
            raise ValueError(f"the checkpoint must hold the cores of {site.name}, as it does of its like; it does not")
    return MPOEConfig(
        moe_type=checkpoint.moe_type,
        num_experts=checkpoint.num_experts,
        shape="separable",
        shape_pattern=patterns,
        target_modules=targets,
        expert_type="dense" if dense else "mpo",
    )


@one_at_a_time
@torch.no_grad()
def import_original(source: str | Path | Mapping[str, Tensor], base: Any) -> Any:
    """Build an MPOE model from a checkpoint of the original implementation, its baselines with dense experts included.

    Args:
        source: the original's state dict, its ``pytorch_model.bin`` or ``model.safetensors``, or the folder of one.
        base: the dense `T5ForConditionalGeneration` (ReLU) that was fine-tuned; provides the configuration and the
            parameters that are not in the checkpoint.

    Returns:
        The model, in eval mode. Matrices, routers and all dense parameters are the checkpoint's.

    Raises:
        TypeError: a base of another class, a source of another type.
        ValueError: no such checkpoint, cores that are missing, do not match the base or differ although experts share
            them, names that neither side knows.

    Warns:
        UserWarning: biases other than zero of the original's routers, or of its experts of moe_type moe, which our
            layers do not have.
    """
    if type(base) is not T5ForConditionalGeneration:
        raise TypeError(f"base must be a T5ForConditionalGeneration; got {type(base).__name__}")
    checkpoint = _Checkpoint(_read(source))
    config = _config(checkpoint, base)
    model: Any = copy.deepcopy(base)
    install_empty(model, find_sites(model, config), config)
    cores_of = dict(mpo_modules(model))
    for name, chain in checkpoint.chains.items():
        cores, found = cores_of[name], [chain[k] for k in range(len(chain))]
        cores.set_cores_(found)
        first = [core[0] if core.dim() == 5 else core for core in found]
        cores.rate_ratios = rate_ratios(first, reconstruct(first)[: cores.in_features, : cores.out_features])
    _load(model, checkpoint.parameters)
    config.rate_ratios = {name: list(cores.rate_ratios) for name, cores in cores_of.items()}
    adopt_class(model, converted_class(base), config)
    lost = [name for name, bias in checkpoint.biases.items() if bool(bias.any())]
    if lost:
        warnings.warn(
            f"{len(lost)} biases of the original are left out, e.g. {lost[0]}: MPOE layers have none", stacklevel=2
        )
    return model.eval()


def _load(model: Any, parameters: Mapping[str, Tensor]) -> None:
    """Load routers, experts without MPO, and what has the same name on both sides."""
    own = dict(model.named_parameters(remove_duplicate=False))
    obsolete = model._keys_to_ignore_on_load_unexpected or []
    for name, value in parameters.items():
        if any(re.search(pattern, name) for pattern in obsolete):
            continue
        if name not in own:
            raise ValueError(f"the checkpoint holds {name!r}, which a T5 with these MPO layers has not")
        if own[name].shape != value.shape:
            raise ValueError(f"{name} must be {list(own[name].shape)}; the checkpoint has {list(value.shape)}")
        own[name].copy_(value)
    needed = {name for name in own if name.endswith(".router.weight") or _is_expert(name)}
    if not needed <= parameters.keys():
        missing = sorted(needed - parameters.keys())[:3]
        raise ValueError(f"the checkpoint must hold every router and every expert; missing {missing}")


def _is_expert(name: str) -> bool:
    """Whether it is the name of experts' matrices."""
    return re.search(r"\.experts\.\w+\.weight$", name) is not None
