"""Encoding, padding, generation and scoring, with a word-level tokenizer; sampling; metrics and
constant answers."""

import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from mpoe.data import metrics as m
from mpoe.data import tasks
from mpoe.data.batches import read_batches
from mpoe.data.embedded_tasks import EMBEDDED_TASKS
from mpoe.data.encode import encode_language_modeling, encode_text_to_text, padding_collator
from mpoe.data.metrics import METRICS
from mpoe.data.predict import (
    collapse,
    constant_scores,
    evaluate_task,
    evaluation_mode,
    frequency_perplexity,
    generate_texts,
    language_modeling_loss,
)
from mpoe.data.task import Example, Task, multitask_batches
from tests.assertions import refuses

WORDS = "<pad> </s> <unk> a b c yes no".split()
PAD, END, UNKNOWN, A, B, C, YES, NO = range(8)


def word_tokenizer(ends=True, **special):
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if ends:
        tokenizer.post_processor = processors.TemplateProcessing(
            "$A </s>", special_tokens=[("</s>", END)]
        )
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", **special}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def test_text_to_text_ends_and_is_cut_before_the_end_token():
    items = encode_text_to_text(
        [Example("a b c a b", "yes"), Example("a", "no no no no")], word_tokenizer(), 4, 3
    )
    assert items[0] == {
        "input_ids": [A, B, C, END],
        "attention_mask": [1] * 4,
        "labels": [YES, END],
    }
    assert items[1] == {"input_ids": [A, END], "attention_mask": [1, 1], "labels": [NO, NO, END]}
    assert encode_text_to_text([], word_tokenizer()) == []


def test_language_modelling_blocks():
    blocks = encode_language_modeling(["a b c", Example("a"), "b"], word_tokenizer(), block_size=4)
    assert [b["input_ids"] for b in blocks] == [[A, B, C, END], [A, END, B, END]]
    assert blocks[0]["labels"] == blocks[0]["input_ids"]
    assert blocks[0]["labels"] is not blocks[0]["input_ids"]
    assert len(encode_language_modeling(["a b c a b c"], word_tokenizer(ends=False), 3)) == 2
    sections = [Example("a ", ends=False), Example("b c a", ends=False), Example("b c", ends=False)]
    assert [b["input_ids"] for b in encode_language_modeling(sections, word_tokenizer(), 2)] == [
        [A, B],
        [C, UNKNOWN],
    ]
    assert (
        encode_language_modeling([*sections, Example("b")], word_tokenizer(), 6)[0]["input_ids"][-1]
        == END
    )


def test_files_are_read_as_training_reads_them(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"prompt": "a b", "response": "yes no"}\n{"prompt": "c", "response": "no"}\n')
    (batch,) = read_batches(file, word_tokenizer(ends=False), 6, most=2)
    assert batch["input_ids"].tolist() == [[A, B, YES, NO, END], [C, NO, END, PAD, PAD]]
    assert batch["labels"].tolist() == [[-100, -100, YES, NO, END], [-100, NO, END, -100, -100]]
    text = tmp_path / "notes.md"  # of no known suffix
    text.write_text("a b\nc a\n" * 90)
    batches = read_batches(text, word_tokenizer(), 4, most=9)
    assert [len(batch["input_ids"]) for batch in batches] == [8, 1]
    assert batches[0]["input_ids"][1].tolist() == [A, B, C, A]
    file.write_text('{"sentence": "a", "label": 1}\n{"sentence": "b", "label": 0}\n')
    refuses(
        ValueError,
        "or prompts with responses; got rows for classification",
        read_batches,
        file,
        None,
        4,
        1,
    )


