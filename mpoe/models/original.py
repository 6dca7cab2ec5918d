"""Reads checkpoints of the original implementation (RUCAIBox/MPOE, T5), with its key names and
order of cores.

There, a weight matrix is ``nn.Linear``'s ``[out, in]``, core k is ``[d, out_k, in_k, d']``, and the
central core, index 2 of 5, is saved once per expert although all share it::

    <layer>.sffn.experts.<e>.wi_mpo.tensor_set.<k>  moe_type switch
        router: <layer>.sffn.switch.weight, .bias
    <layer>.moe_layer.experts.w1_mpo.<k>            moe_type moe, [E, ...] (not the central); b1, b2
        router: <layer>.moe_layer.gate.w_gating [in, E]
    <layer>.DenseReluDense.wi_mpo.tensor_set.<k>    moe_type none
    <layer>.SelfAttention.q_mpo.tensor_set.<k>      attention
    shared_mpo.tensor_set.<k>                       embedding, [d, vocabulary_k, model_k, d']
"""

import copy
import os
import re
import warnings
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import T5ForConditionalGeneration

from mpoe.config import MPOEConfig
from mpoe.config.checks import check_type, refusing
from mpoe.layers.cores import rate_ratios
from mpoe.models.convert import adopt_class, converted_class, one_at_a_time
from mpoe.models.find import find_sites
from mpoe.models.sites import FFNSite, install_empty
from mpoe.models.walk import mpo_modules
from mpoe.models.weight_files import first_line
from mpoe_kernels import MPOShape, reconstruct

NUM_CORES = 5
CENTRAL = 2
_LAYER = r"(?P<layer>(?:encoder|decoder)\.block\.\d+\.layer\.\d+)"
_CORE = r"_mpo(?:\.tensor_set)?\.(?P<core>\d+)"
_OWNER = r"(?:sffn\.experts\.(?P<expert>\d+)|moe_layer\.experts|DenseReluDense)"
_EXPERTS = re.compile(rf"{_LAYER}\.{_OWNER}\.(?P<kind>w[io12]){_CORE}")
_LINEAR = re.compile(
    rf"(?P<name>{_LAYER}\.(?:SelfAttention|EncDecAttention)\.[qkvo]|shared){_CORE}"
)
_ROUTER = re.compile(rf"{_LAYER}\.(?:sffn\.switch\.weight|moe_layer\.gate\.w_gating)")
_BIAS = re.compile(rf"{_LAYER}\.(?:sffn\.switch\.bias|moe_layer\.experts\.b[12])")
# the embedding again, under the names of modules that share it
_TABLE_COPY = r"(?:(?:encoder|decoder)\.embed_tokens|lm_head_mpo)\.tensor_set\.\d+"
_DECOMPOSED = rf"{_LAYER}\.moe_layer\.experts\.w[12]"  # matrices that cores came from
_COPIES = re.compile(rf"{_TABLE_COPY}|{_DECOMPOSED}")
_KINDS = {"wi": "up", "w1": "up", "wo": "down", "w2": "down"}


def _read(source: str | Path | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    tensors: Any = source
    if not isinstance(source, Mapping):
        check_type("source", source, (str, os.PathLike), "a state dict or a path")
        path = Path(source) / "pytorch_model.bin" if Path(source).is_dir() else Path(source)
        if not path.is_file():
            raise ValueError(
                f"source must be a checkpoint of the original, or its folder; {path} is no file"
            )
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # many kinds for files that are none or hold more than tensors
            raise ValueError(
                f"source must hold tensors and nothing else; {path}: {first_line(error)}"
            ) from error
    is_state = isinstance(tensors, Mapping) and all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in tensors.items()
    )
    if not is_state:
        raise ValueError("source must map names to tensors; it holds something else")
    return tensors


def _in_our_order(key: str, core: Tensor, of_all_experts: bool = False) -> Tensor:
    axes = "[E, d, out, in, d']" if of_all_experts else "[d, out, in, d']"
    if core.dim() != 4 + of_all_experts:
        raise ValueError(f"{key} must be a core {axes}; got {list(core.shape)}")
    return core.transpose(-2, -3)


