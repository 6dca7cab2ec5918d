"""T5 (v1.0 ReLU, v1.1 and Flan gated), mT5 and UMT5."""

from mpoe.models.families import FFN, Family


def _networks(stream: str) -> tuple[FFN, ...]:
    holder = f"{stream}.block.*.layer.*.DenseReluDense"
    return (
        FFN(holder, up="wi", down="wo", stream=stream),
        FFN(holder, up="wi_1", gate_proj="wi_0", down="wo", stream=stream),
    )


T5 = Family(
    ffn=_networks("encoder") + _networks("decoder"),
    attention=("{encoder,decoder}.block.*.layer.*.{SelfAttention,EncDecAttention}.{q,k,v,o}",),
    activation=lambda config: config.dense_act_fn,
    dropout=lambda config: config.dropout_rate,
    init_std=lambda config: (
        config.initializer_factor * config.d_model**-0.5,
        config.initializer_factor * config.d_ff**-0.5,
    ),
    mixin=("mpoe.models.seq2seq", "MPOESeq2SeqMixin"),
)

FAMILIES = {"t5": T5, "mt5": T5, "umt5": T5}