def test_batches_are_padded_on_the_right_whatever_the_tokenizer_says():
    left = word_tokenizer(padding_side="left")
    items = encode_text_to_text([Example("a b", "yes"), Example("a", "no")], left)
    batch = padding_collator(left)(items)
    assert (batch["input_ids"].tolist(), left.padding_side) == (
        [[A, B, END], [A, END, PAD]],
        "left",
    )
    classes = padding_collator(left, has_classes=True)([{**item, "labels": 1} for item in items])
    assert classes["labels"].tolist() == [1, 1]


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: padding_collator(word_tokenizer(pad_token=None)),
            "tokenizer must have a pad_token",
        ),
        (
            lambda: encode_text_to_text([Example("a")], word_tokenizer(), 1),
            "max_source_length must be at least 2; got 1",
        ),
        (
            lambda: encode_text_to_text([Example("a")], word_tokenizer(), 4, 0),
            "max_target_length must be at least 2",
        ),
        (
            lambda: encode_text_to_text([Example("a", "b")], word_tokenizer(ends=False)),
            "must end every text with",
        ),
        (
            lambda: encode_language_modeling(["a"], word_tokenizer(), 3),
            r"block_size=3 tokens; got 2 tokens from 1 texts",
        ),
        (lambda: encode_language_modeling([], word_tokenizer(), 3), "got 0 tokens from 0 texts"),
        (
            lambda: encode_language_modeling(["a"], SimpleNamespace(eos_token_id=None), 3),
            "must have an end token",
        ),
    ],
)
def test_encoding_refuses(call, message):
    refuses(ValueError, message, call)


class Echo(torch.nn.Module):
    """Answers "yes" to sources with "a" in them, else the unknown word; notes how it was called."""

    device = torch.device("cpu")

    def __init__(self):
        super().__init__()
        self.widths = []

    def generate(self, input_ids, attention_mask, **settings):
        assert not self.training
        assert settings == {"max_new_tokens": 8, "do_sample": False, "num_beams": 1}
        assert torch.equal(attention_mask.bool(), input_ids != PAD)
        self.widths.append(input_ids.shape[1])
        answer = torch.where((input_ids == A).any(1), YES, UNKNOWN)
        return torch.stack(
            [torch.full_like(answer, PAD), answer, torch.full_like(answer, END)], dim=1
        )


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
    refuses(
        ValueError, "must be at least 1", generate_texts, model, word_tokenizer(), [], batch_size=0
    )


def test_evaluate_task_scores_generated_texts():
    rows = {
        "test": [
            Example("a", "yes"),
            Example("b", "no"),
            Example("a c", "no"),
            Example("b a", "yes"),
        ],
        "train": [],
    }
    task = Task("t", lambda split: rows[split], labels=("no", "yes"), metrics=("accuracy", "f1"))
    found = evaluate_task(Echo(), word_tokenizer(), task, "test")
    assert found.scores == {"accuracy": 0.5, "f1": pytest.approx(0.8)}
    assert found.constant == {"accuracy": 0.5, "f1": pytest.approx(2 / 3)}  # "yes" comes first
    refuses(
        ValueError,
        "split train of task t has no items",
        evaluate_task,
        Echo(),
        word_tokenizer(),
        task,
        "train",
    )


def test_language_modelling_loss_of_a_uniform_model():
    class Uniform(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, input_ids, attention_mask):
            return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 8))

    blocks = encode_language_modeling(["a b c a b c a b"], word_tokenizer(), block_size=3)
    blocks[1]["labels"] = [-100, *blocks[1]["labels"][1:]]
    blocks[2] = {name: values[:2] for name, values in blocks[2].items()}  # padded
    loss = language_modeling_loss(Uniform(), word_tokenizer(), blocks, batch_size=3)
    assert loss == pytest.approx(math.log(8.0), rel=1e-6)
    task = Task(
        "lm",
        lambda s: [Example("a b c a")],
        kind="language_modeling",
        metrics=("perplexity",),
        max_source_length=4,
    )
    scores = evaluate_task(Uniform(), word_tokenizer(), task, "test").scores
    assert scores["perplexity"] == pytest.approx(8.0, rel=1e-6)
    refuses(
        ValueError, "at least one block", language_modeling_loss, Uniform(), word_tokenizer(), []
    )


# ------------------------------------------------------------------ sampling


SIZES = {"large": 1600, "small": 100}


@pytest.mark.parametrize(
    "temperature, share", [(1.0, 16 / 17), (2.0, 4 / 5), (4.0, 2 / 3), (float("inf"), 1 / 2)]
)
def test_tasks_are_drawn_by_their_sizes(temperature, share):
    found = multitask_batches(SIZES, 1, 20_000, temperature, seed=1)
    assert np.mean(found < 1600) == pytest.approx(share, abs=0.015)


def test_no_power_of_a_size_overflows():
    assert multitask_batches({"a": 5000, "b": 1}, 2, 100, temperature=0.001).max() < 5000


def batches(**changes):
    fields = {
        "sizes": {"a": 10, "b": 7},
        "batch_size": 6,
        "num_steps": 40,
        "temperature": 2.0,
        "seed": 5,
        **changes,
    }
    return multitask_batches(**fields)


