"""Where the feed-forward networks of each model family are: one table, read by conversion and by our model classes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from torch import Tensor, nn

from mpoe.config import MPOEConfig
from mpoe.layers.activations import check_activation
from mpoe.layers.feed_forward import MPOEFeedForward
from mpoe.layers.mpo_linear import MPOLinear, linear_weight


class NormedResidual(nn.Module):
    """``LayerNorm(dropout(y) + x)``: what is left of BERT's output module when experts take its projection over."""

    LayerNorm: nn.Module
    dropout: nn.Module

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.LayerNorm = output.LayerNorm
        self.dropout = output.dropout

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(hidden_states) + input_tensor)


@dataclass(frozen=True)
class Family:
    """How a model family builds its feed-forward networks.

    Attributes:
        name: Hugging Face ``model_type`` of the dense model.
        ffn: pattern of the names of modules that hold an FFN; group ``layer`` and, optionally, ``stream``.
        attention: pattern of the names of attention projections; group ``layer``.
        up, down, gate_proj: names of the dense projections inside the holder (first alternative present wins).
            Orientation follows from their type: `nn.Linear` holds ``[out, in]``, `Conv1D` ``[in, out]``.
        place: name, inside the holder, of the module that an `MPOEFeedForward` replaces; empty = the holder itself.
        residual: name of a module that loses its projection (BERT's ``output``).
        activation, dropout, output_dropout, init_std: read the model's config; ``init_std`` gives up and down.
    """

    name: str
    ffn: re.Pattern[str]
    attention: re.Pattern[str]
    up: tuple[str, ...]
    down: str
    gate_proj: str | None
    place: str
    residual: str | None
    activation: Callable[[Any], str]
    dropout: Callable[[Any], float]
    output_dropout: Callable[[Any], float]
    init_std: Callable[[Any], tuple[float, float]]


FAMILIES: dict[str, Family] = {
    "t5": Family(
        name="t5",
        ffn=re.compile(r"^(?:.*\.)?(?P<stream>encoder|decoder)\.block\.(?P<layer>\d+)\.layer\.\d+\.DenseReluDense$"),
        attention=re.compile(
            r"^(?:.*\.)?(?:encoder|decoder)\.block\.(?P<layer>\d+)\.layer\.\d+\.(?:SelfAttention|EncDecAttention)\.[qkvo]$"
        ),
        up=("wi", "wi_1"),
        down="wo",
        gate_proj="wi_0",
        place="",
        residual=None,
        activation=lambda config: config.dense_act_fn,
        dropout=lambda config: config.dropout_rate,
        output_dropout=lambda config: 0.0,
        init_std=lambda config: (
            config.initializer_factor * config.d_model**-0.5,
            config.initializer_factor * config.d_ff**-0.5,
        ),
    ),
    "gpt2": Family(
        name="gpt2",
        ffn=re.compile(r"^(?:.*\.)?h\.(?P<layer>\d+)\.mlp$"),
        attention=re.compile(r"^(?:.*\.)?h\.(?P<layer>\d+)\.(?:attn|crossattention)\.(?:c_attn|q_attn|c_proj)$"),
        up=("c_fc",),
        down="c_proj",
        gate_proj=None,
        place="",
        residual=None,
        activation=lambda config: config.activation_function,
        dropout=lambda config: 0.0,
        output_dropout=lambda config: config.resid_pdrop,
        init_std=lambda config: (
            config.initializer_range,
            config.initializer_range / (2 * config.n_layer) ** 0.5,
        ),
    ),
    "bert": Family(
        name="bert",
        ffn=re.compile(r"^(?:.*\.)?encoder\.layer\.(?P<layer>\d+)$"),
        attention=re.compile(
            r"^(?:.*\.)?encoder\.layer\.(?P<layer>\d+)\.(?:attention|crossattention)\."
            r"(?:self\.(?:query|key|value)|output\.dense)$"
        ),
        up=("intermediate.dense",),
        down="output.dense",
        gate_proj=None,
        place="intermediate",
        residual="output",
        activation=lambda config: config.hidden_act,
        dropout=lambda config: 0.0,
        output_dropout=lambda config: 0.0,
        init_std=lambda config: (config.initializer_range, config.initializer_range),
    ),
}


def _child(module: nn.Module, name: str) -> nn.Module | None:
    for part in filter(None, name.split(".")):
        module = getattr(module, part, None)  # type: ignore[assignment]
        if module is None:
            return None
    return module


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the module called ``name``."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


@dataclass(frozen=True)
class FFNSite:
    """One dense feed-forward network of a model.

    Attributes:
        name: name that the `MPOEFeedForward` takes.
        stream: whose token mask it reads.
        layer: index of its layer in the stream.
        dense: its dense projections by kind, and their parameter names' prefixes in ``prefixes``.
        options: keyword arguments of `MPOEFeedForward`.
    """

    name: str
    stream: str
    layer: int
    dense: dict[str, nn.Module]
    prefixes: dict[str, str]
    options: dict[str, Any] = field(default_factory=dict)
    residual: str | None = None

    def weight(self, kind: str) -> Tensor:
        """Dense weight ``[in, out]``."""
        return linear_weight(self.dense[kind])

    def bias(self, kind: str) -> Tensor | None:
        return getattr(self.dense[kind], "bias", None)

    def build(self, config: MPOEConfig) -> MPOEFeedForward:
        """An `MPOEFeedForward` of these sizes, device and dtype, whose weights the caller fills or initialises."""
        up = self.weight("up")
        rows, columns = up.shape
        options = {"stream": self.stream, "device": "meta", "dtype": up.dtype, **self.options}
        return MPOEFeedForward(rows, columns, config, **options).to_empty(device=up.device)

    def install(self, model: nn.Module, feed_forward: MPOEFeedForward) -> None:
        """Put ``feed_forward`` where the dense network is."""
        feed_forward.train(model.training)
        set_module(model, self.name, feed_forward)
        if self.residual is not None:
            set_module(model, self.residual, NormedResidual(model.get_submodule(self.residual)))


