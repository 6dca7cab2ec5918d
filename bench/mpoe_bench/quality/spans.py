"""Field "spans": a tiny T5 from random weights restores spans of mixed domains' bytes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

from mpoe_bench.quality.evaluation import Evaluation, RouterCounts
from mpoe_bench.quality.language import LanguageField

SPANS, LENGTH = 6, 5  # per block: 6 spans of 5 bytes
FIRST_SENTINEL = 256
END = FIRST_SENTINEL + SPANS


def corrupt(ids: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """T5's span corruption (Raffel et al. 2020, section 3.1.4) of ``ids [N, S]``, with spans of one length.

    Every stretch of ``S // SPANS`` bytes loses one span at a random place. Returns the inputs
    ``[N, S - SPANS * (LENGTH - 1)]``, a sentinel for each span, and the labels ``[N, SPANS * (LENGTH + 1) + 1]``: every
    sentinel, its span, and the end.
    """
    count, size = ids.shape
    stretch = size // SPANS
    starts = torch.randint(stretch - LENGTH, (count, SPANS), generator=generator) + torch.arange(SPANS) * stretch
    lost = starts[..., None] + torch.arange(LENGTH)
    sentinels = torch.arange(FIRST_SENTINEL, END).expand(count, SPANS)
    labels = torch.cat([sentinels[..., None], ids.gather(1, lost.flatten(1)).view_as(lost)], -1).flatten(1)
    kept = torch.ones_like(ids, dtype=torch.bool).scatter_(1, lost[..., 1:].flatten(1), False)
    inputs = ids.scatter(1, starts, sentinels)[kept].view(count, -1)
    return inputs, torch.cat([labels, labels.new_full((count, 1), END)], 1)


@dataclass
class SpansField(LanguageField):
    """Span corruption; encoder and decoder have ``layers`` layers each."""

    name = "spans"
    measure = "test loss, nats per label"

    @cached_property
    def held_out_spans(self) -> dict[str, dict[str, tuple[Tensor, Tensor]]]:
        """split -> domain -> inputs and labels, the same in every evaluation."""
        return {
            split: {domain: corrupt(ids, torch.Generator().manual_seed(0)) for domain, ids in parts.items()}
            for split, parts in self.blocks.items()
            if split != "train"
        }

    def dense_model(self, seed: int, hidden: int | None = None) -> nn.Module:
        """Random weights from ``seed``; ``hidden`` overrides the size of the hidden layers."""
        torch.manual_seed(seed)
        config = T5Config(
            vocab_size=END + 1,
            d_model=self.model,
            d_kv=16,
            d_ff=hidden or self.hidden,
            num_layers=self.layers,
            num_heads=max(self.model // 16, 1),
            dropout_rate=0.0,
            pad_token_id=END,
            eos_token_id=END,
            decoder_start_token_id=END,
            use_cache=False,
        )
        return T5ForConditionalGeneration(config)

    def feed_forward_weights(self, hidden: int | None = None) -> int:
        """Number of weights in all dense feed-forward layers of encoder and decoder."""
        return 2 * super().feed_forward_weights(hidden)

    def batches(self, seed: int, steps: int) -> Iterator[dict[str, Tensor]]:
        """As in `LanguageField.batches`, with spans removed at random places."""
        generator = torch.Generator().manual_seed(11_000 + seed)
        for batch in super().batches(seed, steps):
            inputs, labels = corrupt(batch["input_ids"], generator)
            yield {"input_ids": inputs, "labels": labels}

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: str) -> Evaluation:
        """Mean over domains of the loss per label."""
        losses: dict[str, float] = {}
        counts = RouterCounts()
        for domain, (inputs, labels) in self.held_out_spans[split].items():
            output = model(input_ids=inputs, labels=labels)
            task = output.get("task_loss")
            losses[domain] = float(output.loss if task is None else task)
            counts.add(domain, output.get("expert_load"))
        return Evaluation(sum(losses.values()) / len(losses), losses, counts.summary())
