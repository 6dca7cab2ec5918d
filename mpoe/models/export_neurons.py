"""Neurons beside a dense network in Transformers' mixtures with a shared expert: GraniteMoeShared and Qwen2-MoE.

The dense network is their shared expert, an expert's neurons are one of their experts, and their routers take the
softmax of the chosen logits, whose sum is 1; a constant factor of the gates goes into the down projections.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mpoe.layers.neurons import NeuronFeedForward


def neuron_checks(config: Any, layers: list[NeuronFeedForward]) -> dict[str, bool]:
    """What the classes ask of a model and its layers -> whether that is missing."""
    dense = [module for layer in layers for module in layer.projections().values()]
    plain = [m for m in dense if type(m) is nn.Linear and type(m.weight) is nn.Parameter and m.bias is None]
    size = getattr(config, "sliding_window", None)  # a Mistral has a window unless its size is None
    slides = bool(getattr(config, "use_sliding_window", size is not None))
    return {
        f"its attention has no sliding windows; sliding_window is {size}": slides,
        "every layer has rotary positions; no_rope_layers leaves some without": not all(
            getattr(config, "no_rope_layers", None) or ()
        ),
        "its dense projections are nn.Linear without biases; merge adapters or dequantise first": len(plain)
        < len(dense),
        "its experts have no biases (expert_bias)": any(layer.experts.bias is not None for layer in layers),
    }


def neuron_values(model: Any, to: str, head_dim: int) -> dict[str, Any]:
    """Fields of the configuration of ``to`` that make it compute what ``model``, with heads of this size, does."""
    if to == "qwen2_moe":  # explicit layer types, as its default differs from a Qwen2's
        return {"norm_topk_prob": True, "layer_types": ["full_attention"] * model.config.num_hidden_layers}
    multipliers = dict.fromkeys(("embedding_multiplier", "logits_scaling", "residual_multiplier"), 1.0)
    bias = getattr(model.config, "attention_bias", False)  # of all four projections, as in a Llama
    return {**multipliers, "attention_multiplier": head_dim**-0.5, "attention_bias": bias}


def server_notes(to: str, config: Any) -> list[str]:
    """Which other servers compute something else for this configuration of the class ``to``; Transformers is right."""
    if to == "qwen2_moe" and config.norm_topk_prob:
        return ["llama.cpp divides 0 by 0 in this class's shared gate, which is 0 here, and never renormalises gates"]
    if to != "granitemoeshared":
        return []
    heads = config.hidden_size // config.num_attention_heads
    problems = {
        f"llama.cpp and vLLM expect heads of {heads} (hidden_size / num_attention_heads) for this class; these have "
        f"{config.head_dim}": config.head_dim != heads,
        "vLLM's class has no biases in attention; this model has them": config.attention_bias,
        f"vLLM's class computes silu; this model has {config.hidden_act}": config.hidden_act != "silu",
    }
    return [note for note, holds in problems.items() if holds]


def neuron_tensors(name: str, layer: NeuronFeedForward, to: str) -> dict[str, Tensor]:
    """The weights of ``layer``, called ``name`` in its model, under the names of the class ``to``."""
    router: Any = layer.router
    experts = layer.experts if layer.experts.latent is None else layer.experts.merged()
    factor = router.config.routed_scaling_factor or 1.0
    gate, up, down = (layer.central_weight(kind).t() for kind in ("gate_proj", "up", "down"))
    dtype = down.dtype  # routers and experts may be float32 beside a 16-bit network
    own = {
        "experts.gate_up_proj": torch.cat([experts.gate_proj, experts.up], 1).to(dtype),
        "experts.down_proj": (experts.down * factor).to(dtype).transpose(1, 2).contiguous(),
    }
    routes = router.weight.to(dtype)
    if to == "qwen2_moe":
        shared = {
            "gate.weight": routes,
            "shared_expert.gate_proj.weight": gate,
            "shared_expert.up_proj.weight": up,
            "shared_expert.down_proj.weight": 2 * down,  # its gate multiplies by sigmoid(0) = 1/2
            "shared_expert_gate.weight": down.new_zeros(1, layer.in_features),
        }
        return {f"{name}.{part}": value for part, value in {**own, **shared}.items()}
    place = name.rpartition(".")[0]
    return {
        **{f"{place}.block_sparse_moe.{part}": value for part, value in own.items()},
        f"{place}.block_sparse_moe.router.weight": routes,
        f"{place}.shared_mlp.input_linear.weight": torch.cat([gate, up]),
        f"{place}.shared_mlp.output_linear.weight": down,
    }
