"""Held-out numbers: generated answers scored by their task, or perplexity for language models."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from mpoe.data.task import Task

Items = Sequence[dict[str, list[int]]]
Progress = Callable[[int], None]


def _nothing(_: int) -> None:
    return None


def _batches(items: Items, batch_size: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, so that little of a batch is padding."""
    order = sorted(range(len(items)), key=lambda i: len(items[i]["input_ids"]))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def generate_texts(
    model: Any,
    tokenizer: Any,
    items: Items,
    max_new_tokens: int,
    batch_size: int = 256,
    progress: Progress = _nothing,
    **generation: Any,
) -> list[str]:
    """Texts a T5-like model writes for encoded items, in their order; greedy unless ``generation`` says otherwise."""
    import torch

    from mpoe.data.collate import PaddingCollator

    collate = PaddingCollator(tokenizer.pad_token_id)
    texts = [""] * len(items)
    model.eval()
    with torch.inference_mode():
        for indices in _batches(items, batch_size):
            batch = collate([items[i] for i in indices])
            out = model.generate(
                input_ids=batch["input_ids"].to(model.device),
                attention_mask=batch["attention_mask"].to(model.device),
                max_new_tokens=max_new_tokens,
                **({"do_sample": False, "num_beams": 1} | generation),
            )
            for index, text in zip(indices, tokenizer.batch_decode(out, skip_special_tokens=True), strict=True):
                texts[index] = text.strip()
            progress(len(indices))
    return texts


def forward_pass(
    model: Any, items: Items, pad_token_id: int, causal: bool, batch_size: int = 64, progress: Progress = _nothing
) -> dict[str, Any]:
    """Loss and expert load of teacher-forced items.

    Args:
        model: a dense or MPOE model, in eval mode for the call.
        items: N encoded items.
        causal: labels are shifted by one (GPT-2) or not (T5).

    Returns:
        ``loss``: nats per label token, without any auxiliary loss; ``tokens``: how many; ``expert_load``: tokens per
        expert, nested lists [layers][E] (empty for dense models).
    """
    import torch
    from torch.nn import functional

    from mpoe.data.collate import IGNORED_LABEL, PaddingCollator

    collate = PaddingCollator(pad_token_id)
    total, tokens = 0.0, 0
    load: torch.Tensor | None = None
    model.eval()
    with torch.inference_mode():
        for indices in _batches(items, batch_size):
            batch = {k: v.to(model.device) for k, v in collate([items[i] for i in indices]).items()}
            out = model(**batch)
            logits, labels = out.logits, batch["labels"]
            if causal:
                logits, labels = logits[:, :-1], labels[:, 1:]
            flat = labels.reshape(-1)
            total += functional.cross_entropy(
                logits.reshape(-1, logits.shape[-1]).float(), flat, ignore_index=IGNORED_LABEL, reduction="sum"
            ).item()
            tokens += int((flat != IGNORED_LABEL).sum())
            part = getattr(out, "expert_load", None)
            if part is not None:
                load = part.clone() if load is None else load + part
            progress(len(indices))
    return {"loss": total / max(1, tokens), "tokens": tokens, "expert_load": [] if load is None else load.tolist()}


def encode_task(task: Task, split: str, tokenizer: Any, limit: int | None = None, seed: int = 0) -> list[dict[str, Any]]:
    """A task's items as token ids; for language modelling blocks of ``max_source_length`` tokens."""
    from mpoe.data.encode import encode_language_modeling, encode_text_to_text

    if task.kind == "language_modeling":
        blocks = encode_language_modeling(task.examples(split), tokenizer, task.max_source_length)
        return blocks if limit is None else blocks[:limit]
    examples = task.examples(split, limit, seed)
    return encode_text_to_text(examples, tokenizer, task.max_source_length, task.max_target_length)


def evaluate_task(
    model: Any,
    tokenizer: Any,
    task: Task,
    split: str,
    *,
    limit: int | None = None,
    batch_size: int = 256,
    seed: int = 0,
    progress: Progress = _nothing,
) -> dict[str, float]:
    """The task's metrics on a split, and ``items``: how many were scored (language modelling: blocks of text)."""
    items = encode_task(task, split, tokenizer, limit, seed)
    if not items:
        raise ValueError(f"split {split} of task {task.name} holds no items")
    if task.kind == "language_modeling":
        out = forward_pass(model, items, tokenizer.pad_token_id, causal=True, batch_size=32, progress=progress)
        return {"perplexity": math.exp(min(out["loss"], 50.0)), "loss": out["loss"], "items": len(items)}
    texts = generate_texts(model, tokenizer, items, task.max_target_length, batch_size, progress)
    references = [example.target for example in task.examples(split, limit, seed)]
    return {**task.score(texts, references), "items": len(items)}


def evaluate_tasks(
    model: Any, tokenizer: Any, tasks: Sequence[Task], split: str, **options: Any
) -> dict[str, dict[str, float]]:
    """`evaluate_task` for every task, by name; the first entry of each is the metric it is judged by."""
    return {task.name: evaluate_task(model, tokenizer, task, split, **options) for task in tasks}
