"""Exports to mixtures of Transformers that other tools can serve: Mixtral and Qwen3-MoE, with full
matrices per expert; GraniteMoeShared and Qwen2-MoE, at their own size, for neurons beside a dense
network.

A Llama whose networks are mixtures of dense experts computes what a Mixtral computes; the weights
have other names and are transposed. Beside neurons the dense network is the shared expert, an
expert's neurons are one of their experts; routers take the softmax of the chosen logits, whose sum
is 1, and a constant factor of the gates goes into the down projections. Exports that would not be
exact are refused.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from mpoe.config.checks import check_choice
from mpoe.layers.feed_forward import MPOEFeedForward
from mpoe.layers.neurons import NeuronFeedForward
from mpoe.models.walk import modules_of, neuron_modules

# Fields that a Llama, Mistral or Qwen3 shares with its mixture.
_COMMON = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_act",
    "num_key_value_heads",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "dtype",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "rope_parameters",
    "attention_dropout",
)


@dataclass(frozen=True)
class Target:
    """A class of Transformers that a mixture can become.

    Attributes:
        name: of its classes, before ``Config`` and ``ForCausalLM``.
        families: dense families of which it is the mixture.
        experts, inner: its configuration's fields for the number of experts and the size of their
            hidden layer.
        renormalises: whether the gates of a token always sum to 1.
        shared: its configuration's field for the size of the dense network beside the experts, of
            which they are neurons; ``None`` = every expert is a whole network.
    """

    name: str
    families: tuple[str, ...]
    experts: str
    inner: str
    renormalises: bool
    shared: str | None = None


TARGETS = {
    "mixtral": Target(
        "Mixtral", ("llama", "mistral"), "num_local_experts", "intermediate_size", True
    ),
    "qwen3_moe": Target("Qwen3Moe", ("qwen3",), "num_experts", "moe_intermediate_size", False),
    "granitemoeshared": Target(
        "GraniteMoeShared",
        ("llama", "mistral", "smollm3"),
        "num_local_experts",
        "intermediate_size",
        True,
        "shared_intermediate_size",
    ),
    "qwen2_moe": Target(
        "Qwen2Moe",
        ("qwen2",),
        "num_experts",
        "moe_intermediate_size",
        True,
        "shared_expert_intermediate_size",
    ),
}
QWEN3_NEURONS = (
    ", beside which no stock class has experts of neurons (HunYuanMoE normalises heads after their "
    "rotation, Dots1 and GLM-4-MoE take gates from sigmoids): serve it with trust_remote_code, or "
    "convert with whole experts to qwen3_moe"
)
# Numbers of a row that llama.cpp quantises together: as Q8_0 or Q5_0, and as a K-quant. Rows of so
# many also begin at the multiples of 16 bytes that Transformers' matrix products ask for.
BLOCK = 32
LARGE_BLOCK = 256
# Relative to max|logit|, in float32; 16-bit routers round their weights, which Transformers keeps
# in the model's dtype.
TOLERANCE = 1e-5
HALF_TOLERANCE = 0.05


def _reasons(model: Any, to: str) -> list[str]:
    """Why ``model`` cannot become a ``to``; empty if it can."""
    target = TARGETS[to]
    config = model.config
    mpoe = model.mpoe_config
    if model.mpoe_family not in target.families:
        note = QWEN3_NEURONS if model.mpoe_family == "qwen3" and target.shared is not None else ""
        return [
            f"{to} is the mixture of a {' or '.join(target.families)}; this is a "
            f"{model.mpoe_family}{note}"
        ]
    neurons = list(neuron_modules(model).values())
    whole = list(modules_of(model, MPOEFeedForward).values())
    if neurons and target.shared is None:
        fitting = " or ".join(name for name, other in TARGETS.items() if other.shared is not None)
        return [
            f"{to}: its experts are whole networks; those of shape 'neurons' are added to a dense "
            f"one, as those of {fitting} are"
        ]
    if whole and target.shared is not None:
        return [
            f"{to}: its experts are neurons beside a dense network (shape 'neurons'); these are "
            "whole networks"
        ]
    router = mpoe.router
    kind = type(model).__name__
    targets = list(mpoe.targets)
    checks = {
        f"it takes a causal language model; this is a {kind}": not model.can_generate(),
        f"it has a router; moe_type is {mpoe.moe_type!r}": mpoe.moe_type == "none",
        "it has no second-expert policies (moe_type 'moe')": router.is_gshard,
        "its experts have no capacity (eval_capacity_factor)": (
            router.eval_capacity_factor is not None
        ),
        "its gates sum to 1; is_scale_prob keeps raw probabilities": (
            router.is_scale_prob and target.renormalises
        ),
        f"its gates are a softmax; scoring_func is {router.scoring_func!r}": router.scoring_func
        != "softmax",
        "its router has no bias of the scores (bias_update_rate)": router.bias_update_rate > 0,
        "every layer is a mixture; some are dense here": len(neurons or whole)
        != config.num_hidden_layers,
        f"only the feed-forward networks may be in MPO form; target_modules is {targets}": (
            set(targets) != {"ffn"}
        ),
    }
    if neurons:
        checks |= _neuron_checks(config, neurons)
    else:
        biased = any(
            weights.bias is not None
            for layer in whole
            for weights in layer.experts.projections().values()
        )
        named = any(getattr(config, name, False) for name in ("mlp_bias", "attention_bias"))
        checks["its projections have no biases"] = biased or named
        checks["its layers attend alike; use_sliding_window is on"] = getattr(
            config, "use_sliding_window", False
        )
    return [f"{to}: {reason}" for reason, holds in checks.items() if holds]


def _neuron_checks(config: Any, layers: list[NeuronFeedForward]) -> dict[str, bool]:
    """What the classes ask of a model and its layers -> whether that is missing."""
    is_plain = all(
        type(module) is nn.Linear and type(module.weight) is nn.Parameter and module.bias is None
        for layer in layers
        for module in layer.projections().values()
    )
    size = getattr(config, "sliding_window", None)  # a Mistral has a window unless its size is None
    slides = bool(getattr(config, "use_sliding_window", size is not None))
    return {
        f"its attention has no sliding windows; sliding_window is {size}": slides,
        "every layer has rotary positions; no_rope_layers leaves some without": not all(
            getattr(config, "no_rope_layers", None) or ()
        ),
        "its dense projections are nn.Linear without biases; merge adapters or dequantise first": (
            not is_plain
        ),
        "its experts have no biases (expert_bias)": any(
            layer.experts.bias is not None for layer in layers
        ),
    }


def _target_config(model: Any, to: str) -> Any:
    """The configuration of the class ``to`` that makes it compute what ``model`` does."""
    target = TARGETS[to]
    config = model.config
    mpoe = model.mpoe_config
    values = {name: getattr(config, name) for name in _COMMON if hasattr(config, name)}
    inner = config.intermediate_size if mpoe.neurons is None else mpoe.neurons
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    values |= {
        target.experts: mpoe.num_experts,
        target.inner: padded_size(inner),
        "num_experts_per_tok": mpoe.top_k,
        "head_dim": head,
        "router_aux_loss_coef": mpoe.router.balance_loss_weight,
    }
    if target.shared is None:
        values["sliding_window"] = getattr(config, "sliding_window", None)
    else:
        values[target.shared] = config.intermediate_size
    if to == "qwen3_moe":
        values["norm_topk_prob"] = not mpoe.router.is_scale_prob
    elif to == "qwen2_moe":  # explicit layer types, as its default differs from a Qwen2's
        values |= {
            "norm_topk_prob": True,
            "layer_types": ["full_attention"] * config.num_hidden_layers,
        }
    elif to == "granitemoeshared":
        values |= {
            "embedding_multiplier": 1.0,
            "logits_scaling": 1.0,
            "residual_multiplier": 1.0,
            "attention_multiplier": head**-0.5,
            # Biases of all four projections, as in a Llama.
            "attention_bias": getattr(config, "attention_bias", False),
        }
    return getattr(transformers, f"{target.name}Config")(**values)


def padded_size(neurons: int) -> int:
    """Hidden neurons of an exported expert, with those that are 0: a multiple of `BLOCK`, or of
    `LARGE_BLOCK` where that takes at most an eighth more."""
    large = -(-neurons // LARGE_BLOCK) * LARGE_BLOCK
    if 8 * large <= 9 * neurons:
        return large
    return -(-neurons // BLOCK) * BLOCK


def padded(weight: Tensor) -> Tensor:
    """Weights ``[E, m, I]`` with neurons that are 0 up to their `padded_size`, at which an
    activation's result adds nothing."""
    return F.pad(weight, (0, 0, 0, padded_size(weight.shape[1]) - weight.shape[1]))


