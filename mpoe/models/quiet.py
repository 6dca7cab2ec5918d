"""How quiet an expert is: what a model gains on a domain, and what it changes of what its base says
by itself."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mpoe.data.predict import Batch, evaluation_mode, token_losses
from mpoe.models.background import chat_opening, own_chats, own_texts, token_batches

HELD_OUT = 8  # samples of each kind, which no background has
SEED = 1_000  # of these samples, far from those of backgrounds
AT_ONCE = 4  # rows whose logits are held at once


@dataclass(frozen=True)
class OwnWords:
    """Samples of a base that no background has.

    Attributes:
        texts: int64 ``[N, length]``, from the start token.
        chats: int64 ``[N, length]``, questions and answers; ``None`` without a chat template.
        opening: tokens of ``chats`` before the base's first own one.
    """

    texts: Tensor
    chats: Tensor | None
    opening: int


@dataclass(frozen=True)
class Change:
    """What a model does beside its base.

    Attributes:
        domain: loss on the domain's held-out texts, nats per token; ``None`` where there are none.
        own_texts: loss on the base's own texts, nats per token.
        answers: KL divergence from the base to the model on the base's own chats (its texts without
            a chat template), nats per token.
        same: share of these tokens for which both find the same token most probable.
    """

    domain: float | None
    own_texts: float
    answers: float
    same: float


def sample_own_words(base: Any, tokenizer: Any) -> OwnWords:
    """Texts and chats of a causal model for `measure_change`; errors as `own_texts`."""
    texts = own_texts(base, tokenizer, SEED, HELD_OUT)
    chats = own_chats(base, tokenizer, SEED + 1, HELD_OUT)
    return OwnWords(texts, chats, len(chat_opening(tokenizer) or []))


def mean_loss(model: Any, batches: Iterable[Batch]) -> float:
    """Nats per token that ``labels`` name."""
    with evaluation_mode(model):
        return float(token_losses(model, batches).double().mean())


@torch.inference_mode()
def measure_change(
    base: Any,
    models: Mapping[str, Any],
    words: OwnWords,
    domain: Sequence[Batch] | None = None,
) -> dict[str, Change]:
    """What each of several models changes, and the base itself under the name ``base``.

    Args:
        base: the dense model.
        models: by name.
        words: see `sample_own_words`.
        domain: batches of held-out texts with ``labels``, or ``None``.
    """
    compared = {"base": base, **models}
    chats, opening = (words.texts, 1) if words.chats is None else (words.chats, words.opening)

    def log_probabilities(model: Any, rows: Tensor) -> Tensor:
        rows = rows.to(base.device)
        with evaluation_mode(model):
            logits = model(input_ids=rows, attention_mask=torch.ones_like(rows)).logits
        return logits[:, opening - 1 : -1].float().log_softmax(-1)

    divergence = dict.fromkeys(compared, 0.0)
    same = dict.fromkeys(compared, 0)
    count = 0
    for rows in chats.split(AT_ONCE):
        before = log_probabilities(base, rows)
        count += before[..., 0].numel()
        for name, model in compared.items():
            after = log_probabilities(model, rows)
            divergence[name] += float((before.exp() * (before - after)).sum())
            same[name] += int((before.argmax(-1) == after.argmax(-1)).sum())
    texts = [batch | {"labels": batch["input_ids"]} for batch in token_batches(words.texts)]
    return {
        name: Change(
            domain=mean_loss(model, domain) if domain else None,
            own_texts=mean_loss(model, texts),
            answers=divergence[name] / count,
            same=same[name] / count,
        )
        for name, model in compared.items()
    }
