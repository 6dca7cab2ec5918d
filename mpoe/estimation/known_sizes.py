"""Sizes of well-known models, so that they can be planned without network or weights.

The numbers are those of the models' published configurations; everything else is the default of the model's
Hugging Face configuration class.
"""

from __future__ import annotations

from typing import Any


def _t5(d_model: int, d_ff: int, num_layers: int, num_heads: int, d_kv: int = 64) -> dict[str, Any]:
    """Raffel et al., JMLR 2020, section 3.2 and 3.7: ReLU, embeddings tied to the head."""
    sizes = {"d_model": d_model, "d_ff": d_ff, "d_kv": d_kv, "num_layers": num_layers, "num_heads": num_heads}
    return {"model_type": "t5", "vocab_size": 32128, **sizes}


def _t5_v1_1(d_model: int, d_ff: int, num_layers: int, num_heads: int) -> dict[str, Any]:
    """T5 v1.1 and Flan-T5: gated GELU, an untied head."""
    values = _t5(d_model, d_ff, num_layers, num_heads)
    return {**values, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}


def _gpt2(n_embd: int, n_layer: int, n_head: int) -> dict[str, Any]:
    """Radford et al. 2019, table 2."""
    return {"model_type": "gpt2", "n_embd": n_embd, "n_layer": n_layer, "n_head": n_head}


def _bert(hidden_size: int, num_layers: int, num_heads: int, vocab_size: int = 30522) -> dict[str, Any]:
    """Devlin et al., NAACL 2019, section 3."""
    sizes = {"hidden_size": hidden_size, "intermediate_size": 4 * hidden_size, "num_hidden_layers": num_layers}
    return {"model_type": "bert", "vocab_size": vocab_size, "num_attention_heads": num_heads, **sizes}


_V1_1 = {
    "small": _t5_v1_1(512, 1024, 8, 6),
    "base": _t5_v1_1(768, 2048, 12, 12),
    "large": _t5_v1_1(1024, 2816, 24, 16),
    "xl": _t5_v1_1(2048, 5120, 24, 32),
    "xxl": _t5_v1_1(4096, 10240, 24, 64),
}
KNOWN_SIZES: dict[str, dict[str, Any]] = {
    "t5-small": _t5(512, 2048, 6, 8),
    "t5-base": _t5(768, 3072, 12, 12),
    "t5-large": _t5(1024, 4096, 24, 16),
    "t5-3b": _t5(1024, 16384, 24, 32, d_kv=128),
    "t5-11b": _t5(1024, 65536, 24, 128, d_kv=128),
    **{f"t5-v1_1-{size}": values for size, values in _V1_1.items()},
    **{f"flan-t5-{size}": values for size, values in _V1_1.items()},
    "gpt2": _gpt2(768, 12, 12),
    "gpt2-medium": _gpt2(1024, 24, 16),
    "gpt2-large": _gpt2(1280, 36, 20),
    "gpt2-xl": _gpt2(1600, 48, 25),
    "bert-base-uncased": _bert(768, 12, 12),
    "bert-large-uncased": _bert(1024, 24, 16),
    "bert-base-cased": _bert(768, 12, 12, 28996),
    "bert-large-cased": _bert(1024, 24, 16, 28996),
}
# Hub organisations whose models of these names are exactly these sizes, and shorter names for some.
ORGANISATIONS = ("google", "google-t5", "google-bert", "openai-community")
SHORT_NAMES = {"bert-base": "bert-base-uncased", "bert-large": "bert-large-uncased"}


def known_size(name: str) -> dict[str, Any] | None:
    """Configuration values of a well-known model, or None: ``t5-base`` and ``google-t5/T5-Base`` name the same."""
    organisation, _, last = name.lower().rpartition("/")
    if organisation and organisation not in ORGANISATIONS:
        return None
    values = KNOWN_SIZES.get(SHORT_NAMES.get(last, last))
    return None if values is None else dict(values)


def known_names() -> list[str]:
    """Every name that `known_size` knows, without organisations."""
    return [*KNOWN_SIZES, *SHORT_NAMES]
