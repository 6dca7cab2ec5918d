"""GPT-NeoX and Pythia."""

from mpoe.models.families import FFN, Family

FAMILIES = {
    "gpt_neox": Family(
        ffn=(FFN("layers.*.mlp", up="dense_h_to_4h", down="dense_4h_to_h"),),
        attention=("layers.*.attention.{query_key_value,dense}",),
    )
}
