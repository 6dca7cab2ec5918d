"""A model's predictions for a task (generated texts, or the mean loss of running text) and their scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from mpoe.data.baseline import baseline_scores, collapse, frequency_perplexity
from mpoe.data.collate import PaddingCollator
from mpoe.data.encode import encode_language_modeling, encode_text_to_text
from mpoe.data.metrics import perplexity
from mpoe.data.task import Example, Task


@torch.inference_mode()
def generate_texts(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    max_source_length: int = 96,
    max_new_tokens: int = 8,
    batch_size: int = 128,
) -> list[str]:
    """Greedy answers of an encoder-decoder model to N items, in their order, without special tokens.

    Items are batched by length, so that little padding is computed. The model's mode and device are not changed.
    """
    if max_new_tokens < 1 or batch_size < 1:
        raise ValueError(f"max_new_tokens and batch_size must be >= 1; got {max_new_tokens} and {batch_size}")
    encoded = encode_text_to_text([Example(e.source) for e in examples], tokenizer, max_source_length)
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]["input_ids"]))
    collate = PaddingCollator(tokenizer.pad_token_id)
    answers = [""] * len(encoded)
    with evaluation_mode(model):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = collate([encoded[i] for i in chosen])
            ids = model.generate(
                input_ids=batch["input_ids"].to(model.device),
                attention_mask=batch["attention_mask"].to(model.device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
            )
            for i, text in zip(chosen, tokenizer.batch_decode(ids, skip_special_tokens=True), strict=True):
                answers[i] = text.strip()
    return answers


@torch.inference_mode()
def language_modeling_loss(
    model: Any, blocks: Sequence[dict[str, list[int]]], batch_size: int = 32
) -> tuple[float, int]:
    """(mean loss in nats per predicted token, number of predicted tokens) of a causal model on encoded blocks.

    The loss is computed from the logits, so auxiliary losses of a mixture model are not part of it.
    """
    if not blocks:
        raise ValueError("blocks must hold at least one block; got none")
    total, count = 0.0, 0
    with evaluation_mode(model):
        for start in range(0, len(blocks), batch_size):
            chosen = blocks[start : start + batch_size]
            ids = torch.tensor([block["input_ids"] for block in chosen], device=model.device)  # [B, S]
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, :-1]
            losses = torch.nn.functional.cross_entropy(
                logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
            )
            total += float(losses)
            count += ids[:, 1:].numel()
    return total / count, count


@dataclass(frozen=True)
class Evaluation:
    """A model's scores on a task.

    Attributes:
        scores: by metric, in the order of ``task.metrics``; language modelling adds ``loss``, nats per token.
        baseline: the same metrics for an answer that ignores the input: the most frequent target of these items, the
            mean of their numbers, or the frequencies of their tokens (see `mpoe.data.baseline`).
        collapse: a sentence if the answers have collapsed to few values, else None.
    """

    scores: dict[str, float]
    baseline: dict[str, float]
    collapse: str | None = None


def evaluate_beside_baseline(
    model: Any,
    tokenizer: Any,
    task: Task,
    split: str = "validation",
    n: int | None = None,
    seed: int = 0,
    batch_size: int = 128,
) -> Evaluation:
    """`Evaluation` of ``model`` on (a random subset of n items of) a split."""
    examples = task.examples(split, n, seed)
    if not examples:
        raise ValueError(f"split {split} of task {task.name} has no items")
    if task.kind == "language_modeling":
        blocks = encode_language_modeling(examples, tokenizer, task.max_source_length)
        loss, _ = language_modeling_loss(model, blocks, max(1, batch_size // 4))
        guess = frequency_perplexity(token for block in blocks for token in block["input_ids"][1:])
        return Evaluation({"perplexity": perplexity([loss]), "loss": loss}, {"perplexity": guess})
    answers = generate_texts(model, tokenizer, examples, task.max_source_length, task.max_target_length, batch_size)
    targets = [example.target for example in examples]
    return Evaluation(task.score(answers, targets), baseline_scores(task, targets), collapse(answers, targets))


def evaluate_task(
    model: Any,
    tokenizer: Any,
    task: Task,
    split: str = "validation",
    n: int | None = None,
    seed: int = 0,
    batch_size: int = 128,
) -> dict[str, float]:
    """Scores of ``model`` on (a random subset of n items of) a split, in the order of ``task.metrics``.

    Perplexity is per token of ``tokenizer``; language modelling adds ``loss``, nats per token.
    """
    return evaluate_beside_baseline(model, tokenizer, task, split, n, seed, batch_size).scores


@contextmanager
def evaluation_mode(model: Any) -> Iterator[None]:
    """``model`` in evaluation mode inside, in its former mode outside."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
