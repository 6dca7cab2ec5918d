"""Field "novels": SmolLM2-135M learns novels, or a mixture of domains, with a small part of its parameters."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mpoe.config import MPOEConfig
from mpoe.data.encode import encode_language_modeling
from mpoe.models import convert_to_mpoe
from mpoe_bench.quality.evaluation import Evaluation, RouterCounts
from mpoe_bench.quality.language import domain_texts
from mpoe_bench.quality.mixture_of_lora import balance_losses
from mpoe_bench.quality.smollm import load


@dataclass
class NovelsField:
    """Language modelling from a pretrained model; ways to adapt it are compared.

    Attributes:
        data_dir: folder with the sets of `domains`.
        block: tokens per block.
        batch: blocks per step.
        held_out: blocks of every domain to validate on, and to test on.
        domains: a selection of those of the field "language". Batches take blocks from each of them in turn.
        given: (model, tokenizer) instead of SmolLM2, for tests.
    """

    data_dir: Path
    block: int = 128
    batch: int = 4
    held_out: int = 16
    domains: Sequence[str] = ("novels",)
    given: tuple[Any, Any] | None = None

    name = "novels"
    measure = "test loss, nats per token"
    lower_is_better = True
    reference = "lora16"
    regime = "finetune"
    gauge = "symmetric"
    light_p = 64
    routers: ClassVar[dict[str, dict[str, Any]]] = {}
    weight_decay = 0.0
    lora_targets = ("gate_proj", "up_proj", "down_proj")

    @cached_property
    def source(self) -> tuple[Any, Any]:
        return self.given or load()

    @property
    def model(self) -> int:
        return self.source[0].config.hidden_size

    @property
    def hidden(self) -> int:
        return self.source[0].config.intermediate_size

    @cached_property
    def blocks(self) -> dict[str, dict[str, Tensor]]:
        """split -> domain -> token ids ``[N, block]``."""
        result: dict[str, dict[str, Tensor]] = {}
        for split in ("train", "validation", "test"):
            result[split] = {}
            for domain in self.domains:
                texts = domain_texts(self.data_dir, domain, split)
                rows = encode_language_modeling(texts, self.source[1], self.block)
                ids = torch.tensor([row["input_ids"] for row in rows])
                result[split][domain] = ids if split == "train" else ids[: self.held_out]
        return result

    @cached_property
    def before(self) -> float:
        """The pretrained model's test loss."""
        return self.evaluate(self.source[0].eval(), "test").score

    def dense_model(self, seed: int, hidden: int | None = None) -> nn.Module:
        """A copy of the pretrained model; nothing in it is random, and it cannot be widened."""
        if hidden:
            raise ValueError(f"arms of the field novels have the pretrained model's size; got hidden size {hidden}")
        return copy.deepcopy(self.source[0])

    def convert(self, model: nn.Module, config: MPOEConfig) -> nn.Module:
        return convert_to_mpoe(model, config, inplace=True)

    def feed_forward_weights(self, hidden: int | None = None) -> int:
        """Number of weights in all dense feed-forward layers."""
        return 3 * self.model * (hidden or self.hidden) * self.source[0].config.num_hidden_layers

    def batches(self, seed: int, steps: int) -> Iterator[dict[str, Tensor]]:
        """``steps`` batches ``[batch, block]`` from shuffled passes over every domain, the same for every arm."""
        generator = torch.Generator().manual_seed(10_000 + seed)
        passes = [_passes(part, generator) for part in self.blocks["train"].values()]
        turn = itertools.cycle(passes)
        for _ in range(steps):
            ids = torch.stack([next(next(turn)) for _ in range(self.batch)])
            yield {"input_ids": ids, "labels": ids}

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(**batch).loss + balance_losses(model)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: str) -> Evaluation:
        """Mean loss per token, without the routers' loss; every domain has the same weight."""
        parts, counts = dict.fromkeys(self.domains, 0.0), RouterCounts()
        for domain, blocks in self.blocks[split].items():
            for part in blocks.split(self.batch):
                output = model(input_ids=part, labels=part)
                task = output.get("task_loss")
                parts[domain] += float(output.loss if task is None else task) * len(part) / len(blocks)
                counts.add(domain, output.get("expert_load"))
        return Evaluation(sum(parts.values()) / len(parts), parts, counts.summary())


def _passes(blocks: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
    """One block after another, with a new order in every pass."""
    while True:
        yield from blocks[torch.randperm(len(blocks), generator=generator)]
