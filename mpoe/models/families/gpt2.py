"""GPT-2."""

from mpoe.models.families import FFN, Family

FAMILIES = {
    "gpt2": Family(
        ffn=(FFN("h.*.mlp", up="c_fc", down="c_proj"),),
        attention=("h.*.{attn,crossattention}.{c_attn,q_attn,c_proj}",),
        activation=lambda config: config.activation_function,
        output_dropout=lambda config: config.resid_pdrop,
        init_std=lambda config: (config.initializer_range, config.initializer_range / (2 * config.n_layer) ** 0.5),
    )
}