class _Checkpoint:
    """Tensors of the original by names of our modules and parameters.

    Attributes:
        moe_type, num_experts: of the mixture.
        chains: module -> index of core -> cores, in our order ``[E or nothing, d, in_k, out_k,
            d']``.
        parameters: routers ``[E, in]``, and what has the same name in both.
        lost: names of biases other than zero, of routers and of the experts of moe_type moe.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.moe_type = "none"
        self._has_experts = False
        self.num_experts = 1
        self.lost: list[str] = []
        self.chains: dict[str, dict[int, Tensor]] = defaultdict(dict)
        self.parameters: dict[str, Tensor] = {}
        # (module, index of core) -> expert -> core, where each expert has its own
        self._by_expert: dict[tuple[str, int], dict[int, Tensor]] = defaultdict(dict)
        for key, tensor in tensors.items():
            if match := _EXPERTS.fullmatch(key):
                self._take_experts(key, match, tensor)
            elif match := _LINEAR.fullmatch(key):
                is_table = match["name"] == "shared"  # [vocabulary, model] is in our order already
                core = tensor if is_table else _in_our_order(key, tensor)
                self.chains[f"{match['name']}.cores"][int(match["core"])] = core
            elif match := _ROUTER.fullmatch(key):
                weight = tensor if ".switch." in key else tensor.T
                self.parameters[f"{match['layer']}.DenseReluDense.router.weight"] = weight
            elif _BIAS.fullmatch(key):
                if bool(tensor.any()):
                    self.lost.append(key)
            elif not _COPIES.fullmatch(key):
                self.parameters[key] = tensor
        for (name, index), cores in self._by_expert.items():
            self.chains[name][index] = self._joined(name, index, cores)

    def _take_experts(self, key: str, match: re.Match, tensor: Tensor) -> None:
        name = f"{match['layer']}.DenseReluDense.experts.{_KINDS[match['kind']]}"
        index = int(match["core"])
        if match["expert"]:
            self._set_moe_type("switch")
            expert = int(match["expert"])
            self.num_experts = max(self.num_experts, expert + 1)
            self._by_expert[name, index][expert] = _in_our_order(key, tensor)
        elif ".moe_layer." in key:
            self._set_moe_type("moe")
            core = _in_our_order(key, tensor, of_all_experts=index != CENTRAL)
            if index != CENTRAL:
                self.num_experts = max(self.num_experts, len(core))
            self.chains[name][index] = core
        else:
            self._set_moe_type("none")
            self.chains[name][index] = _in_our_order(key, tensor)

    def _set_moe_type(self, moe_type: str) -> None:
        if self._has_experts and moe_type != self.moe_type:
            raise ValueError(
                f"the checkpoint must be of one moe_type; it holds experts of {self.moe_type!r} "
                f"and of {moe_type!r}"
            )
        self._has_experts = True
        self.moe_type = moe_type

    def _joined(self, name: str, index: int, cores: Mapping[int, Tensor]) -> Tensor:
        """The experts' cores as one tensor; the central one, which they share, as it is."""
        if cores.keys() != set(range(self.num_experts)):
            raise ValueError(
                f"the checkpoint must hold every core of {name}, of {self.num_experts} experts"
            )
        parts = [cores[expert] for expert in range(self.num_experts)]
        if index != CENTRAL:
            return torch.stack(parts)
        if not all(torch.equal(part, parts[0]) for part in parts):
            raise ValueError(f"the experts of {name} must share their central core; they differ")
        return parts[0]

    def shape(self, name: str, weight: Tensor) -> MPOShape:
        """Shape of the chain for a weight ``[in, out]``, with factors and bonds read from the
        cores."""
        chain = self.chains.get(name, {})
        if sorted(chain) != list(range(NUM_CORES)):
            raise ValueError(
                f"the checkpoint must hold every core of {name}; it has {sorted(chain)}"
            )
        sizes = [chain[index].shape[-4:] for index in range(NUM_CORES)]
        left, ins, outs, _ = zip(*sizes, strict=True)
        return MPOShape(ins, outs, left[1:], CENTRAL, *weight.shape)

    def config(self, base: Any) -> MPOEConfig:
        """The configuration of a converted ``base`` with these modules."""
        marks = {"ffn": ".experts.", "attention": "Attention.", "embedding": "shared."}
        targets = [
            target for target, mark in marks.items() if any(mark in name for name in self.chains)
        ]
        if not targets:
            raise ValueError(
                "source must be a checkpoint of the original implementation; it holds no MPO cores"
            )
        patterns: dict = {}
        # The sites are the same for every shape of cores; the patterns then say which they have.
        for site in find_sites(base, MPOEConfig(shape="separable", target_modules=targets)):
            pattern = re.escape(site.name)
            if isinstance(site, FFNSite):
                patterns[pattern] = {
                    kind: self.shape(f"{site.name}.experts.{kind}", site.weight(kind))
                    for kind in site.dense
                }
            else:
                patterns[pattern] = self.shape(f"{site.name}.cores", site.weight)
        return MPOEConfig(
            moe_type=self.moe_type,
            num_experts=self.num_experts,
            shape="separable",
            shape_pattern=patterns,
            target_modules=targets,
        )


