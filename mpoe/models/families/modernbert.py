"""ModernBERT: gated networks whose first two projections are one matrix."""

from mpoe.models.families import FFN, Family

FAMILIES = {
    "modernbert": Family(
        ffn=(FFN("layers.*.mlp", up="Wi", down="Wo", fused=("gate_proj", "up")),),
        attention=("layers.*.attn.{Wqkv,Wo}",),
        activation=lambda config: config.hidden_activation,
        dropout=lambda config: config.mlp_dropout,
    )
}
