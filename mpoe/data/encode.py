"""From texts to token ids: text-to-text pairs for T5, running text or responses for GPT-2, labels
for BERT."""

import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from mpoe.config.checks import check_integer
from mpoe.data.task import Example

IGNORED_LABEL = -100
AT_ONCE = 8  # items of a batch
Item = dict[str, Any]  # arguments of a model by name: lists of an item, tensors of a batch
MOST_JOINED = 1 << 20  # characters of running text that are tokenised at once


def padding_collator(tokenizer: Any, has_classes: bool = False) -> Any:
    """Transformers' collator of the items: labels are padded too, with -100, unless each is a class
    or a number.

    It pads on the right: padding before the text would move it to other positions.

    Raises:
        ValueError: a tokenizer without a padding token.
    """
    from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding

    if tokenizer.pad_token is None:
        raise ValueError(
            "tokenizer must have a pad_token (tokenizer.pad_token = tokenizer.eos_token); it has "
            "none"
        )
    padding = copy.copy(tokenizer)
    padding.padding_side = "right"
    return (DataCollatorWithPadding if has_classes else DataCollatorForSeq2Seq)(padding)


def as_batches(items: Sequence[Item], tokenizer: Any, at_once: int = AT_ONCE) -> Iterator[Item]:
    """Encoded items, padded to the longest of each batch."""
    collate = padding_collator(tokenizer)
    for start in range(0, len(items), at_once):
        yield dict(collate(items[start : start + at_once]))


def encoded_item(ids: list[int], labels: Any) -> Item:
    """What a model reads of one item, none of it padding."""
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


def encode_text_to_text(
    examples: Sequence[Example],
    tokenizer: Any,
    max_source_length: int = 96,
    max_target_length: int = 16,
) -> list[Item]:
    """Model inputs of text-to-text items.

    Args:
        examples: N items.
        tokenizer: a Hugging Face tokenizer whose post-processing ends every text with its end
            token, as T5's does.
        max_source_length, max_target_length: in tokens, the end token included; longer texts are
            cut before it.

    Returns:
        N dictionaries of lists: ``input_ids`` [S], ``attention_mask`` [S] and ``labels`` [L].

    Raises:
        ValueError: a length below 2 (one token and the end token), or a tokenizer that ends no
            text.
    """
    check_integer("max_source_length", max_source_length, 2)  # a token and the end token
    check_integer("max_target_length", max_target_length, 2)
    if not examples:
        return []
    sources = tokenizer(
        [e.source for e in examples], truncation=True, max_length=max_source_length
    )["input_ids"]
    targets = tokenizer(
        [e.target for e in examples], truncation=True, max_length=max_target_length
    )["input_ids"]
    if any(ids[-1:] != [tokenizer.eos_token_id] for ids in targets):
        raise ValueError(
            f"tokenizer must end every text with its end token {tokenizer.eos_token!r}, as T5's "
            f"does; {type(tokenizer).__name__} does not (is it a tokenizer for a decoder-only "
            "model?)"
        )
    return [encoded_item(*pair) for pair in zip(sources, targets, strict=True)]


def encode_language_modeling(
    texts: Iterable[str | Example], tokenizer: Any, block_size: int = 128
) -> list[Item]:
    """Blocks of running text for a causal language model.

    The texts are tokenised, each with the end token after it, and cut into blocks of ``block_size``
    tokens; the incomplete block at the end is dropped. Examples that do not end, as the sections of
    a text file, have nothing between them. Labels equal the ids (the model shifts them).

    Returns:
        dictionaries of lists, each [block_size]: ``input_ids``, ``attention_mask``, ``labels``.

    Raises:
        ValueError: block_size < 2, no end token, or not enough text for one block.
    """
    check_integer("block_size", block_size, 2)
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"tokenizer must have an end token (eos_token); {type(tokenizer).__name__} has none"
        )
    joined = list(_whole_texts(texts))
    stream: list[int] = []
    # The tokenizer's warning about its model_max_length does not apply to a stream.
    plain = [text for text, _ in joined]
    encoded = (
        tokenizer(plain, add_special_tokens=False, verbose=False)["input_ids"] if plain else []
    )
    for ids, (_, ends) in zip(encoded, joined, strict=True):
        stream += ids
        if ends:
            stream.append(tokenizer.eos_token_id)
    if len(stream) < block_size:
        raise ValueError(
            f"texts must give at least one block of block_size={block_size} tokens; got "
            f"{len(stream)} tokens from {len(plain)} texts"
        )
    starts = range(0, len(stream) - block_size + 1, block_size)
    blocks = (stream[start : start + block_size] for start in starts)
    return [encoded_item(block, list(block)) for block in blocks]


