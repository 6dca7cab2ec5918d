"""A small language model, and texts of domains with disjoint vocabularies, for experts that are trained apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from mpoe import start_expert
from mpoe.models.report import neuron_modules

VOCABULARY, DOMAIN = 60, 15  # tokens; tokens of each domain, from its number times this on
M = 32


def tokenizer(words: int = VOCABULARY) -> Any:
    def encode(text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) % VOCABULARY for letter in text]}

    encode.get_vocab = lambda: {f"w{i}": i for i in range(words)}
    return encode


def stirred(model: nn.Module, seed: int = 0) -> Any:
    """A model whose expert contributes."""
    torch.manual_seed(seed)
    for layer in neuron_modules(model).values():
        for parameter in layer.experts.parameters():
            nn.init.normal_(parameter, std=0.3)
    return model


def domain(number: int, seed: int = 0, rows: int = 32) -> list[dict[str, torch.Tensor]]:
    """Texts of one domain: every token is followed by a fixed one of the same domain, or, one in five, by any."""
    generator = torch.Generator().manual_seed(100 * number + seed)
    follower = torch.randperm(DOMAIN, generator=torch.Generator().manual_seed(number))
    ids = torch.randint(DOMAIN, (rows, 16), generator=generator)
    for place in range(1, 16):
        follows = torch.rand(rows, generator=generator) < 0.8
        ids[:, place] = torch.where(follows, follower[ids[:, place - 1]], ids[:, place])
    ids = ids + number * DOMAIN
    return [{"input_ids": part, "labels": part} for part in ids.split(16)]


def language_model() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=32, pad_token_id=0, **sizes)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.1)
    return model


@torch.no_grad()
def loss(model: Any, number: int) -> float:
    return sum(float(model.eval()(**each).loss) for each in domain(number, seed=9)) / 2


def trained(base: Any, number: int) -> Any:
    torch.manual_seed(number)
    model = start_expert(base, M).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for step in range(60):
        for each in domain(number, seed=step % 8):
            model(**each).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return model.eval()
