"""Train the stand-in checkpoints that ship with the package: ``python tools/make_stand_ins.py [t5] [gpt2]``.

Everything is made from scratch: the tokenizers and the weights see only the *training split* of the documentation that
comes with the running Python (``mpoe.data.documentation``). A tiny T5 learns, one kind of item per step,
  - masked spans of documentation text (span corruption, Raffel et al. 2020),
  - the package that a sentence documents (like the doc_module task, but with other words and other classes),
  - the words of the name that a docstring documents (the doc_name task's training items);
a tiny GPT-2 learns language modelling. Takes five to ten minutes per model on one core. Seeds are fixed, but the
weights still depend on the versions of Python, numpy and torch.
"""

from __future__ import annotations

import argparse
import functools
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from mpoe.data.collate import PaddingCollator
from mpoe.data.doc_tasks import FAMILIES, KIND_LABELS, MASK, TELLING, mask_names, own_names
from mpoe.data.documentation import DocRecord, load_documentation, prose_sentences
from mpoe.data.encode import encode_language_modeling, encode_text_to_text
from mpoe.data.task import Example
from mpoe.data.tasks import get_task

SENTINELS = [f"<extra_id_{i}>" for i in range(16)]
Batches = Iterator[dict[str, torch.Tensor]]


def train_records() -> tuple[DocRecord, ...]:
    """The only records this script ever looks at."""
    return load_documentation().split("train")


def t5_tokenizer(vocabulary: int) -> transformers.PreTrainedTokenizerFast:
    """A lower-casing BPE that ends every text with </s>."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation(), pre_tokenizers.Digits(individual_digits=True)]
    )
    tokenizer.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>", *SENTINELS, MASK]
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=special, limit_alphabet=120)
    texts = [" ".join(prose_sentences(record.text)) for record in train_records()]
    texts += [text for example in get_task("doc_name").train() for text in (example.source, example.target)]
    texts += [" ".join([*FAMILIES, *KIND_LABELS])] * 200  # label words become single tokens
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=SENTINELS,
        model_max_length=512,
    )


def gpt2_tokenizer(vocabulary: int) -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE, like GPT-2's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[end], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator((example.source for example in get_task("doc_lm").train()), trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=end, bos_token=end, pad_token=end, model_max_length=256
    )


def t5_model(vocabulary: int) -> transformers.T5ForConditionalGeneration:
    """T5 with d_model 128; the embedding starts small, because std 1 (the default) learns slowly at this size.

    Trained without dropout, which costs more than it gains in so few passes.
    """
    sizes = {"d_model": 128, "d_kv": 32, "d_ff": 512, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4}
    ids = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
    other = {"dropout_rate": 0.0, "feed_forward_proj": "relu", "scale_decoder_outputs": False}
    config = transformers.T5Config(vocab_size=vocabulary, **sizes, **ids, **other)
    model = transformers.T5ForConditionalGeneration(config)
    with torch.no_grad():
        model.shared.weight.mul_(0.2)
    return model


def gpt2_model(vocabulary: int) -> transformers.GPT2LMHeadModel:
    """GPT-2 with four layers of width 128."""
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = transformers.GPT2Config(vocab_size=vocabulary, n_positions=256, n_embd=128, n_layer=4, n_head=4, **ids)
    return transformers.GPT2LMHeadModel(config)


def package_examples() -> list[Example]:
    """Sentence -> package (for numpy: sub-package), for packages with at least eight training objects."""
    counts: dict[str, int] = {}
    for record in train_records():
        counts[package_of(record)] = counts.get(package_of(record), 0) + 1
    return [
        Example(f"package of: {mask_names(sentence, own_names(record) | TELLING)}", package_of(record))
        for record in train_records()
        if counts[package_of(record)] >= 8 and record.kind != "topic"
        for sentence in prose_sentences(record.text)[:6]
    ]


def package_of(record: DocRecord) -> str:
    """A record's package, as words."""
    return " ".join(record.module.split(".")[: 2 if record.package == "numpy" else 1])


def corrupt_spans(ids: list[int], sentinel: int, end: int, rng: random.Random, share: float = 0.2) -> dict:
    """Span corruption: about ``share`` of the tokens, in spans of three on average, move to the labels."""
    source: list[int] = []
    target: list[int] = []
    position, number = 0, 0
    while position < len(ids):
        keep = max(1, round(rng.expovariate(share / (1 - share) / 3)))
        source += ids[position : position + keep]
        position += keep
        hidden = ids[position : position + rng.choice((1, 2, 3, 4, 5))]
        if hidden and number < len(SENTINELS):
            source.append(sentinel + number)
            target += [sentinel + number, *hidden]
            number += 1
            position += len(hidden)
    source.append(end)
    return {"input_ids": source, "attention_mask": [1] * len(source), "labels": [*target, end]}