def test_one_task_per_step_and_every_item_once_per_pass():
    found = batches()
    assert (found.shape, found.dtype) == ((40, 6), np.int64)
    of_second = found >= 10
    assert np.array_equal(of_second.all(1), of_second.any(1))
    for first, size in ((0, 10), (10, 7)):
        visited = found[of_second.any(1) == (first == 10)].ravel().tolist()
        for turn in range(len(visited) // size):
            assert sorted(visited[turn * size : (turn + 1) * size]) == list(
                range(first, first + size)
            )
        assert visited[:size] != visited[size : 2 * size]


def test_everything_follows_from_the_arguments():
    assert np.array_equal(batches(), batches())
    assert not np.array_equal(batches(), batches(seed=6))
    assert batches(num_steps=0).shape == (0, 6)
    assert Counter(batches(sizes={"a": 2}, batch_size=5, num_steps=2).ravel().tolist()) == {
        0: 5,
        1: 5,
    }


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"sizes": {}}, "at least one task"),
        ({"sizes": {"a": 0}}, r"sizes\['a'\] must be at least 1; got 0"),
        ({"temperature": 0.0}, "temperature must be > 0; got 0"),
        ({"temperature": float("nan")}, "temperature must be > 0"),
        ({"batch_size": 0}, "batch_size must be at least 1; got 0"),
        ({"num_steps": -1}, "num_steps must be at least 0"),
    ],
)
def test_sampling_refuses(changes, message):
    refuses(ValueError, message, batches, **changes)


# ------------------------------------------------------------------ metrics


ONES, MORE = [1, 1, 1, 0, 0], [1, 1, 0, 1, 0]  # TP 2, TN 1, FP 1, FN 1
CAT, MAT = ["the cat sat on the mat"], ["the cat lay on a mat"]
VALUES = [
    ("f1", ONES, MORE, 2 / 3),
    ("macro_f1", ONES, MORE, (2 / 3 + 0.5) / 2),
    ("f1", [0, 0], [0, 0], 0.0),
    ("f1", [-1, 1], [1, 1], 2 / 3),  # an answer that is no label is a miss
    ("matthews", ONES, MORE, 1 / 6),  # (2 - 1) / sqrt(3 * 3 * 2 * 2)
    # deviations (-1.5,-.5,.5,1.5) and (-1.5,.5,-.5,1.5): 2.25 - .25 - .25 + 2.25 = 4 over 5
    ("pearson", [1, 2, 3, 4], [1, 3, 2, 4], 0.8),
    ("spearman", [1, 2, 3, 4], [10, 300, 20, 4000], 0.8),
    ("spearman", [5, 1, 2], [0, 0, 0], 0.0),
    ("exact_match", ["Get  payload.", "z"], ["get payload", "y"], 0.5),
    # "get the payload" against "get payload": 2 shared of 3 and 2 -> 4/5; "" against "y" -> 0
    ("token_f1", ["get the payload", ""], ["get payload", "y"], 0.4),
    ("token_f1", ["a a"], ["a"], 2 / 3),
    ("token_f1", ["..."], ["!"], 1.0),  # nothing asked, nothing said
    ("rouge1", CAT, MAT, 2 * 4 / 12),  # the, cat, on, mat shared (one "the" is surplus)
    ("rouge2", CAT, MAT, 2 * 1 / 10),  # only "the cat" is shared, of 5 and 5 pairs
    ("rouge_l", ["b a"], ["a b"], 2 * 1 / 4),  # order matters
    # 1: the(1 of 2 kept) cat on mat -> 4/6; 2: "the cat" -> 1/5; 3 and 4 have none -> 1/2 of 4, 1/4
    # of 3
    ("bleu", CAT, MAT, (4 / 6 * 1 / 5 * 0.5 / 4 * 0.25 / 3) ** 0.25),
    # counts of the set, not a mean of sentences: 3 of 4 words, 1 of 2 pairs; no longer n-grams at
    # all
    ("bleu", ["a b", "c d"], ["a b", "c x"], math.sqrt(3 / 4 * 1 / 2)),
    ("bleu", [""], ["y"], 0.0),
]


@pytest.mark.parametrize("name, predicted, expected, value", VALUES)
def test_by_hand(name, predicted, expected, value):
    assert METRICS[name](predicted, expected) == pytest.approx(value)


