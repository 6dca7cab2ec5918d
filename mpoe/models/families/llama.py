"""Llama and decoders of the same structure: gated networks without biases."""

from dataclasses import replace

from mpoe.models.families import FFN, Family

LLAMA = Family(
    ffn=(FFN("layers.*.mlp", up="up_proj", gate_proj="gate_proj", down="down_proj"),),
    attention=("layers.*.self_attn.{q,k,v,o}_proj",),
)
GEMMA = replace(LLAMA, activation=lambda config: config.hidden_activation)
PHI3 = replace(
    LLAMA,
    ffn=(FFN("layers.*.mlp", up="gate_up_proj", down="down_proj", fused=("gate_proj", "up")),),
    attention=("layers.*.self_attn.{qkv,o}_proj",),
)

FAMILIES = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "olmo2", "smollm3"), LLAMA),
    **dict.fromkeys(("gemma2", "gemma3_text"), GEMMA),
    "phi3": PHI3,
}
