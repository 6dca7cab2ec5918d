"""Encoding, padding, generation and scoring, with a word-level tokenizer small enough to check by eye."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from mpoe.data.encode import PaddingCollator, encode_language_modeling, encode_text_to_text
from mpoe.data.predict import evaluate_task, evaluation_mode, generate_texts, language_modeling_loss
from mpoe.data.task import Example, Task

WORDS = ["<pad>", "</s>", "<unk>", "a", "b", "c", "yes", "no"]
PAD, END, UNKNOWN, A, B, C, YES, NO = range(8)


def word_tokenizer(ends: bool = True, **special: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if ends:
        tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", END)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", **special}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def test_text_to_text_ends_and_is_cut_before_the_end_token():
    items = encode_text_to_text([Example("a b c a b", "yes"), Example("a", "no no no no")], word_tokenizer(), 4, 3)
    assert items[0] == {"input_ids": [A, B, C, END], "attention_mask": [1] * 4, "labels": [YES, END]}
    assert items[1] == {"input_ids": [A, END], "attention_mask": [1, 1], "labels": [NO, NO, END]}
    assert encode_text_to_text([], word_tokenizer()) == []


def test_language_modelling_blocks():
    blocks = encode_language_modeling(["a b c", Example("a"), "b"], word_tokenizer(), block_size=4)
    assert [b["input_ids"] for b in blocks] == [[A, B, C, END], [A, END, B, END]]
    assert blocks[0]["labels"] == blocks[0]["input_ids"]
    assert blocks[0]["labels"] is not blocks[0]["input_ids"]
    assert len(encode_language_modeling(["a b c a b c"], word_tokenizer(ends=False), 3)) == 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: encode_text_to_text([Example("a")], word_tokenizer(), 1),
            "max_source_length must be at least 2; got 1",
        ),
        (lambda: encode_text_to_text([Example("a")], word_tokenizer(), 4, 0), "max_target_length must be at least 2"),
        (lambda: encode_text_to_text([Example("a", "b")], word_tokenizer(ends=False)), "must end every text with"),
        (lambda: encode_text_to_text([Example("a")], SimpleNamespace(eos_token_id=1)), "must have pad_token_id"),
        (
            lambda: encode_language_modeling(["a"], word_tokenizer(), 3),
            r"block_size=3 tokens; got 2 tokens from 1 texts",
        ),
        (lambda: encode_language_modeling([], word_tokenizer(), 3), "got 0 tokens from 0 texts"),
        (lambda: encode_language_modeling(["a"], SimpleNamespace(eos_token_id=None), 3), "must have an end token"),
    ],
)
def test_encoding_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_padding():
    items = encode_text_to_text([Example("a b", "yes"), Example("a", "no no")], word_tokenizer())
    batch = PaddingCollator(PAD)(items)
    assert batch["input_ids"].tolist() == [[A, B, END], [A, END, PAD]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[YES, END, -100], [NO, NO, END]]
    assert all(value.dtype == torch.int64 for value in batch.values())
    assert PaddingCollator(PAD, pad_to_multiple_of=8)(items)["input_ids"].shape == (2, 8)
    assert set(PaddingCollator(PAD)([{"input_ids": [A]}])) == {"input_ids"}
    for arguments in ((-1,), (None,), (0, 0)):
        with pytest.raises((TypeError, ValueError), match="must be"):
            PaddingCollator(*arguments)
    with pytest.raises(ValueError, match="at least one item"):
        PaddingCollator(PAD)([])


class Echo(torch.nn.Module):
    """Answers "yes" to sources with "a" in them, else the unknown word; notes how it was called."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.widths: list[int] = []

    def generate(self, input_ids, attention_mask, **settings):
        assert not self.training
        assert settings == {"max_new_tokens": 8, "do_sample": False, "num_beams": 1}
        assert torch.equal(attention_mask.bool(), input_ids != PAD)
        self.widths.append(input_ids.shape[1])
        answer = torch.where((input_ids == A).any(1), YES, UNKNOWN)
        return torch.stack([torch.full_like(answer, PAD), answer, torch.full_like(answer, END)], dim=1)


def test_generation_keeps_order_and_the_mode():
    model = Echo()
    sources = ["a", "b c b", "b a", "c"]
    answers = generate_texts(model, word_tokenizer(), [Example(s) for s in sources], batch_size=2)
    assert answers == ["yes", "", "yes", ""]
    assert model.widths == [2, 4]  # short ones together
    assert model.training
    model.eval()
    with evaluation_mode(model):
        pass
    assert not model.training
    with pytest.raises(ValueError, match="must be at least 1"):
        generate_texts(model, word_tokenizer(), [], batch_size=0)


def test_evaluate_task_scores_generated_texts():
    rows = {"test": [Example("a", "yes"), Example("b", "no"), Example("a c", "no"), Example("b a", "yes")], "train": []}
    task = Task("t", lambda split: rows[split], labels=("no", "yes"), metrics=("accuracy", "f1"))
    scores = evaluate_task(Echo(), word_tokenizer(), task, "test")
    assert scores == {"accuracy": 0.5, "f1": pytest.approx(0.8)}
    assert set(evaluate_task(Echo(), word_tokenizer(), task, "test", n=2)) == {"accuracy", "f1"}
    with pytest.raises(ValueError, match="split train of task t has no items"):
        evaluate_task(Echo(), word_tokenizer(), task, "train")


def test_language_modelling_loss_of_a_uniform_model():
    class Uniform(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, input_ids, attention_mask):
            return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 8))

    blocks = encode_language_modeling(["a b c a b c a b"], word_tokenizer(), block_size=3)
    loss, count = language_modeling_loss(Uniform(), blocks, batch_size=2)
    assert loss == pytest.approx(torch.log(torch.tensor(8.0)).item(), rel=1e-6)
    assert count == 3 * 2
    task = Task(
        "lm", lambda s: [Example("a b c a")], kind="language_modeling", metrics=("perplexity",), max_source_length=4
    )
    assert evaluate_task(Uniform(), word_tokenizer(), task, "test")["perplexity"] == pytest.approx(8.0, rel=1e-6)
    with pytest.raises(ValueError, match="at least one block"):
        language_modeling_loss(Uniform(), [])
