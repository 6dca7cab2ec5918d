"""Mixtures of Transformers whose experts hold ``gate_up_proj [E, 2F, I]`` and ``down_proj [E, I, F]``.

They keep their routers, shared experts and dense layers; `mpoe.models.stock_experts` converts the experts.
"""

from mpoe.models.families import Family
from mpoe.models.table import MIXTURE, TABLE

MIXTURE_FAMILY = Family(
    ffn=(),
    attention=("layers.*.self_attn.{q,k,v,o}_proj",),
    mixin=("mpoe.models.mixtures", "MixtureMixin"),
)

FAMILIES = {model_type: MIXTURE_FAMILY for model_type, row in TABLE.items() if row.file == MIXTURE}
