"""BART, whose layers hold the projections themselves."""

from mpoe.models.families import FFN, Family


def _layers(stream: str) -> FFN:
    return FFN(
        f"{stream}.layers.*",
        up="fc1",
        down="fc2",
        place="fc1",
        emptied=("activation_fn", "fc2"),
        zeroed=("activation_dropout",),
        stream=stream,
    )


FAMILIES = {
    "bart": Family(
        ffn=(_layers("encoder"), _layers("decoder")),
        attention=("{encoder,decoder}.layers.*.{self_attn,encoder_attn}.{q_proj,k_proj,v_proj,out_proj}",),
        activation=lambda config: config.activation_function,
        dropout=lambda config: config.activation_dropout,
        init_std=lambda config: (config.init_std, config.init_std),
        mixin=("mpoe.models.seq2seq", "MPOESeq2SeqMixin"),
    )
}
