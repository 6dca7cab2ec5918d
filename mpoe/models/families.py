"""How each model family builds its layers: one table, read by conversion and by our model classes."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Family:
    """How a model family builds its feed-forward networks.

    Attributes:
        name: Hugging Face ``model_type`` of the dense model.
        ffn: pattern of the names of modules that hold an FFN; group ``layer`` and, optionally, ``stream``.
        attention: pattern of the names of attention projections; group ``layer``.
        pooler: pattern of the name of the pooler's projection, if there is one.
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
    pooler: re.Pattern[str] | None
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
        pooler=None,
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
        pooler=None,
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
        pooler=re.compile(r"^(?:.*\.)?pooler\.dense$"),
        activation=lambda config: config.hidden_act,
        dropout=lambda config: 0.0,
        output_dropout=lambda config: 0.0,
        init_std=lambda config: (config.initializer_range, config.initializer_range),
    ),
    "llama": Family(
        name="llama",
        ffn=re.compile(r"^(?:.*\.)?layers\.(?P<layer>\d+)\.mlp$"),
        attention=re.compile(r"^(?:.*\.)?layers\.(?P<layer>\d+)\.self_attn\.[qkvo]_proj$"),
        up=("up_proj",),
        down="down_proj",
        gate_proj="gate_proj",
        place="",
        residual=None,
        pooler=None,
        activation=lambda config: config.hidden_act,
        dropout=lambda config: 0.0,
        output_dropout=lambda config: 0.0,
        init_std=lambda config: (config.initializer_range, config.initializer_range),
    ),
}
