"""A model's predictions for a task (texts, labels or the mean loss of running text) and their
scores."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mpoe.config.checks import check_integer
from mpoe.data.encode import (
    IGNORED_LABEL,
    Item,
    as_batches,
    encode_language_modeling,
    encode_responses,
    encode_text_to_text,
    prompt_ids,
)
from mpoe.data.task import Example, Task

Batch = Mapping[str, Tensor]  # arguments of a model by name


def is_classifier(model: Any) -> bool:
    """Whether ``model`` is an encoder with a head for labels or numbers."""
    return type(model).__name__.endswith("ForSequenceClassification")


def _is_decoder(model: Any) -> bool:
    """Whether ``model`` continues what it reads; what is no Transformers model reads and writes
    apart."""
    config = getattr(model, "config", None)
    return not is_classifier(model) and not getattr(config, "is_encoder_decoder", True)


@torch.inference_mode()
def generate_texts(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    max_source_length: int = 96,
    max_new_tokens: int = 8,
    batch_size: int = 128,
) -> list[str]:
    """Answers to N items, in their order: what an encoder-decoder or a decoder writes (greedily,
    without special tokens), or the labels, or the numbers as texts, that an encoder's head gives.

    Items are batched by length, so that little padding is computed. The model's mode and device are
    not changed.
    """
    check_integer("max_new_tokens", max_new_tokens, 1)
    check_integer("batch_size", batch_size, 1)
    if is_classifier(model):
        sources = [example.source for example in examples]
        rows = tokenizer(sources, truncation=True, max_length=max_source_length)["input_ids"]
    elif _is_decoder(model):
        rows = [prompt_ids(example, tokenizer)[-max_source_length:] for example in examples]
    else:
        items = encode_text_to_text(examples, tokenizer, max_source_length)
        rows = [item["input_ids"] for item in items]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    side = "left" if _is_decoder(model) else "right"  # a decoder continues at the end
    texts = [""] * len(rows)
    with evaluation_mode(model):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            inputs = tokenizer.pad(
                {"input_ids": [rows[i] for i in chosen]},
                padding_side=side,
                return_attention_mask=True,
                return_tensors="pt",
                verbose=False,
            ).to(model.device)
            answers = _answers(model, tokenizer, inputs, max_new_tokens)
            for i, text in zip(chosen, answers, strict=True):
                texts[i] = text
    return texts


def _answers(model: Any, tokenizer: Any, inputs: Batch, max_new_tokens: int) -> list[str]:
    if is_classifier(model):
        logits = model(**inputs).logits.float().cpu()
        if model.config.problem_type == "regression":
            return [repr(number) for number in logits[:, 0].tolist()]
        return [model.config.id2label[index] for index in logits.argmax(1).tolist()]
    options = {"max_new_tokens": max_new_tokens, "do_sample": False, "num_beams": 1}
    if _is_decoder(model):
        options["pad_token_id"] = tokenizer.pad_token_id
    ids = model.generate(**inputs, **options)
    written = ids[:, inputs["input_ids"].shape[1] :] if _is_decoder(model) else ids
    return [text.strip() for text in tokenizer.batch_decode(written, skip_special_tokens=True)]


@torch.inference_mode()
def token_losses(model: Any, batches: Iterable[Batch]) -> Tensor:
    """Losses in nats of the tokens that ``labels`` name, in order: those of decoders are predicted
    one place before.

    They are computed from the logits, so auxiliary losses of a mixture model are not part of them.

    Raises:
        ValueError: batches without labels, or none that counts.
    """
    decodes = not getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    losses = []
    for batch in batches:
        if "labels" not in batch:
            raise ValueError(f"batches must hold labels; got {', '.join(batch)}")
        moved = {name: value.to(model.device) for name, value in batch.items()}
        labels = moved.pop("labels")[:, 1:] if decodes else moved["labels"]
        logits = model(**moved).logits
        logits = logits[:, :-1] if decodes else logits
        counted = labels != IGNORED_LABEL
        losses.append(F.cross_entropy(logits[counted].float(), labels[counted], reduction="none"))
    if not sum(map(len, losses)):
        raise ValueError("batches must hold tokens to predict; got none")
    return torch.cat(losses)


def language_modeling_loss(
    model: Any, tokenizer: Any, items: Sequence[Item], batch_size: int = 32
) -> float:
    """Mean loss in nats per predicted token of a causal model on encoded blocks or responses
    (labels of -100 are not predicted), see `token_losses`."""
    if not items:
        raise ValueError("items must hold at least one block or response; got none")
    with evaluation_mode(model):
        losses = token_losses(model, as_batches(items, tokenizer, batch_size))
    return float(losses.double().mean())


@dataclass(frozen=True)
class Evaluation:
    """A model's scores on a task.

    Attributes:
        scores: by metric, in the order of ``task.metrics``; a decoder adds ``loss``, nats per token
            of the text or the responses. Perplexity is per token of the tokenizer.
        constant: the same metrics for an answer that ignores the input: the most frequent target of
            these items, the mean of their numbers, or the frequencies of their tokens (see
            `constant_scores`).
        collapse: a sentence if the answers have collapsed to few values, else None.
    """

    scores: dict[str, float]
    constant: dict[str, float]
    collapse: str | None = None


def evaluate_task(
    model: Any, tokenizer: Any, task: Task, split: str = "validation", batch_size: int = 128
) -> Evaluation:
    """`Evaluation` of ``model`` on the items of a split."""
    examples = task.examples(split)
    if not examples:
        raise ValueError(f"split {split} of task {task.name} has no items")
    if task.kind == "language_modeling":
        blocks = encode_language_modeling(examples, tokenizer, task.max_source_length)
        loss = language_modeling_loss(model, tokenizer, blocks, max(1, batch_size // 4))
        guess = frequency_perplexity(token for block in blocks for token in block["input_ids"][1:])
        perplexity = math.exp(loss) if loss < 700 else math.inf
        return Evaluation({"perplexity": perplexity, "loss": loss}, {"perplexity": guess})
    lengths = (task.max_source_length, task.max_target_length)
    targets = [example.target for example in examples]
    answers = generate_texts(model, tokenizer, examples, *lengths, batch_size)
    if is_classifier(model):
        targets = [e.target if e.number is None else repr(e.number) for e in examples]
    scores = task.score(answers, targets)
    if _is_decoder(model):
        items = encode_responses(examples, tokenizer, *lengths)
        scores["loss"] = language_modeling_loss(model, tokenizer, items, max(1, batch_size // 4))
    return Evaluation(scores, constant_scores(task, targets), collapse(answers, targets))


@contextmanager
def evaluation_mode(model: Any) -> Iterator[None]:
    """``model`` in evaluation mode inside, in its former mode outside."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