def shuffled(items: list, batch: int, rng: random.Random) -> Iterator[list]:
    """Endless batches; every pass yields each item once."""
    while True:
        rng.shuffle(items)
        for start in range(0, len(items) - batch + 1, batch):
            yield items[start : start + batch]


def t5_batches(tokenizer: transformers.PreTrainedTokenizerFast, batch: int, seed: int) -> Batches:
    """Endless mixture of the three kinds of items, one kind per step."""
    rng = random.Random(seed)
    collate = PaddingCollator(tokenizer.pad_token_id)
    pairs = {
        "package": encode_text_to_text(package_examples(), tokenizer, 64, 8),
        "name": encode_text_to_text(get_task("doc_name").train(), tokenizer, 64, 16),
    }
    streams = {name: shuffled(items, batch, rng) for name, items in pairs.items()}
    texts = [" ".join(prose_sentences(record.text)) for record in train_records()]
    windows = [
        ids[start : start + 56]
        for ids in tokenizer([text for text in texts if text], add_special_tokens=False, verbose=False)["input_ids"]
        for start in range(0, len(ids), 56)
        if len(ids) - start >= 8
    ]
    streams["spans"] = shuffled(windows, batch, rng)
    sentinel, end = tokenizer.convert_tokens_to_ids(SENTINELS[0]), tokenizer.eos_token_id
    while True:
        name = rng.choices(("spans", "package", "name"), (0.2, 0.45, 0.35))[0]
        items = next(streams[name])
        yield collate([corrupt_spans(w, sentinel, end, rng) for w in items] if name == "spans" else items)


def gpt2_batches(tokenizer: transformers.PreTrainedTokenizerFast, batch: int, seed: int) -> Batches:
    """Endless blocks of 128 tokens; every pass joins the texts in another order."""
    rng = random.Random(seed)
    collate = PaddingCollator(tokenizer.pad_token_id)
    texts = list(get_task("doc_lm").train())
    while True:
        rng.shuffle(texts)
        blocks = encode_language_modeling(texts, tokenizer, 128)
        rng.shuffle(blocks)
        for start in range(0, len(blocks) - batch + 1, batch):
            yield collate(blocks[start : start + batch])


def pretrain(
    model: transformers.PreTrainedModel, batches: Batches, steps: int, rate: float, embedding_boost: float = 1.0
) -> float:
    """AdamW with linear warm-up over a twentieth of the steps and cosine decay; returns the mean of the last losses.

    ``embedding_boost`` multiplies the embedding's rate: a rare word is updated in only a few steps, and Adam moves it
    by about the rate each time, so with one common rate the T5 hardly learns to read within this budget.
    """
    embedding = model.get_input_embeddings().weight
    others = [p for p in model.parameters() if p is not embedding]
    groups = [
        {"params": [p for p in others if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in others if p.ndim <= 1], "weight_decay": 0.0},
        # AdamW multiplies weight decay by the rate, so a boosted embedding gets a smaller decay.
        {"params": [embedding], "lr": rate * embedding_boost, "weight_decay": 0.05 if embedding_boost == 1 else 0.01},
    ]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98))
    warmup = max(1, steps // 20)
    decay = [0.02 + 0.49 * (1 + math.cos(math.pi * step / steps)) for step in range(steps + 1)]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / warmup, decay[step]))
    model.train()
    losses: list[float] = []
    for step in range(steps):
        loss = model(**next(batches)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if step % 100 == 99:
            print(f"step {step + 1}: loss {sum(losses[-100:]) / 100:.3f}", flush=True)
    return sum(losses[-100:]) / len(losses[-100:])


# tokenizer, model, batches, items per batch, steps, learning rate, embedding_boost
RECIPES: dict[str, tuple[Callable, Callable, Callable, int, int, float, float]] = {
    "t5": (functools.partial(t5_tokenizer, 3072), t5_model, t5_batches, 32, 2000, 1e-3, 10.0),
    "gpt2": (functools.partial(gpt2_tokenizer, 2048), gpt2_model, gpt2_batches, 16, 1800, 3e-3, 1.0),
}


def main() -> None:
    """Command line: train and save each stand-in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", default=list(RECIPES), help="t5, gpt2 (default: both)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "mpoe" / "data" / "stand_ins")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.kinds) - set(RECIPES))
    if unknown:
        parser.error(f"kinds must be among {', '.join(RECIPES)}; got {', '.join(unknown)}")
    for kind in arguments.kinds:
        make_tokenizer, make_model, make_batches, batch, steps, rate, boost = RECIPES[kind]
        torch.manual_seed(0)
        tokenizer = make_tokenizer()
        model = make_model(len(tokenizer))
        print(f"{kind}: {sum(p.numel() for p in model.parameters()):,} parameters, vocabulary {len(tokenizer)}")
        pretrain(model, make_batches(tokenizer, batch, 0), steps, rate, boost)
        model.save_pretrained(arguments.output / kind)
        tokenizer.save_pretrained(arguments.output / kind)


if __name__ == "__main__":
    main()
