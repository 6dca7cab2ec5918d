"""Tiny random models of every family and head that conversion supports, batches for them, experts
of domains."""

import copy
import functools
from pathlib import Path

import numpy
import pytest
import torch
import transformers
from torch import nn

from mpoe import MPOEConfig, RouterConfig, compose_experts, convert_to_mpoe
from mpoe.data import documentation, embedded_tasks
from mpoe.layers import HiddenFeedForward, MPOCores, NeuronFeedForward
from mpoe.models.classes import dense_names
from mpoe.models.table import TABLE
from mpoe.models.walk import kept_modules
from tests.cases import pairwise

HIDDEN, INNER, VOCABULARY = 24, 48, 60
# Names used by most configurations; different names are below.
USUAL = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "num_labels": 3,
}
T5 = {
    "d_model": HIDDEN,
    "d_ff": INNER,
    "d_kv": 6,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
T5 |= {"num_decoder_layers": 1}
OWN = {
    "t5": {**T5, "feed_forward_proj": "relu"},
    "mt5": T5,
    "umt5": T5,
    "gpt2": {"n_embd": HIDDEN, "n_layer": 2, "n_head": 4, "n_positions": 32},
    "opt": {"ffn_dim": INNER, "word_embed_proj_dim": HIDDEN},
    "bart": {
        "d_model": HIDDEN,
        "decoder_start_token_id": 1,
        "encoder_layers": 2,
        "encoder_ffn_dim": INNER,
        "encoder_attention_heads": 4,
        "decoder_layers": 1,
        "decoder_ffn_dim": INNER,
        "decoder_attention_heads": 4,
    },
    "roberta": {"max_position_embeddings": 40},
    "deberta-v2": {
        "relative_attention": True,
        "pos_att_type": ["c2p", "p2c"],
        "position_buckets": 4,
    },
    "modernbert": {"cls_token_id": 0, "sep_token_id": 1, "num_hidden_layers": 3},
    "vit": {"image_size": 8, "patch_size": 4},
    "gemma3_text": {"sliding_window": 4, "num_hidden_layers": 3},
}


def heads_of(families):
    """(family, Auto class, dense class) for every head of the families, each class once."""
    return [
        (model_type, auto, name)
        for model_type in families
        for auto, name in {
            name: (auto, name) for auto, name in reversed(dense_names(model_type).items())
        }.values()
    ]


GENERATED = heads_of(TABLE)
# The first of the families with the same structure.
FIRST = set({TABLE[family].models: family for family in reversed(TABLE)}.values())


def first_class(model_type):
    return next(name for family, _, name in GENERATED if family == model_type)


def tiny_config(model_type, **changes):
    """The configuration of a tiny dense model."""
    old = model_type in ("t5", "mt5", "umt5", "gpt2")  # they use other names for sizes
    usual = {
        k: v
        for k, v in USUAL.items()
        if not old or k in ("vocab_size", "num_labels") or k.endswith("_id")
    }
    return transformers.AutoConfig.for_model(
        model_type, **{**usual, **OWN.get(model_type, {}), **changes}
    )


def copied(make):
    """Decorates what seeds torch and makes a model: it is made once for the same arguments, and who
    asks gets a copy, with the random numbers that would follow."""
    known = {}

    @functools.wraps(make)
    def copy_of(*arguments, **options):
        key = repr((arguments, options))
        if key not in known:
            known[key] = make(*arguments, **options), torch.get_rng_state()
        model, state = known[key]
        torch.set_rng_state(state)
        return copy.deepcopy(model)

    return copy_of


@copied
def tiny_model(model_type, name, **changes):
    """A dense model in eval mode, with weights large enough for every part to matter."""
    torch.manual_seed(1)
    labels = {"num_labels": 2} if "QuestionAnswering" in name else {}
    model = getattr(transformers, name)(tiny_config(model_type, **labels, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.25)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def tiny_batch(model, model_type):
    """Inputs without labels; the second row is padded."""
    generator = torch.Generator().manual_seed(2)
    if model_type == "vit":
        return {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator)}
    ids = torch.randint(2, VOCABULARY, (2, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    ids[1, 6:] = 0
    if "Sequence" in type(model).__name__ and TABLE[model_type].style == "seq2seq":
        ids[:, -1] = 1  # these heads read the end-of-text token
        mask = torch.ones_like(ids)
    inputs = {"input_ids": ids, "attention_mask": mask}
    if type(model).__name__.endswith(("ForConditionalGeneration", "T5Model", "BartModel")):
        inputs["decoder_input_ids"] = torch.randint(2, VOCABULARY, (2, 5), generator=generator)
    return inputs


def result(output):
    """The model's main output: logits, hidden states, or the logits of an answer's start."""
    return output[next(k for k in ("logits", "start_logits", "last_hidden_state") if k in output)]


def text_rows(tensor, inputs):
    """The rows of a result that are not padding, if it has one row per label or input token."""
    labels, mask = (
        inputs.get("labels", torch.empty(0)),
        inputs.get("attention_mask", torch.empty(0)),
    )
    kept = next(
        (k for k in (labels != -100, mask.bool()) if k.dim() == 2 and k.shape == tensor.shape[:2]),
        None,
    )
    return tensor if kept is None else tensor[kept]


# ------------------------------------------------------------- a few of them with labels

# name -> family, dense class, and what it has beside `tiny_config`: nothing is dropped at random
NO_DROPOUT = {
    "t5": {"dropout_rate": 0.0},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}
_T5 = ("t5", "T5ForConditionalGeneration")
FAMILIES = {
    "t5": (*_T5, NO_DROPOUT["t5"]),
    "t5_gated": (
        *_T5,
        {**NO_DROPOUT["t5"], "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "gpt2": ("gpt2", "GPT2LMHeadModel", NO_DROPOUT["gpt2"]),
    "bert": ("bert", "BertModel", NO_DROPOUT["bert"]),
    "bert_classifier": ("bert", "BertForSequenceClassification", NO_DROPOUT["bert"]),
    "bert_mlm": ("bert", "BertForMaskedLM", NO_DROPOUT["bert"]),
    "llama": ("llama", "LlamaForCausalLM", {"tie_word_embeddings": True}),
    "phi3": ("phi3", "Phi3ForCausalLM", {}),  # gate and up in one
    "gpt2_base": ("gpt2", "GPT2Model", NO_DROPOUT["gpt2"]),
}
MASK = torch.tensor([[1] * 8, [1] * 5 + [0] * 3, [1] * 3 + [0] * 5])


def dense_model(family):
    """A model of `FAMILIES`."""
    model_type, name, changes = FAMILIES[family]
    return tiny_model(model_type, name, **changes)


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
    elif family in ("gpt2", "llama", "phi3", "bert_mlm") and labels:
        inputs["labels"] = ids.masked_fill(MASK == 0, -100)
    return inputs


def generation(family, **options):
    """What `generate` takes for six tokens after a batch."""
    return {
        "input_ids": batch(family, labels=False)["input_ids"],
        "attention_mask": MASK if family.startswith("t5") else MASK.flip(1),
        "max_new_tokens": 6,
        "do_sample": False,
        **options,
    }


def relative_difference(one, other, inputs):
    """The largest difference between two outputs' rows that are not padding, relative to the
    largest number."""
    a, b = (text_rows(result(output), inputs) for output in (one, other))
    return float((a - b).abs().max() / a.abs().max())


def logits(model, family):
    """Results that are not padding."""
    inputs = batch(family)
    with torch.no_grad():
        return text_rows(result(model(**inputs)), inputs)


# ------------------------------------------------------------- experts that keep the dense
# projections

# name -> the fields of its configuration
KEPT = {
    "hidden": {"shape": "hidden", "block_size": 8},
    "neurons": {"shape": "neurons", "neurons": 8},
    "latent": {"shape": "neurons", "neurons": 8, "latent": 6},
}
every_kind = pytest.mark.parametrize("kind", KEPT)
# With a gate and without by turns, so that by default every kind meets both.
KEPT_FAMILIES = "t5 t5_gated gpt2 llama bert_mlm phi3".split()
every_model = pytest.mark.parametrize("family, kind", pairwise(KEPT_FAMILIES, list(KEPT)))


def config(kind, top_k=2, router=None, **fields):
    values = {"num_experts": 4, **KEPT[kind], **fields}
    return MPOEConfig(router=RouterConfig(top_k=top_k, **(router or {})), **values)


def kept_model(family, kind, **fields):
    """A model of `FAMILIES` with such experts."""
    return convert_to_mpoe(dense_model(family), config(kind, **fields))


def first_layer(model):
    """The first network that kept its projections."""
    return next(iter(kept_modules(model).values()))


@torch.no_grad()
def stirred(model):
    """The same model with experts that differ and contribute."""
    torch.manual_seed(3)
    for module in model.modules():
        if isinstance(module, HiddenFeedForward):
            for parameter in module.experts.parameters():
                nn.init.normal_(parameter, std=0.4)
        elif isinstance(module, NeuronFeedForward):
            for parameter in filter(
                lambda p: p is not None, (module.experts.down, module.experts.bias)
            ):
                nn.init.normal_(parameter, std=0.4)
        elif isinstance(module, MPOCores):
            for core in module.auxiliary:
                core.add_(0.05 * torch.randn_like(core))
        elif getattr(module, "e_score_correction_bias", None) is not None:
            module.e_score_correction_bias.normal_()
    return model


def fit(model, batches):
    """A step of AdamW for each batch; returns the losses."""
    optimizer, losses = (
        torch.optim.AdamW([p for p in model.train().parameters() if p.requires_grad], 0.02),
        [],
    )
    for each in batches:
        loss = model(**each).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


# ------------------------------------------------------------- experts trained apart, on domains of
# disjoint words

few_records = functools.cache(
    lambda: tuple(
        documentation.read_package(Path(numpy.polynomial.__file__).parent, "numpy.polynomial")
    )
)


def shorten_documentation(patch):
    """Reading all of it takes seconds, which tests/data spends."""
    patch.setattr(documentation, "_corpus", few_records)
    patch.setattr(embedded_tasks, "_modules", embedded_tasks._modules.__wrapped__)


DOMAIN = 15  # tokens of each domain, from its number times this on
M = 32


def tokenizer(words=VOCABULARY):
    def encode(text, verbose=True):
        return {"input_ids": [ord(letter) % VOCABULARY for letter in text]}

    encode.get_vocab = lambda: {f"w{i}": i for i in range(words)}
    return encode


def domain(number, seed=0):
    """Texts of one domain: every token is followed by a fixed one of the same domain, or, one in
    five, by any."""
    generator = torch.Generator().manual_seed(100 * number + seed)
    follower = torch.randperm(DOMAIN, generator=torch.Generator().manual_seed(number))
    ids = torch.randint(DOMAIN, (32, 16), generator=generator)
    for place in range(1, 16):
        follows = torch.rand(32, generator=generator) < 0.8
        ids[:, place] = torch.where(follows, follower[ids[:, place - 1]], ids[:, place])
    ids = ids + number * DOMAIN
    return [{"input_ids": part, "labels": part} for part in ids.split(16)]


def lessons(number, rounds):
    """What an expert of a domain is trained on."""
    return [each for turn in range(rounds) for each in domain(number, seed=turn % 8)]


def language_model():
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, max_position_embeddings=32, pad_token_id=0, **sizes
    )
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.1)
    return model


def mixture_of(domains, **options):
    """Both experts of the fixture ``domains`` beside its base, and *none*."""
    given = {"background": domains.background, **options}
    return compose_experts(domains.base, domains.files, **given)


@torch.no_grad()
def loss(model, number):
    return sum(float(model.eval()(**each).loss) for each in domain(number, seed=9)) / 2
