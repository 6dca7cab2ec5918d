"""A pytest plugin (``-p peft_models``) that gives PEFT's own suite small models without a network.

The suite loads its models by names on the hub. ``$HF_HUB_CACHE``, an empty folder, is filled as if these models had
been downloaded: small random ones, dense or converted, as ``$EXTERNAL_KIND`` says (``dense`` or ``mpoe``).
"""

from __future__ import annotations

import importlib
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft.utils.constants
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mpoe import MPOEConfig, convert_to_mpoe

_LLAMA = {
    "vocab_size": 1024,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "pad_token_id": 0,
}
_BERT = {
    "vocab_size": 1024,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}
# name on the hub -> class of the model, its sizes
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": (
        "OPTForCausalLM",
        {
            "vocab_size": 1024,
            "hidden_size": 64,
            "ffn_dim": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "word_embed_proj_dim": 64,
            "pad_token_id": 0,
        },
    ),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": (
        "GPT2LMHeadModel",
        {"vocab_size": 1024, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "pad_token_id": 0},
    ),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", _LLAMA),
    "peft-internal-testing/tiny-dummy-qwen2": ("Qwen2ForCausalLM", _LLAMA),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": (
        "T5ForConditionalGeneration",
        {
            "vocab_size": 1024,
            "d_model": 64,
            "d_ff": 128,
            "d_kv": 16,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
    ),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": (
        "BartForConditionalGeneration",
        {
            "vocab_size": 1024,
            "d_model": 64,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_ffn_dim": 128,
            "decoder_ffn_dim": 128,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
        },
    ),
    "peft-internal-testing/tiny-random-BertModel": ("BertModel", _BERT),
    "peft-internal-testing/tiny-random-RobertaModel": ("RobertaModel", _BERT),
    "peft-internal-testing/tiny-random-DebertaV2Model": ("DebertaV2Model", _BERT),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": ("BertForSequenceClassification", _BERT),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": ("RobertaForSequenceClassification", _BERT),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": ("LlamaForSequenceClassification", _LLAMA),
}
REVISION = "0" * 40


def _tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<unk>", "</s>", *(f"word{n}" for n in range(1021))]
    whole = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    whole.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=whole, pad_token="<pad>", unk_token="<unk>", eos_token="</s>")


def _fill(cache: Path, name: str, kind: str) -> None:
    class_name, sizes = MODELS[name]
    cls = getattr(transformers, class_name)
    torch.manual_seed(0)
    model = cls(cls.config_class(**sizes)).eval()
    if kind == "mpoe":
        model = convert_to_mpoe(model, MPOEConfig(num_experts=4, backend="eager", shape="separable"))
    folder = cache / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(REVISION)
    model.save_pretrained(folder / "snapshots" / REVISION)
    _tokenizer().save_pretrained(folder / "snapshots" / REVISION)


def pytest_configure() -> None:
    """Fill the cache, and let PEFT's default targets of a family count for its mixture."""
    # What all its tests share imports the class of a pipeline whose tests are not run here.
    sys.modules.setdefault(
        "diffusers", SimpleNamespace(StableDiffusionPipeline=type("StableDiffusionPipeline", (), {}))
    )  # type: ignore[arg-type]
    # Its first use of a model goes to the hub; here none does.
    sys.path.insert(0, os.getcwd())
    helpers: Any = importlib.import_module("tests.testing_utils")
    helpers.hub_online_once = lambda name: nullcontext()
    for name in MODELS:
        _fill(Path(os.environ["HF_HUB_CACHE"]), name, os.environ["EXTERNAL_KIND"])
    for table in vars(peft.utils.constants).values():
        if isinstance(table, dict):
            table.update({f"mpoe_{known}": value for known, value in table.items() if isinstance(known, str)})
