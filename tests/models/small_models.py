"""Small dense models of every family, with weights large enough for mistakes to show."""

from __future__ import annotations

import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

T5 = {
    "vocab_size": 60,
    "d_model": 24,
    "d_kv": 6,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 1,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "dropout_rate": 0.0,
}
GPT2 = {
    "vocab_size": 60,
    "n_embd": 24,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 32,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
LLAMA = {
    "vocab_size": 60,
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "tie_word_embeddings": True,
}
BERT = {
    "vocab_size": 60,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 32,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}

FAMILIES = {
    "t5": lambda: T5ForConditionalGeneration(T5Config(**T5)),
    "t5_gated": lambda: T5ForConditionalGeneration(
        T5Config(**T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    ),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2)),
    "bert": lambda: BertModel(BertConfig(**BERT)),
    "bert_classifier": lambda: BertForSequenceClassification(BertConfig(**BERT, num_labels=3)),
    "bert_mlm": lambda: BertForMaskedLM(BertConfig(**BERT)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA)),
    "gpt2_base": lambda: GPT2Model(GPT2Config(**GPT2)),
}
MASK = torch.tensor([[1] * 8, [1] * 5 + [0] * 3, [1] * 3 + [0] * 5])


def dense_model(family):
    torch.manual_seed(1)
    model = FAMILIES[family]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.25)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def batch(family, labels=True):
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(2, 60, MASK.shape, generator=generator)
    inputs = {"input_ids": ids, "attention_mask": MASK}
    if family == "bert_classifier" and labels:
        inputs["labels"] = torch.tensor([0, 2, 1])
    elif family.startswith("t5"):
        target = torch.randint(2, 60, (3, 6), generator=generator)
        target[1, 4:] = -100
        if labels:
            inputs["labels"] = target
        else:
            inputs["decoder_input_ids"] = target.clamp_min(0)
    elif family in ("gpt2", "llama", "bert_mlm") and labels:
        inputs["labels"] = ids.masked_fill(MASK == 0, -100)
    return inputs


def result(output):
    """Logits, or the hidden states of a model without a head."""
    return output["logits"] if "logits" in output else output["last_hidden_state"]


def valid_rows(family, tensor, inputs):
    """The positions of a result that are not padding."""
    if family == "bert_classifier":
        return tensor
    if family.startswith("t5"):
        return tensor[inputs["labels"] != -100] if "labels" in inputs else tensor
    return tensor[inputs["attention_mask"].bool()]


def relative_difference(family, one, other, inputs):
    """The largest difference between two outputs' rows that are not padding, relative to the largest number."""
    a, b = (valid_rows(family, result(output), inputs) for output in (one, other))
    return float((a - b).abs().max() / a.abs().max())