def _tensors(name: str, layer: Any, to: str) -> dict[str, Tensor]:
    """The weights of ``layer``, called ``name`` in its model, under the names of the class
    ``to``."""
    experts = layer.experts
    if isinstance(layer, MPOEFeedForward):
        up = experts.up.weight.mT
        gate = experts.gate_proj.weight.mT
        down = experts.down.weight
        shared = {}
        dtype = up.dtype
    else:
        experts = experts.merged()
        shared = {kind: layer.central_weight(kind).t() for kind in ("gate_proj", "up", "down")}
        dtype = shared["down"].dtype  # routers and experts may be float32 beside a 16-bit network
        gate = experts.gate_proj
        up = experts.up
        down = experts.down * (layer.router.config.routed_scaling_factor or 1.0)
    tensors = {
        "experts.gate_up_proj": torch.cat([padded(gate), padded(up)], 1).to(dtype).contiguous(),
        "experts.down_proj": padded(down).to(dtype).mT.contiguous(),
        "gate.weight": layer.router.weight.to(dtype),
    }
    if to == "qwen2_moe":
        tensors |= {
            "shared_expert.gate_proj.weight": shared["gate_proj"],
            "shared_expert.up_proj.weight": shared["up"],
            "shared_expert.down_proj.weight": 2
            * shared["down"],  # its gate multiplies by sigmoid(0) = 1/2
            "shared_expert_gate.weight": shared["down"].new_zeros(1, layer.in_features),
        }
    if to != "granitemoeshared":
        return {f"{name}.{part}": value for part, value in tensors.items()}
    place = name.rpartition(".")[0]
    tensors["router.weight"] = tensors.pop("gate.weight")
    return {
        **{f"{place}.block_sparse_moe.{part}": value for part, value in tensors.items()},
        f"{place}.shared_mlp.input_linear.weight": torch.cat([shared["gate_proj"], shared["up"]]),
        f"{place}.shared_mlp.output_linear.weight": shared["down"],
    }


