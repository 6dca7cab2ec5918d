"""A pytest plugin (``-p peft_models``) that gives PEFT's own suite small models without a network.

The suite loads its models by names on the hub. ``$HF_HUB_CACHE``, an empty folder, is filled as if
these models had been downloaded: small random ones, dense or converted, as ``$EXTERNAL_KIND`` says
(``dense`` or ``mpoe``).
"""

import importlib
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import peft.utils.constants
import torch
import transformers

from mpoe import MPOEConfig, convert_to_mpoe

word_tokenizer = importlib.import_module("tally").word_tokenizer  # `tests` is another package there
# By all the names that classes have for them; a configuration just stores the ones it does not
# know.
SIZES = {
    "vocab_size": 1024,
    "num_key_value_heads": 4,
    "n_positions": 128,
    "d_kv": 16,
    **dict.fromkeys(("hidden_size", "word_embed_proj_dim", "n_embd", "d_model"), 64),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim"), 128
    ),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "num_layers", "encoder_layers", "decoder_layers"), 2
    ),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
}
# name on the hub -> class of the model
MODELS = {
    **{
        f"peft-internal-testing/tiny-random-{name}": name.removesuffix("-calibrated")
        for name in (
            *("OPTForCausalLM", "GPT2LMHeadModel", "T5ForConditionalGeneration-calibrated"),
            *("BartForConditionalGeneration", "BertModel", "RobertaModel", "DebertaV2Model"),
            *("BertForSequenceClassification", "RobertaForSequenceClassification"),
        )
    },
    "trl-internal-testing/tiny-random-LlamaForCausalLM": "LlamaForCausalLM",
    "peft-internal-testing/tiny-dummy-qwen2": "Qwen2ForCausalLM",
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": (
        "LlamaForSequenceClassification"
    ),
}
REVISION = "0" * 40


def _fill(cache, name, kind):
    cls = getattr(transformers, MODELS[name])
    ids = (
        {}
        if "Bart" in name
        else {"pad_token_id": 0, **({"decoder_start_token_id": 0} if "T5" in name else {})}
    )
    torch.manual_seed(0)
    model = cls(cls.config_class(**SIZES, **ids)).eval()
    if kind == "mpoe":
        model = convert_to_mpoe(
            model, MPOEConfig(num_experts=4, backend="eager", shape="separable")
        )
    folder = cache / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text(REVISION)
    model.save_pretrained(folder / "snapshots" / REVISION)
    words = ["<pad>", "<unk>", "</s>", *(f"word{n}" for n in range(1021))]
    word_tokenizer(words, pad_token="<pad>", unk_token="<unk>", eos_token="</s>").save_pretrained(
        folder / "snapshots" / REVISION
    )


def pytest_configure():
    """Fill the cache, and let PEFT's default targets of a family count for its mixture."""
    # What all its tests share imports the class of a pipeline whose tests are not run here.
    sys.modules.setdefault(
        "diffusers",
        SimpleNamespace(StableDiffusionPipeline=type("StableDiffusionPipeline", (), {})),
    )
    # Its first use of a model goes to the hub; here none does.
    sys.path.insert(0, os.getcwd())
    helpers = importlib.import_module("tests.testing_utils")
    helpers.hub_online_once = lambda name: nullcontext()
    for name in MODELS:
        _fill(Path(os.environ["HF_HUB_CACHE"]), name, os.environ["EXTERNAL_KIND"])
    for table in vars(peft.utils.constants).values():
        if isinstance(table, dict):
            table.update(
                {f"mpoe_{known}": value for known, value in table.items() if isinstance(known, str)}
            )
