"""Tiny dense models of six structures, converted with experts that keep their projections."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor, nn

from mpoe import MPOEConfig, RouterConfig
from mpoe.models.report import hidden_modules, neuron_modules

from .tiny_models import tiny_config

T5 = {"d_model": 16, "d_ff": 24, "d_kv": 8, "num_heads": 2, "num_layers": 1, "dropout_rate": 0.0}
LLAMA = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
GPT2 = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16, "resid_pdrop": 0.0}
# name -> family, dense class, sizes
MODELS = {
    "t5": ("t5", "T5ForConditionalGeneration", T5),
    "t5_gated": ("t5", "T5ForConditionalGeneration", {**T5, "feed_forward_proj": "gated-gelu"}),
    "gpt2": ("gpt2", "GPT2LMHeadModel", GPT2),
    "bert": ("bert", "BertForMaskedLM", LLAMA),
    "llama": ("llama", "LlamaForCausalLM", {**LLAMA, "head_dim": 8}),
    "phi3": ("phi3", "Phi3ForCausalLM", {**LLAMA, "head_dim": 8}),  # gate and up in one
}
every_family = pytest.mark.parametrize("family", MODELS)


def dense(family: str) -> nn.Module:
    torch.manual_seed(0)
    model_type, dense_class, sizes = MODELS[family]
    model = getattr(transformers, dense_class)(tiny_config(model_type, **{"vocab_size": 40, **sizes})).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.3)
    return model


# name -> the fields of its configuration
KEPT = {
    "hidden": {"shape": "hidden", "block_size": 8},
    "neurons": {"shape": "neurons", "neurons": 8},
    "latent": {"shape": "neurons", "neurons": 8, "latent": 6},
}
every_kind = pytest.mark.parametrize("kind", KEPT)


def config(kind: str, top_k: int = 2, router: dict | None = None, **fields) -> MPOEConfig:
    values = {"num_experts": 4, **KEPT[kind], **fields}
    return MPOEConfig(router=RouterConfig(top_k=top_k, **(router or {})), **values)


def batch(family: str) -> dict[str, Tensor]:
    ids = torch.randint(1, 40, (2, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask, **({"labels": ids} if family.startswith("t5") else {})}


def stirred(model: nn.Module) -> nn.Module:
    """The same model with experts that contribute: random blocks and expert biases, neurons' results of any size."""
    torch.manual_seed(3)
    for layer in hidden_modules(model).values():
        for parameter in layer.experts.parameters():
            nn.init.normal_(parameter, std=0.4)
    for layer in neuron_modules(model).values():
        nn.init.normal_(layer.experts.down, std=0.4)
        if layer.experts.bias is not None:
            nn.init.normal_(layer.experts.bias, std=0.4)
    return model


def logits(model: nn.Module, family: str) -> Tensor:
    with torch.no_grad():
        found = model(**batch(family)).logits
    return found if family.startswith("t5") else found[batch(family)["attention_mask"].bool()]
