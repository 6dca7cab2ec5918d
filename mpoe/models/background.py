"""What a model itself says, as the background of the expert *none*: what must stay as it is when
experts are added.

A causal model is sampled from its start token, and, if its tokenizer has a chat template, from the
beginning of a user's turn, so that it writes questions and answers (as Magpie, Xu et al. 2024,
arXiv 2406.08464). A general text, the licences of a few installed packages, is pooled in. Nothing
of a user's is needed, and statistics alone are kept.
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from mpoe.config.checks import check_integer, check_seed
from mpoe.data.documentation import load_documentation
from mpoe.data.domains import domain_text
from mpoe.data.predict import Batch, evaluation_mode
from mpoe.models.composition import (
    SKETCH_RANK,
    Statistics,
    check_statistics,
    collect_statistics,
    pooled_statistics,
)
from mpoe.models.expert_files import base_identity, places_for_neurons, start_expert
from mpoe.models.weight_files import Tensors, read_with_metadata, write_tensors

SAMPLES = 32  # of the model's own texts, and of its own chats
TEXT_LENGTH = 128  # tokens of a text, the start token among them
CHAT_LENGTH = 160  # new tokens of a chat: a question and most of an answer
GENERAL_PIECES = 128  # of the general text, TEXT_LENGTH tokens each
AT_ONCE = 8  # rows of a batch
_QUESTION = "\ue000question\ue000"  # stands in a rendered template where a user's words begin


@torch.inference_mode()
def sample_tokens(model: Any, prompt: Tensor, new_tokens: int, seed: int) -> Tensor:
    """Continue ``prompt`` (int64 ``[N, P]``) at temperature 1 with all of the vocabulary, never
    ending early.

    Returns:
        int64 ``[N, P + new_tokens]``, on the CPU; the same for a seed, without a change of torch's
        own generators.
    """
    check_integer("new_tokens", new_tokens, 1)
    check_seed("seed", seed)
    devices = [model.device] if model.device.type == "cuda" else []
    settings = GenerationConfig(
        max_new_tokens=new_tokens, do_sample=True, temperature=1.0, top_k=0, top_p=1.0
    )
    prompt = prompt.to(model.device)
    models_own = model.generation_config
    with torch.random.fork_rng(devices), evaluation_mode(model):
        torch.manual_seed(seed)
        # in place of the model's own, whose end token would end a sample
        model.generation_config = settings
        try:
            return model.generate(prompt, attention_mask=torch.ones_like(prompt)).cpu()
        finally:
            model.generation_config = models_own


def chat_opening(tokenizer: Any) -> list[int] | None:
    """The tokens of a chat up to where the user's first words begin; ``None`` without a chat
    template."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    rendered = _rendered(tokenizer, _QUESTION)
    opening, is_there, _ = rendered.partition(_QUESTION)
    if not is_there or not opening:
        return None
    return list(tokenizer(opening, add_special_tokens=False)["input_ids"])


def _rendered(tokenizer: Any, *said: str) -> str:
    """A chat of a user and an assistant by turns in the template."""
    roles = ("user", "assistant")
    messages = [{"role": role, "content": text} for role, text in zip(roles, said, strict=False)]
    return tokenizer.apply_chat_template(messages, tokenize=False)


def start_token(tokenizer: Any) -> int | None:
    """The token before a text: the tokenizer's beginning, or its end of the text before; ``None``
    if it has neither.

    A beginning that opens every turn of a chat starts no text, so the end counts then.
    """
    begin = getattr(tokenizer, "bos_token_id", None)
    end = getattr(tokenizer, "eos_token_id", None)
    if begin is None or getattr(tokenizer, "chat_template", None) is None:
        return end if begin is None else begin
    opens_turns = _rendered(tokenizer, "a", "b").count(tokenizer.bos_token) > 1
    return end if opens_turns and end is not None else begin


def own_texts(model: Any, tokenizer: Any, seed: int = 0, samples: int | None = None) -> Tensor:
    """Texts that a causal model writes from its start token, int64 ``[samples, length]``: 32 of 128
    tokens, or as long as the model can read.

    Raises:
        ValueError: a tokenizer without a start or an end token.
    """
    start = start_token(tokenizer)
    if start is None:
        raise ValueError("tokenizer must have a token that begins or ends a text; it has neither")
    prompt = torch.full((samples or SAMPLES, 1), start)
    return sample_tokens(model, prompt, most_tokens(model, TEXT_LENGTH) - 1, seed)


def own_chats(
    model: Any, tokenizer: Any, seed: int = 0, samples: int | None = None
) -> Tensor | None:
    """Chats that a causal model writes from the beginning of a user's turn, int64 ``[samples,
    length]``: 32 of 160 new tokens; ``None`` if the tokenizer has no chat template, or if the model
    is too short for one."""
    opening = chat_opening(tokenizer)
    if opening is None:
        return None
    new_tokens = most_tokens(model, len(opening) + CHAT_LENGTH) - len(opening)
    if new_tokens < 1:
        return None
    prompt = torch.tensor([opening]).repeat(samples or SAMPLES, 1)
    return sample_tokens(model, prompt, new_tokens, seed)


def most_tokens(model: Any, wanted: int) -> int:
    """As many as wanted, or as the model has positions."""
    return min(wanted, getattr(model.config, "max_position_embeddings", None) or wanted)