@one_at_a_time()
@torch.no_grad()
def import_original(source: str | Path | Mapping[str, Tensor], base: Any) -> Any:
    """Build an MPOE model from a checkpoint of the original implementation.

    Args:
        source: the original's state dict, its ``pytorch_model.bin``, or the folder of one.
        base: the dense `T5ForConditionalGeneration` (ReLU) that was fine-tuned; gives the
            configuration, and what the checkpoint lacks.

    Returns:
        The model, in eval mode. Matrices, routers and all dense parameters that the checkpoint
        holds are its own.

    Raises:
        TypeError: a base of another class, a source of another type.
        ValueError: no such checkpoint, cores that are missing, do not match the base or differ
            although experts share them, names that neither side knows.

    Warns:
        UserWarning: biases other than zero, which our layers do not have: of the original's
            routers, or of its experts of moe_type moe.
    """
    if type(base) is not T5ForConditionalGeneration:
        raise TypeError(f"base must be a T5ForConditionalGeneration; got {type(base).__name__}")
    checkpoint = _Checkpoint(_read(source))
    config = checkpoint.config(base)
    model: Any = copy.deepcopy(base)
    install_empty(model, find_sites(model, config), config)
    modules = dict(mpo_modules(model))
    foreign = sorted(checkpoint.chains.keys() - modules)
    if foreign:
        raise ValueError(f"the checkpoint holds cores of {foreign[0]!r}, which base does not have")
    with refusing("the checkpoint must be of a model of the sizes of base; ", RuntimeError):
        for name, cores in modules.items():
            chain = [checkpoint.chains[name][place] for place in range(cores.shape.num_cores)]
            cores.set_cores_(chain)
            # The experts' auxiliary cores began as copies: the ratios are those of any one.
            first = [core[0] if core.dim() == 5 else core for core in chain]
            cores.rate_ratios = rate_ratios(
                first, reconstruct(first)[: cores.in_features, : cores.out_features]
            )
        missing, unknown = model.load_state_dict(checkpoint.parameters, strict=False)
    obsolete = model._keys_to_ignore_on_load_unexpected or []
    for name in unknown:
        if not any(re.search(pattern, name) for pattern in obsolete):
            raise ValueError(
                f"the checkpoint holds {name!r}, which a T5 with these MPO layers has not"
            )
    routers = [name for name in missing if name.endswith(".router.weight")]
    if routers:
        raise ValueError(f"the checkpoint must hold every router; missing {routers[:3]}")
    adopt_class(model, converted_class(base), config)
    if lost := checkpoint.lost:
        warnings.warn(
            f"{len(lost)} biases of the original are left out, e.g. {lost[0]}: MPOE layers have "
            "none",
            stacklevel=4,  # this function has two decorators
        )
    return model.eval()
