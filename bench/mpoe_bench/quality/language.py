"""Field "language": a tiny GPT-2 from random weights on mixed domains, where capacity is the limit."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from mpoe.config import MPOEConfig
from mpoe.data.files import find_split_file, read_paragraphs, read_table
from mpoe.data.tasks import get_task
from mpoe.models import convert_to_mpoe
from mpoe_bench.quality.evaluation import Evaluation, RouterCounts

# Domain -> folder of its texts, and the columns that hold them. Documentation comes with Python.
DOMAINS: dict[str, tuple[str, tuple[str, ...]]] = {
    "novels": ("austen", ()),
    "documentation": ("", ()),
    "messages": ("sms_spam", ("sentence",)),
    "reviews": ("movie_sentiment", ("sentence",)),
    "usage examples": ("word_in_context", ("sentence1", "sentence2")),
}


def domain_texts(folder: Path, domain: str, split: str) -> list[str]:
    """The texts of a domain and split.

    Raises:
        FileNotFoundError: the data folder lacks the domain.
    """
    name, columns = DOMAINS[domain]
    if not name:
        return [example.source for example in get_task("doc_lm").examples(split)]
    file = find_split_file(folder / name, split) if (folder / name).is_dir() else None
    if file is None:
        raise FileNotFoundError(f"data_dir must hold {name}/{split}.* for the domain {domain}; {folder} does not")
    if not columns:
        return read_paragraphs(file)
    rows = read_table(file)
    return [str(row.values[column]) for row in rows for column in columns]


def byte_blocks(texts: Sequence[str], block: int) -> Tensor:
    """UTF-8 bytes of ``texts`` with a zero after each, cut into int64 ``[N, block]``; the rest is dropped."""
    data = bytearray(b"".join(text.encode() + bytes(1) for text in texts))
    count = len(data) // block
    return torch.frombuffer(data, dtype=torch.uint8)[: count * block].view(count, block).long()


@dataclass
class LanguageField:
    """Mixed-domain language modelling of bytes: a small vocabulary leaves the work to the feed-forward layers.

    Attributes:
        data_dir: folder with the sets of `DOMAINS`.
        model, layers: sizes of the GPT-2; its hidden layers are four times as wide.
        block: bytes per block.
        batch: blocks per step.
        held_out: blocks of every domain to validate on, and to test on.
        domains: a selection of `DOMAINS`.
        init_std: of the random weights. GPT-2's .02 is for models ten times as wide; here, models would learn so slowly
            that width would be mistaken for capacity.
    """

    data_dir: Path
    model: int = 48
    layers: int = 2
    block: int = 128
    batch: int = 16
    held_out: int = 64
    domains: Sequence[str] = tuple(DOMAINS)
    init_std: float = 0.1

    name = "language"
    measure = "test loss, nats per byte"
    lower_is_better = True
    reference = "dense"
    regime = "scratch"
    gauge = "identity"
    light_p = 16
    # By type of expert, the better setting on the validation split: Switch learns more with the raw gate, MPO less.
    routers: ClassVar[dict[str, dict[str, Any]]] = {"dense": {"is_scale_prob": True}}
    weight_decay = 0.01

    @property
    def hidden(self) -> int:
        return 4 * self.model

    @cached_property
    def blocks(self) -> dict[str, dict[str, Tensor]]:
        """split -> domain -> bytes ``[N, block]``."""
        result: dict[str, dict[str, Tensor]] = {}
        for split in ("train", "validation", "test"):
            result[split] = {}
            for domain in self.domains:
                ids = byte_blocks(domain_texts(self.data_dir, domain, split), self.block)
                result[split][domain] = ids if split == "train" else ids[: self.held_out]
        return result

    def dense_model(self, seed: int, hidden: int | None = None) -> GPT2LMHeadModel:
        """Random weights from ``seed``; ``hidden`` overrides the size of the hidden layers."""
        torch.manual_seed(seed)
        config = GPT2Config(
            vocab_size=256,
            n_positions=self.block,
            n_embd=self.model,
            n_layer=self.layers,
            n_head=max(self.model // 16, 1),
            n_inner=hidden or self.hidden,
            initializer_range=self.init_std,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
            use_cache=False,
        )
        model = GPT2LMHeadModel(config)
        model.loss_type = "ForCausalLM"
        return model

    def convert(self, model: nn.Module, config: MPOEConfig) -> nn.Module:
        return convert_to_mpoe(model, config, inplace=True)

    def feed_forward_weights(self, hidden: int | None = None) -> int:
        """Number of weights in all dense feed-forward layers."""
        return 2 * self.model * (hidden or self.hidden) * self.layers

    def batches(self, seed: int, steps: int) -> Iterator[dict[str, Tensor]]:
        """``steps`` batches ``[batch, block]``, the same for every arm.

        Domains are drawn in proportion to the square roots of their sizes, blocks in shuffled passes over a domain.
        """
        generator = torch.Generator().manual_seed(10_000 + seed)
        train = self.blocks["train"]
        weights = torch.tensor([math.sqrt(len(ids)) for ids in train.values()])
        pools = {domain: iter(()) for domain in train}

        def take(domain: str) -> Tensor:
            row = next(pools[domain], None)
            if row is None:
                pools[domain] = iter(train[domain][torch.randperm(len(train[domain]), generator=generator)])
                row = next(pools[domain])
            return row

        domains = list(train)
        for _ in range(steps):
            chosen = torch.multinomial(weights, self.batch, replacement=True, generator=generator).tolist()
            ids = torch.stack([take(domains[index]) for index in chosen])
            yield {"input_ids": ids, "labels": ids}

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(**batch).loss

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: str) -> Evaluation:
        """Mean over domains of the loss per byte."""
        losses: dict[str, float] = {}
        counts = RouterCounts()
        for domain, ids in self.blocks[split].items():
            total = 0.0
            for part in ids.split(self.batch):
                output = model(input_ids=part, labels=part)
                task = output.get("task_loss")
                total += float(output.loss if task is None else task) * len(part)
                counts.add(domain, output.get("expert_load"))
            losses[domain] = total / len(ids)
        return Evaluation(sum(losses.values()) / len(losses), losses, counts.summary())
