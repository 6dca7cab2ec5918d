"""Which expert took which token of a text, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from mpoe.models.report import routed_layers


@dataclass(frozen=True)
class Route:
    """The tokens of one stream (a T5's encoder or decoder) of one text.

    Attributes:
        stream: ``"encoder"``, ``"decoder"`` or ``"main"``.
        tokens: as text, T of them.
        layers: names of the MPOE layers that the tokens pass, in order.
        experts: the chosen experts, best first, ``[layers][T][K]``.
        probabilities: the router's probabilities of those experts, ``[layers][T][K]``.
    """

    stream: str
    tokens: list[str]
    layers: list[str]
    experts: list[list[list[int]]]
    probabilities: list[list[list[float]]]


@torch.inference_mode()
def route_text(model: Any, tokenizer: Any, text: str, max_new_tokens: int = 24) -> list[Route]:
    """Routes of a text's tokens; an encoder-decoder first generates an answer, whose tokens are routed too.

    Args:
        model: an MPOE model in eval mode.
        tokenizer: its tokenizer.
        text: any text; parts that the tokenizer truncates are not shown.
        max_new_tokens: length of an answer.

    Raises:
        ValueError: a text without tokens.
    """
    batch = tokenizer([text], return_tensors="pt", truncation=True, return_token_type_ids=False).to(model.device)
    if not batch["input_ids"].shape[1]:
        raise ValueError(f"text must hold at least one token; got {text!r}")
    ids = {"main": batch["input_ids"][0]}
    if model.config.is_encoder_decoder:
        answer = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False)[:, :-1]
        batch["decoder_input_ids"] = answer
        ids = {"encoder": batch["input_ids"][0], "decoder": answer[0]}
    layers: Any = routed_layers(model)
    found = []
    logits = model(**batch).router_logits or ()
    for stream, stream_ids in ids.items():
        own = [k for k, (_, layer) in enumerate(layers) if layer.stream == stream]
        if not own:
            continue
        best = [torch.softmax(logits[k].float(), -1).topk(layers[k][1].router.top_k) for k in own]
        found.append(
            Route(
                stream,
                [_as_text(tokenizer, token) for token in stream_ids.tolist()],
                [layers[k][0] for k in own],
                [each.indices.tolist() for each in best],
                [each.values.tolist() for each in best],
            )
        )
    return found


def _as_text(tokenizer: Any, token: int) -> str:
    """A token as its tokenizer decodes it, with spaces."""
    piece = str(tokenizer.convert_ids_to_tokens(token))
    return piece.replace("\u2581", " ").replace("\u0120", " ").replace("\u010a", "\\n")