# ---- the scores of an answer that ignores the input: if nine of ten labels are equal, a constant
# answer reaches 90%


def constant_scores(task: Task, targets: Sequence[str]) -> dict[str, float]:
    """Every metric of a task for the best constant answer to ``targets`` [N], N >= 1: the most
    frequent target (on ties the first), or the mean of the numbers. Correlations of a constant are
    0."""
    answer = Counter(targets).most_common(1)[0][0]
    if task.kind == "regression":
        answer = repr(sum(map(float, targets)) / len(targets))
    return task.score([answer] * len(targets), targets)


def frequency_perplexity(tokens: Iterable[int]) -> float:
    """Perplexity per token of guessing every token by its frequency among ``tokens``: exp of their
    entropy."""
    counts = Counter(tokens)
    total = counts.total()
    if not total:
        return math.nan
    return math.exp(-sum(n / total * math.log(n / total) for n in counts.values()))


def collapse(answers: Sequence[str], targets: Sequence[str]) -> str | None:
    """A sentence if ``answers`` ``[N]`` have collapsed to few values while ``targets`` ``[N]`` have
    not, else None."""
    if len(answers) < 2 or len(set(targets)) < 2:
        return None
    counts = Counter(answers)
    answer, most = counts.most_common(1)[0]
    share = most / len(answers)
    expected = Counter(targets)[answer] / len(targets)
    if share >= 0.95 and share - expected > 0.1:  # the expected ones are not nearly as uniform
        shown = repr(answer if len(answer) <= 40 else answer[:37] + "...")
        common = f"{share:.0%} of the {len(answers)} answers are {shown}"
        return f"{common}, which {expected:.0%} of the expected ones are"
    if len(counts) * 5 <= len(set(targets)):
        different = f"the {len(answers)} answers have {len(counts)} different values"
        return f"{different}, the expected ones {len(set(targets))}"
    return None
