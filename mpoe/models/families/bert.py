"""BERT, RoBERTa and DeBERTa-v2: encoders that add and normalise after each block."""

from dataclasses import replace

from mpoe.models.families import FFN, Family

BERT = Family(
    ffn=(
        FFN(
            "encoder.layer.*",
            up="intermediate.dense",
            down="output.dense",
            place="intermediate",
            emptied=("output.dense",),
            zeroed=("chunk_size_feed_forward",),
            sums="output",
        ),
    ),
    attention=("encoder.layer.*.{attention,crossattention}.{self.query,self.key,self.value,output.dense}",),
    pooler="pooler.dense",
)
DEBERTA = replace(
    BERT,
    attention=("encoder.layer.*.attention.{self.query_proj,self.key_proj,self.value_proj,output.dense}",),
)

FAMILIES = {"bert": BERT, "roberta": BERT, "deberta-v2": DEBERTA}