@torch.no_grad()
def as_stock(merged: Any, to: str) -> Any:
    """``merged``, a model with dense experts or with neurons, as the Transformers class that
    computes the same.

    Raises:
        ValueError: an unknown class, or a model that it cannot represent exactly, with every
            reason.
    """
    check_choice("as_", to, tuple(TARGETS))
    reasons = _reasons(merged, to)
    if reasons:
        raise ValueError(f"the model cannot be exported exactly: {'; '.join(reasons)}")
    stock = getattr(transformers, f"{TARGETS[to].name}ForCausalLM")(_target_config(merged, to))
    state: dict[str, Tensor] = merged.state_dict()
    for name, layer in merged.named_modules():
        if isinstance(layer, (MPOEFeedForward, NeuronFeedForward)):
            state = {key: value for key, value in state.items() if not key.startswith(f"{name}.")}
            state |= _tensors(name, layer, to)
    # nothing is shared
    stock.load_state_dict({name: value.clone() for name, value in state.items()}, assign=True)
    stock.tie_weights()
    stock.generation_config = merged.generation_config
    return stock.train(merged.training).requires_grad_(True)


@torch.no_grad()
def check_export(model: Any, folder: Path, to: str) -> float:
    """Open the exported folder with the stock class and compare logits with those of ``model``.

    Returns:
        The largest difference, relative to the largest logit.

    Raises:
        ValueError: the logits differ.
    """
    kind = getattr(transformers, f"{TARGETS[to].name}ForCausalLM")
    stock = kind.from_pretrained(folder, dtype=model.dtype).to(model.device).eval()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (2, 16), generator=generator).to(model.device)
    expected = model.eval()(input_ids=ids).logits
    logits = stock(input_ids=ids).logits
    difference = float((logits - expected).abs().max() / expected.abs().max())
    allowed = HALF_TOLERANCE if model.dtype in (torch.bfloat16, torch.float16) else TOLERANCE
    if not difference <= allowed:
        problem = f"its logits differ by {difference:.1e} of the largest"
        raise ValueError(f"the exported model must compute the same; {problem}")
    return difference


def server_notes(to: str, config: Any) -> list[str]:
    """Which other servers compute something else for this configuration of the class ``to``;
    Transformers is right."""
    if to == "qwen2_moe":
        return [
            "llama.cpp divides 0 by 0 in this class's shared gate, which is 0 here, and never "
            "renormalises gates"
        ]
    if to != "granitemoeshared":
        return []
    heads = config.hidden_size // config.num_attention_heads
    notes = []
    if config.head_dim != heads:
        notes.append(
            f"llama.cpp and vLLM expect heads of {heads} (hidden_size / num_attention_heads) for "
            f"this class; these have {config.head_dim}"
        )
    if config.attention_bias:
        notes.append("vLLM's class has no biases in attention; this model has them")
    if config.hidden_act != "silu":
        notes.append(f"vLLM's class computes silu; this model has {config.hidden_act}")
    return notes
