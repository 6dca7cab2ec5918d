"""OPT, whose layers hold the projections themselves."""

from mpoe.models.families import FFN, Family

FAMILIES = {
    "opt": Family(
        ffn=(FFN("decoder.layers.*", up="fc1", down="fc2", place="fc1", emptied=("activation_fn", "fc2")),),
        attention=("decoder.layers.*.self_attn.{q_proj,k_proj,v_proj,out_proj}",),
        activation=lambda config: config.activation_function,
        init_std=lambda config: (config.init_std, config.init_std),
    )
}
