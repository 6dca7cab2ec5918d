"""The model families that conversion knows, one row each. Nothing here imports more than typing."""

from __future__ import annotations

from typing import NamedTuple

SEQ2SEQ, CAUSAL, ENCODER = "seq2seq", "causal", "encoder"


class Row(NamedTuple):
    """A family.

    Attributes:
        layers: how its layers are built, a name in `mpoe.models.families`.
        style: how the command line trains and evaluates it: ``"seq2seq"``, ``"causal"`` or ``"encoder"``.
    """

    layers: str
    style: str

    @property
    def is_mixture(self) -> bool:
        """Whether models of the family have experts before any conversion."""
        return self.layers == "mixture"


_ROWS = {
    Row("t5", SEQ2SEQ): "t5 mt5 umt5",
    Row("bart", SEQ2SEQ): "bart",
    Row("gpt2", CAUSAL): "gpt2",
    Row("gpt_neox", CAUSAL): "gpt_neox",
    Row("opt", CAUSAL): "opt",
    Row("llama", CAUSAL): "llama mistral qwen2 qwen3 olmo2 smollm3 gemma2 gemma3_text phi3",
    Row("bert", ENCODER): "bert roberta deberta-v2",
    Row("modernbert", ENCODER): "modernbert",
    Row("vit", ENCODER): "vit",
    Row("mixture", CAUSAL): (
        "mixtral olmoe flex_olmo qwen2_moe qwen3_moe deepseek_v2 deepseek_v3 glm4_moe dots1 ernie4_5_moe granitemoe "
        "hunyuan_v1_moe minimax phimoe"
    ),
}
# Hugging Face `model_type` of the dense model -> its row
TABLE = {model_type: row for row, names in _ROWS.items() for model_type in names.split()}
# the families among them without their own experts
DENSE = tuple(model_type for model_type, row in TABLE.items() if not row.is_mixture)
# prefix of a converted model's `model_type` and of its class name
TYPE_PREFIX, CLASS_PREFIX = "mpoe_", "MPOE"
MODEL_TYPES = tuple(TYPE_PREFIX + model_type for model_type in TABLE)