@pytest.mark.parametrize("name", sorted(METRICS))
def test_every_metric_refuses_unequal_and_empty_input(name):
    metric = m.get_metric(name)
    refuses(ValueError, "differ in length: 2 and 1", metric, ["a", "b"], ["a"])
    refuses(ValueError, "empty", metric, [], [])


def test_wrong_values_do_not_pass():
    for name, odd in (
        ("spearman", [math.nan, 1]),
        ("pearson", np.float32([np.inf] * 2)),
        ("accuracy", [math.nan, 1]),
    ):
        refuses(ValueError, "predictions must be finite numbers; got", METRICS[name], odd, [1, 2])
    refuses(
        ValueError, "Mix of label input types", METRICS["accuracy"], ["1"], [1]
    )  # texts and numbers
    refuses(
        ValueError,
        r"metric must be one of .*; got 'acuracy' \(did you mean 'accuracy'",
        m.get_metric,
        "acuracy",
    )


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(m.importlib.util, "find_spec", lambda asked: None)
    refuses(
        RuntimeError,
        r'needs the package rouge_score: pip install "mpoe\[metrics\]"',
        m.get_metric,
        "rouge_l",
    )
    assert m.get_metric("matthews")([0, 1], [0, 1]) == 1.0


def test_without_the_extra_only_tasks_that_need_it_are_refused(monkeypatch):
    """Before anything is trained; the embedded tasks and the names of all others need none of its
    packages."""
    monkeypatch.setattr(m.importlib.util, "find_spec", lambda asked: None)
    for task in EMBEDDED_TASKS:
        assert tasks.get_task(task.name) is task
    assert {task.name for task in EMBEDDED_TASKS} < set(tasks.task_names())
    needy = Task("needy", kind="generation", rows=lambda split: (), metrics=("bleu",))
    monkeypatch.setitem(tasks._REGISTERED, "needy", needy)
    refuses(RuntimeError, "needs the package sacrebleu", tasks.get_task, "needy")


def task(**options):
    return Task(name="x", rows=lambda split: [], **options)


def test_the_most_frequent_label_or_text_and_the_mean():
    labels = task(labels=("no", "yes"), metrics=("accuracy", "f1", "matthews"))
    targets = ["yes"] * 9 + ["no"]
    assert constant_scores(labels, targets) == pytest.approx(
        {"accuracy": 0.9, "f1": 18 / 19, "matthews": 0.0}
    )
    numbers = task(kind="regression", metrics=("pearson", "spearman"))
    assert constant_scores(numbers, ["1.0", "2.0", "6"]) == {"pearson": 0.0, "spearman": 0.0}
    texts = task(kind="generation", metrics=("exact_match", "token_f1"))
    assert constant_scores(texts, ["a b", "a b", "c"]) == pytest.approx(
        {"exact_match": 2 / 3, "token_f1": 2 / 3}
    )


def test_tokens_by_their_frequency():
    assert frequency_perplexity([1, 2, 3, 4] * 5) == pytest.approx(4.0)
    assert frequency_perplexity([7, 7, 7]) == 1.0
    expected = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert frequency_perplexity(iter([1, 1, 1, 2])) == pytest.approx(expected)
    assert math.isnan(frequency_perplexity([]))


@pytest.mark.parametrize(
    "answers, targets, words",
    [
        (
            ["a"] * 8,
            ["a", "b"] * 4,
            "100% of the 8 answers are 'a', which 50% of the expected ones are",
        ),
        (["a"] * 99 + ["b"], ["a", "b"] * 50, "99% of the 100 answers are 'a', which 50%"),
        (["a"] * 97 + ["b"] * 3, ["a"] * 92 + ["b"] * 8, None),  # nearly as the expected ones
        (
            ["1.0", "2.0"] * 10,
            [str(i) for i in range(20)],
            "the 20 answers have 2 different values, the expected ones 20",
        ),
        (["x" * 60] * 3, ["a", "b", "c"], "xxx..."),
        (["x" * 40] * 3, ["a", "b", "c"], "x" * 40),
        (["a", "b"] * 4, ["b", "a"] * 4, None),  # wrong, but not collapsed
        (["a"] * 4, ["a"] * 4, None),
        (["a"], ["b"], None),
    ],
)
def test_collapse(answers, targets, words):
    found = collapse(answers, targets)
    assert (found is None) == (words is None)
    assert words is None or words in str(found)
