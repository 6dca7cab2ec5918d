"""The model families that conversion knows, one row each. Nothing here imports more than typing."""

from __future__ import annotations

from typing import NamedTuple

SEQ2SEQ, CAUSAL, ENCODER = "seq2seq", "causal", "encoder"
MIXTURE = "mixture"  # file of the families that are already mixtures


class Row(NamedTuple):
    """A family.

    Attributes:
        file: module of `mpoe.models.families` that describes its layers.
        style: how the command line trains and evaluates it: ``"seq2seq"``, ``"causal"`` or ``"encoder"``.
    """

    file: str
    style: str

    @property
    def is_mixture(self) -> bool:
        """Whether models of the family have experts before any conversion."""
        return self.file == MIXTURE


# Hugging Face `model_type` of the dense model -> its row
TABLE = {
    "t5": Row("t5", SEQ2SEQ),
    "mt5": Row("t5", SEQ2SEQ),
    "umt5": Row("t5", SEQ2SEQ),
    "bart": Row("bart", SEQ2SEQ),
    "gpt2": Row("gpt2", CAUSAL),
    "gpt_neox": Row("gpt_neox", CAUSAL),
    "opt": Row("opt", CAUSAL),
    "llama": Row("llama", CAUSAL),
    "mistral": Row("llama", CAUSAL),
    "qwen2": Row("llama", CAUSAL),
    "qwen3": Row("llama", CAUSAL),
    "olmo2": Row("llama", CAUSAL),
    "smollm3": Row("llama", CAUSAL),
    "gemma2": Row("llama", CAUSAL),
    "gemma3_text": Row("llama", CAUSAL),
    "phi3": Row("llama", CAUSAL),
    "bert": Row("bert", ENCODER),
    "roberta": Row("bert", ENCODER),
    "deberta-v2": Row("bert", ENCODER),
    "modernbert": Row("modernbert", ENCODER),
    "vit": Row("vit", ENCODER),
    "mixtral": Row(MIXTURE, CAUSAL),
    "olmoe": Row(MIXTURE, CAUSAL),
    "flex_olmo": Row(MIXTURE, CAUSAL),
    "qwen2_moe": Row(MIXTURE, CAUSAL),
    "qwen3_moe": Row(MIXTURE, CAUSAL),
    "deepseek_v2": Row(MIXTURE, CAUSAL),
    "deepseek_v3": Row(MIXTURE, CAUSAL),
    "glm4_moe": Row(MIXTURE, CAUSAL),
    "dots1": Row(MIXTURE, CAUSAL),
    "ernie4_5_moe": Row(MIXTURE, CAUSAL),
    "granitemoe": Row(MIXTURE, CAUSAL),
    "hunyuan_v1_moe": Row(MIXTURE, CAUSAL),
    "minimax": Row(MIXTURE, CAUSAL),
    "phimoe": Row(MIXTURE, CAUSAL),
}
# the families among them without their own experts
DENSE = tuple(model_type for model_type, row in TABLE.items() if not row.is_mixture)
# prefix of a converted model's `model_type` and of its class name
TYPE_PREFIX, CLASS_PREFIX = "mpoe_", "MPOE"
MODEL_TYPES = tuple(TYPE_PREFIX + model_type for model_type in TABLE)