def pieces(text: str, tokenizer: Any, length: int, most: int) -> Tensor:
    """The start of a text as token ids, int64 ``[at most most, length]``."""
    # A token has fewer than ten characters on average: this reads enough, without reading a large
    # text completely.
    ids = tokenizer(text[: 10 * most * length], verbose=False)["input_ids"]
    count = min(len(ids) // length, most)
    return torch.tensor(ids[: count * length], dtype=torch.int64).view(count, length)


def packaged_text(model: Any, tokenizer: Any, text: str) -> Tensor:
    """The start of a text that is packaged as tokens of the model, 128 pieces of 128 at most.

    Raises:
        ValueError: a tokenizer that makes other tokens than the model has.
    """
    ids = pieces(text, tokenizer, most_tokens(model, TEXT_LENGTH), GENERAL_PIECES)
    if ids.numel() and int(ids.max()) >= model.get_input_embeddings().num_embeddings:
        raise ValueError(
            "tokenizer must be the base's; it does not make the model's tokens of the packaged text"
        )
    return ids


def background_parts(model: Any, tokenizer: Any, seed: int = 0) -> Tensors:
    """What `collect_background` pools, by name: token ids ``[N, length]`` of ``texts``, ``chats``
    and ``general``, as far as there are some."""
    parts = {}
    if start_token(tokenizer) is not None:
        parts["texts"] = own_texts(model, tokenizer, seed)
    chats = own_chats(model, tokenizer, seed + 1)
    if chats is not None:
        parts["chats"] = chats
    # licences of installed packages
    general = packaged_text(model, tokenizer, domain_text("law", held_out=False))
    if len(general):
        parts["general"] = general
    return parts


def documentation_batches(model: Any, tokenizer: Any) -> list[Tensors]:
    """The start of the packaged text, documentation of Python, for `collect_statistics`.

    Raises:
        ValueError: a tokenizer that makes fewer tokens of it than one piece has, or other tokens
            than the model's.
    """
    text = "\n\n".join(record.text for record in load_documentation("train")[::20])
    rows = packaged_text(model, tokenizer, text)
    if not len(rows):
        raise ValueError(
            f"the packaged text must hold at least {rows.shape[1]} tokens of the base; it has fewer"
        )
    # Heads of encoders have other labels.
    names = ("input_ids", "labels") if model.config.is_encoder_decoder else ("input_ids",)
    return [dict.fromkeys(names, part) for part in rows.split(AT_ONCE)]


def background_batches(model: Any, tokenizer: Any, seed: int = 0) -> list[list[Tensors]]:
    """Batches of every text of the default background: what a causal model itself says and a
    general text; of other models Python's documentation.

    Raises:
        ValueError: as `documentation_batches`.
    """
    if not model.can_generate() or model.config.is_encoder_decoder:
        return [documentation_batches(model, tokenizer)]
    return [token_batches(ids) for ids in background_parts(model, tokenizer, seed).values()]


def pooled_background(model: Any, parts: Sequence[Iterable[Batch]]) -> Tensors:
    """The statistics of several texts as one class, each of equal weight however long it is.

    Args:
        model: dense; it is not changed.
        parts: batches of each text, see `collect_statistics`.
    """
    started = start_expert(model, 1)
    return pooled_statistics(
        [collect_statistics(started, batches, SKETCH_RANK) for batches in parts]
    )


def collect_background(model: Any, tokenizer: Any, seed: int = 0) -> Tensors:
    """The default background: of a causal model statistics of its own texts, its own chats and the
    general text, see `background_batches`.

    Args:
        model: dense; it is not changed.
        tokenizer: the model's.
        seed: of the samples.

    Returns:
        Tensors by name, see `mpoe.models.composition`.

    Raises:
        TypeError, ValueError: as `collect_statistics`; a tokenizer that makes other tokens than the
            model has.
    """
    return pooled_background(model, background_batches(model, tokenizer, seed))


def token_batches(ids: Tensor) -> list[Tensors]:
    """Token ids ``[N, length]`` as batches of a few rows."""
    return [
        {"input_ids": rows, "attention_mask": torch.ones_like(rows)} for rows in ids.split(AT_ONCE)
    ]


def labelled_batches(ids: Tensor) -> list[Tensors]:
    """Token ids ``[N, length]`` as batches of a few rows for a language model, all to be
    predicted."""
    return [{"input_ids": rows, "labels": rows} for rows in ids.split(AT_ONCE)]


def save_background(statistics: Statistics, base: Any, file: Path) -> None:
    """Write the statistics of a background, as a whole or not at all, with the identity of their
    base."""
    write_tensors(file, statistics, {"base": base_identity(base)})


def may_write_background(file: Path) -> bool:
    """Whether ``file`` is absent, or what `save_background` wrote."""
    if not os.path.lexists(file):
        return True
    try:
        return not file.is_symlink() and "base" in read_with_metadata(file)[1]
    except ValueError:
        return False


def load_background(file: Path, base: Any) -> Tensors:
    """Read what `save_background` wrote.

    Raises:
        ValueError: a file that cannot be read, or of another base.
    """
    statistics, metadata = read_with_metadata(file)
    if metadata.get("base") != base_identity(base):
        raise ValueError(f"background must be of this base; {file} is of another one")
    sizes = {site.place: site.weight("up").shape[0] for site in places_for_neurons(base)}
    check_statistics(statistics, sizes, f"background {file}")
    return statistics
