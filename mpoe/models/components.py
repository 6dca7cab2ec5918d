"""Components of a model, by the original's names: which one a module belongs to."""

from __future__ import annotations

import difflib

COMPONENTS = ("word_embed", "mlp", "attention", "pooler")
_ALIASES = {"ffn": "mlp", "embedding": "word_embed", "embeddings": "word_embed"}
# Words in a module's name that identify its component; the first component that matches wins (BERT's FFN is at
# `encoder.layer.0.…`, its attention's output at `…attention.output.dense`).
_WORDS = {
    "pooler": ("pooler",),
    "word_embed": ("shared", "embed", "wte", "lm_head"),
    "attention": ("attn", "attention"),
    "mlp": ("experts", "mlp", "feed_forward", "densereludense", "intermediate", "output"),
}


def component_of(name: str) -> str:
    """The component (one of `COMPONENTS`) that a module of this name belongs to."""
    lowered = name.lower()
    for component, words in _WORDS.items():
        if any(word in lowered for word in words):
            return component
    return "mlp"


def parse_components(text: str | None, option: str = "update_mpo_layer") -> tuple[str, ...] | None:
    """'mlp, attention' -> ('mlp', 'attention'); None means all. Raises ValueError on unknown names, for ``option``."""
    if text is None:
        return None
    names = [part.strip().lower() for part in text.split(",") if part.strip()]
    names = [_ALIASES.get(name, name) for name in names]
    for name in names:
        if name not in COMPONENTS:
            close = difflib.get_close_matches(name, [*COMPONENTS, *_ALIASES], n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise ValueError(f"{option} must list components among {', '.join(COMPONENTS)}; got {name!r}{hint}")
    if not names:
        raise ValueError(f"{option} must name at least one of {', '.join(COMPONENTS)}; got {text!r}")
    return tuple(dict.fromkeys(names))
