"""ViT; newer versions of Transformers hold its network in one module, older ones in two."""

from mpoe.models.families import FFN, Family

FAMILIES = {
    "vit": Family(
        ffn=(
            FFN("{layer,layers}.*.mlp", up="fc1", down="fc2"),
            FFN(
                "{layer,layers}.*",
                up="intermediate.dense",
                down="output.dense",
                place="intermediate",
                emptied=("output.dense",),
                zeroed=("chunk_size_feed_forward",),
            ),
        ),
        attention=(
            "{layer,layers}.*.attention.{q_proj,k_proj,v_proj,o_proj,out_proj}",
            "{layer,layers}.*.attention.{attention.query,attention.key,attention.value,output.dense}",
        ),
        pooler="pooler.dense",
    )
}