def _whole_texts(texts: Iterable[str | Example]) -> Iterator[tuple[str, bool]]:
    """Every text, and whether it ends. Examples that do not end are joined up to `MOST_JOINED`
    characters: a tokenizer that saw them one by one would make other tokens at their edges."""
    parts: list[str] = []
    length = 0
    for text in texts:
        example = text if isinstance(text, Example) else Example(text)
        parts.append(example.source)
        length += len(example.source)
        if example.ends or length >= MOST_JOINED:
            yield "".join(parts), example.ends
            parts = []
            length = 0
    if parts:
        yield "".join(parts), False


def encode_labels(
    examples: Sequence[Example], tokenizer: Any, labels: Sequence[str], max_length: int = 128
) -> list[Item]:
    """Items for an encoder with a head: ``labels`` is the target's index in ``labels``, or without
    them its number.

    Raises:
        ValueError: a target that is not among ``labels``.
    """
    encoded = tokenizer([e.source for e in examples], truncation=True, max_length=max_length)[
        "input_ids"
    ]
    for e in examples:
        if labels and e.target not in labels:
            raise ValueError(
                f"targets must be among {', '.join(labels)}, which the model tells apart; got "
                f"{e.target!r}"
            )
    answers = [
        labels.index(e.target) if labels else float(e.target if e.number is None else e.number)
        for e in examples
    ]
    return [encoded_item(*pair) for pair in zip(encoded, answers, strict=True)]


def prompt_ids(example: Example, tokenizer: Any) -> list[int]:
    """What a decoder reads before it answers: the source and a line break, or a conversation in the
    chat template."""
    if example.messages:
        return _chat_ids(example.messages[:-1], tokenizer, add_generation_prompt=True)
    return list(tokenizer(f"{example.source}\n")["input_ids"])


def encode_responses(
    examples: Sequence[Example],
    tokenizer: Any,
    max_source_length: int = 512,
    max_target_length: int = 256,
) -> list[Item]:
    """Items of instruction data for a decoder; the loss counts responses only.

    A pair is the prompt, a line break, the response and the end token. A conversation is written by
    the tokenizer's chat template; all messages of the assistant are responses. What is too long
    loses its beginning.

    Returns:
        dictionaries of lists, each [S]: ``input_ids``, ``attention_mask``, ``labels`` (-100 where
            no response is).

    Raises:
        ValueError: a conversation without a chat template, or with one that rewrites what was said
            before.
    """
    encoded = []
    for example in examples:
        if example.messages:
            ids, labels = _conversation(example, tokenizer, max_source_length + max_target_length)
        else:
            prompt = prompt_ids(example, tokenizer)[-max_source_length:]
            response = [
                *tokenizer(example.target, add_special_tokens=False)["input_ids"],
                tokenizer.eos_token_id,
            ][:max_target_length]
            ids = prompt + response
            labels = [IGNORED_LABEL] * len(prompt) + response
        encoded.append(encoded_item(ids, labels))
    return encoded


def _conversation(example: Example, tokenizer: Any, most: int) -> tuple[list[int], list[int]]:
    ids = _chat_ids(example.messages, tokenizer)
    labels = [IGNORED_LABEL] * len(ids)
    for place, (role, _) in enumerate(example.messages):
        if role == "assistant" and place:
            before = _chat_ids(example.messages[:place], tokenizer, add_generation_prompt=True)
            after = _chat_ids(example.messages[: place + 1], tokenizer)
            if ids[: len(before)] == before and ids[: len(after)] == after:
                labels[len(before) : len(after)] = ids[len(before) : len(after)]
    if not any(label != IGNORED_LABEL for label in labels):
        raise ValueError(
            f"the chat template of {type(tokenizer).__name__} must continue a prompt with the "
            "response; it rewrites it"
        )
    return ids[-most:], labels[-most:]


def _chat_ids(messages: Sequence[tuple[str, str]], tokenizer: Any, **options: Any) -> list[int]:
    if not tokenizer.chat_template:
        raise ValueError(
            f"messages need a tokenizer with a chat template; {type(tokenizer).__name__} has none "
            "(give columns prompt and response, or set tokenizer.chat_template and save it with "
            "the model)"
        )
    chat = [{"role": role, "content": text} for role, text in messages]
    return list(tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False, **options))