@dataclass(frozen=True)
class LinearSite:
    """One dense projection that becomes an `MPOLinear`."""

    name: str
    layer: int
    dense: nn.Module

    def build(self, config: MPOEConfig) -> MPOLinear:
        """An `MPOLinear` of these sizes, device and dtype, whose weights the caller fills or initialises."""
        weight = linear_weight(self.dense)
        return MPOLinear(
            config.attention_shape(*weight.shape),
            getattr(self.dense, "bias", None) is not None,
            config.backend,
            init_std=float(weight.shape[0]) ** -0.5,
            device="meta",
            dtype=weight.dtype,
        ).to_empty(device=weight.device)


def _excluded(name: str, patterns: list[str]) -> bool:
    return any(name == pattern or name.endswith(f".{pattern}") for pattern in patterns)


def _select(sites: list[Any], config: MPOEConfig) -> list[Any]:
    names = [site.name for site in sites]
    for pattern in config.exclude_modules:
        if not any(_excluded(name, [pattern]) for name in names):
            close = get_close_matches(pattern, names, n=3, cutoff=0.3)
            hint = f"; close matches: {', '.join(close)}" if close else ""
            raise ValueError(f"exclude_modules names {pattern!r}, which is none of the {len(names)} targets{hint}")
    layers = config.layers_to_transform
    known = sorted({site.layer for site in sites})
    for index in layers or []:
        if index not in known:
            raise ValueError(f"layers_to_transform must hold layer indices {known[0]}..{known[-1]}; got {index}")
    return [
        site
        for site in sites
        if not _excluded(site.name, config.exclude_modules) and (layers is None or site.layer in layers)
    ]


def _ffn_sites(model: nn.Module, family: Family, model_config: Any) -> Iterator[FFNSite]:
    for name, module in model.named_modules():
        match = family.ffn.match(name)
        if match is None:
            continue
        up_name = next((n for n in family.up if _child(module, n) is not None), None)
        if up_name is None or _child(module, family.down) is None:
            continue
        kinds = {"up": up_name, "down": family.down}
        if family.gate_proj is not None and _child(module, family.gate_proj) is not None:
            kinds["gate_proj"] = family.gate_proj
        dense = {kind: module.get_submodule(n) for kind, n in kinds.items()}
        up_std, down_std = family.init_std(model_config)
        yield FFNSite(
            name=f"{name}.{family.place}" if family.place else name,
            stream=match.groupdict().get("stream") or "main",
            layer=int(match["layer"]),
            dense=dense,
            prefixes={kind: f"{name}.{n}" for kind, n in kinds.items()},
            options={
                "activation": check_activation(family.activation(model_config)),
                "gated": "gate_proj" in kinds,
                "bias": getattr(dense["up"], "bias", None) is not None,
                "dropout": float(family.dropout(model_config)),
                "output_dropout": float(family.output_dropout(model_config)),
                "init_std": {"up": up_std, "gate_proj": up_std, "down": down_std},
            },
            residual=None if family.residual is None else f"{name}.{family.residual}",
        )


def find_sites(
    model: nn.Module, family: Family, model_config: Any, config: MPOEConfig
) -> tuple[list[FFNSite], list[LinearSite]]:
    """Dense modules of ``model`` that ``config`` converts: feed-forward networks and attention projections.

    Raises:
        ValueError: nothing to convert, ``exclude_modules`` or ``layers_to_transform`` that match nothing, an
            activation experts cannot compute, feed-forward chunking.
    """
    if getattr(model_config, "chunk_size_feed_forward", 0):
        raise ValueError(
            "chunk_size_feed_forward must be 0 for a mixture of experts, which routes all tokens of a call at once; "
            f"got {model_config.chunk_size_feed_forward}"
        )
    ffns = list(_ffn_sites(model, family, model_config)) if "ffn" in config.targets else []
    linears = []
    if "attention" in config.targets:
        for name, module in model.named_modules():
            match = family.attention.match(name)
            if match is not None:
                linears.append(LinearSite(name, int(match["layer"]), module))
    if not ffns and not linears:
        raise ValueError(f"{type(model).__name__} has no dense {' or '.join(config.targets)} modules to convert")
    chosen = _select([*ffns, *linears], config)
    if not chosen:
        raise ValueError(
            "nothing is left to convert: layers_to_transform and exclude_modules leave out every module; got "
            f"layers_to_transform={config.layers_to_transform}, exclude_modules={config.exclude_modules}"
        )
    return [s for s in chosen if isinstance(s, FFNSite)], [s for s in chosen if isinstance(s, LinearSite)]
