"""A file of the user's as batches for a decoder, read as training reads it."""

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mpoe.config.checks import refusing
from mpoe.data.encode import Item, as_batches, encode_language_modeling, encode_responses
from mpoe.data.tables import read_table
from mpoe.data.task import Example
from mpoe.data.tasks import detect_spec, task_name

CHARACTERS = 10  # of a token on average, at most: so much of a text is tokenised


def read_batches(file: str | Path, tokenizer: Any, length: int, most: int) -> list[Item]:
    """The start of a file as batches of at most eight items.

    A text file is cut into blocks as it is. So are rows with the column ``text``, each with the end
    token after it. Conversations (``messages``) go through the chat template, and of these, and of
    prompts with responses, labels name the responses alone (`mpoe.data.encode`).

    Args:
        file: text, .jsonl, .csv or .tsv, also with .gz.
        tokenizer: of the model.
        length: tokens of an item, of responses at most.
        most: items that are read.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels`` (-100 where nothing is to be predicted),
        int64 ``[8, length]`` or smaller.

    Raises:
        ValueError: a file that cannot be read, holds neither running text nor responses, or less
            than one block.
    """
    return list(as_batches(_items(Path(file), tokenizer, length, most), tokenizer))


def _items(path: Path, tokenizer: Any, length: int, most: int) -> list[Item]:
    rows = read_table(path)
    spec = detect_spec(rows, task_name(path.name))
    made = (spec.example(cells, place) for cells, place in rows)
    examples = (example for example in made if example is not None)
    if spec.kind == "language_modeling":
        start = _start_of(examples, CHARACTERS * most * length)
        with refusing(f"{path}: ", ValueError):
            return encode_language_modeling(start, tokenizer, length)[:most]
    if spec.kind != "generation":
        raise ValueError(
            f"{path}: expected running text, or prompts with responses; got rows for {spec.kind}"
        )
    answer = length // 2
    first = list(itertools.islice(examples, most))
    return encode_responses(first, tokenizer, length - answer, answer)


def _start_of(examples: Iterable[Example], characters: int) -> Iterator[Example]:
    """Examples until they have so many characters together."""
    for example in examples:
        if characters <= 0:
            return
        yield example
        characters -= len(example.source)
