"""The tasks that come described, from the hub and from the official folders; the embedded corpus and stand-ins."""

from __future__ import annotations

import dataclasses
import json
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import mpoe.data.embedded
from mpoe.data.embedded import STAND_INS, load_stand_in, stand_in_path
from mpoe.data.encode import encode_language_modeling, encode_text_to_text
from mpoe.data.predict import language_modeling_loss
from mpoe.data.spec import HubData
from mpoe.data.task import Example, with_subsets
from mpoe.data.tasks import STANDARD, detect_hub_task, find_spec, get_task, load_task, standard_specs
from tests.assertions import refuses

GLUE = ("cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli")
SUPERGLUE = ("superglue-boolq", "superglue-cb", "superglue-rte")
CHOICES = ("social_i_qa", "cosmos_qa", "winogrande", "hellaswag", "commonsense_qa")
TRANSLATION = ("wmt16-ro-en", "wmt16-en-ro", "wmt16-en-cs", "wmt16-en-fi", "wmt14-hi-en")
TRANSLATION += ("iwslt2017-ro-nl", "iwslt2017-en-nl")
OTHERS = ("imdb", "snli", "scitail", "paws", "sick", "trec", "yelp_polarity", "wikitext-2", "wikitext-103")
LOCAL = ("movie_sentiment", "sms_spam", "word_in_context", "sentiment_rating")

# columns of the hub's data sets: template columns, label column, labels
HUB_LABELS = {
    **dict.fromkeys(("cola", "sst2", "mrpc", "qqp", "qnli", "rte", "wnli", "paws", "imdb", "yelp_polarity"), (0, 1)),
    **dict.fromkeys(("superglue-boolq", "superglue-rte"), (0, 1)),
    **dict.fromkeys(("mnli", "superglue-cb", "sick"), (0, 1, 2)),
    **dict.fromkeys(("cosmos_qa", "hellaswag"), (0, 1, 2, 3)),
    "social_i_qa": ("1", "2", "3\n"),
    "winogrande": ("1", "2"),
    "commonsense_qa": tuple("ABCDE"),
    "snli": (0, 1, 2, -1),
    "scitail": ("entails", "neutral"),
    "trec": (0, 1, 2, 3, 4, 5),
    "stsb": (2.5, 3.8),
}


def test_all_are_there_and_hidden_tests_are_marked() -> None:
    specs = standard_specs()
    assert set(specs) == {*GLUE, *SUPERGLUE, *CHOICES, *TRANSLATION, *OTHERS, *LOCAL}
    assert {name for name, spec in specs.items() if spec.hidden_test} == {*GLUE, *SUPERGLUE, *CHOICES}
    assert {name for name, spec in specs.items() if spec.hub is None} == set(LOCAL)
    assert len({path.name for path in STANDARD.glob("*.yaml")}) == 6


Loader = Callable[..., dict[str, list[dict[str, Any]]]]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[Loader], None]:
    """Put a function in the place of ``datasets.load_dataset``."""

    def put(load: Loader) -> None:
        module = ModuleType("datasets")
        module.load_dataset = load  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "datasets", module)

    return put


@pytest.mark.parametrize("name", [*GLUE, *SUPERGLUE, *CHOICES, *TRANSLATION, *OTHERS])
def test_from_the_hub(hub, name: str) -> None:
    spec = find_spec(name)
    assert spec is not None
    labels = HUB_LABELS.get(name, ("words",))
    calls = []

    def load(path: str, config: str | None, data_dir: str | None, revision: str | None) -> dict:
        calls.append((path, config or data_dir))
        rows = [
            {**{column: f"{column} {i}" for column in spec.columns}, spec.label_column: labels[i % len(labels)]}
            for i in range(24)
        ]
        splits = {"train": rows, "test": rows[:2]}
        if name not in ("imdb", "trec", "yelp_polarity"):
            splits["validation_matched" if name == "mnli" else "validation"] = rows[:8]
        return splits

    hub(load)
    task = get_task(name)
    train, validation = task.train(), task.validation()
    assert len(calls) == 1
    assert len(train) + (len(validation) if len(validation) == 2 else 0) == (18 if name == "snli" else 24)
    assert all(f"{column} " in train[0].source and f"{{{column}}}" not in train[0].source for column in spec.columns)
    if task.kind == "classification":
        assert {example.target for example in train} == set(task.labels)
        assert all(set(task.score([word], [word])) == set(task.metrics) for word in task.labels)
    if spec.hidden_test:
        refuses(ValueError, f"the test labels of task {name} are not public; use split_validation", task.test)
    elif task.kind != "language_modeling":
        assert len(task.test()) == 2


# Files as the official archives hold them: header line or none, and rows with the labels 0/1 in their spelling.
OFFICIAL = {
    "cola": ("CoLA", None, ["gj04\t1\t\tIt is raining.", "gj04\t0\t*\tRaining it."]),
    "sst2": ("SST-2", "sentence\tlabel", ["a treat\t1", "a chore\t0"]),
    "mrpc": ("MRPC", "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", ["1\t7\t8\tone\tuno", '0\t7\t9\t"one\ttwo']),
    "qqp": ("QQP", "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", ["1\t2\t3\ta?\tb?\t1", "1\t2\t3\ta?\tc?\t0"]),
    "stsb": ("STS-B", "index\tsentence1\tsentence2\tscore", ["0\ta\tb\t3.800", "1\ta\tc\t0.25"]),
    "mnli": (
        "MNLI",
        "index\tsentence1\tsentence2\tlabel1\tgold_label",
        ["0\ta\tb\tneutral\tentailment", "1\ta\tc\tneutral\tcontradiction"],
    ),
    "qnli": ("QNLI", "index\tquestion\tsentence\tlabel", ["0\ta?\tb\tentailment", "1\ta?\tc\tnot_entailment"]),
    "rte": ("RTE", "index\tsentence1\tsentence2\tlabel", ["0\ta\tb\tentailment", "1\ta\tc\tnot_entailment"]),
    "wnli": ("WNLI", "index\tsentence1\tsentence2\tlabel", ["0\ta\tb\t1", "1\ta\tc\t0"]),
}
EXPECTED = {
    **dict.fromkeys(("mrpc", "qqp"), ("same", "different")),
    **dict.fromkeys(("qnli", "rte", "wnli"), ("yes", "no")),
    "cola": ("accepted", "rejected"),
    "sst2": ("good", "bad"),
    "stsb": ("3.8", "0.2"),
    "mnli": ("true", "false"),
}


def write_glue(folder: Path, name: str) -> Path:
    """The folder of a GLUE task with two rows in each of train and dev, and a test file without labels."""
    official, header, rows = OFFICIAL[name]
    (folder / official).mkdir(parents=True, exist_ok=True)
    text = "".join(f"{line}\n" for line in ([header] if header else []) + rows)
    for file in ("train", "dev_matched" if name == "mnli" else "dev"):
        (folder / official / f"{file}.tsv").write_text(text)
    (folder / official / "test.tsv").write_text("index\tsentence\n0\twho knows\n")
    return folder / official


@pytest.mark.parametrize("name", GLUE)
def test_from_the_official_glue_folder(tmp_path: Path, name: str) -> None:
    spec = find_spec(name)
    assert spec is not None
    folder = write_glue(tmp_path, name)
    assert spec.folder == folder.name
    task = load_task(spec, folder)
    assert tuple(example.target for example in task.train()) == EXPECTED[name]
    assert task.validation() == task.train()


def test_labels_that_are_true_and_false(tmp_path: Path) -> None:
    rows = [
        {"question": "is it", "passage": "It is.", "label": True, "idx": 0},
        {"question": "is it", "passage": "It is not.", "label": False, "idx": 1},
    ]
    for file in ("train", "val"):
        (tmp_path / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    boolq = find_spec("superglue-boolq")
    assert boolq is not None
    assert [example.target for example in load_task(boolq, tmp_path).train()] == ["yes", "no"]


def test_what_the_hub_does_not_give(hub) -> None:
    def offline(*_: object, **__: object) -> dict:
        raise ConnectionError("Couldn't reach it")

    hub(offline)
    with pytest.raises(
        ValueError, match=r"task rte: the hub did not give nyu-mll/glue \(Couldn't reach it\); give data_"
    ):
        get_task("rte")
    hub(lambda *_, **__: {"dev": []})
    for read in (lambda: get_task("mnli"), lambda: detect_hub_task("nyu-mll/glue", "set")):
        refuses(ValueError, r"hub data set nyu-mll/glue must have a train split; got dev", read)
    rows = [{"text": f"text {i}", "coarse_label": i % 6} for i in range(24)]
    hub(lambda *_, **__: {"train": rows})
    with pytest.raises(ValueError, match="hub data set CogComp/trec of task trec has no test split; use split_"):
        get_task("trec").test()


def test_the_datasets_package_itself_reads_such_a_repository(tmp_path: Path) -> None:
    for folder in ("boolq", "cb"):  # as the hub lays out a converted data set: a folder per configuration
        (tmp_path / "set" / folder).mkdir(parents=True)
        for split in ("train", "validation", "test"):
            rows = [{"question": f"{folder} {split}", "passage": "p", "label": i % 2} for i in range(4)]
            file = tmp_path / "set" / folder / f"{split}.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    boolq = find_spec("superglue-boolq")
    assert boolq is not None
    task = load_task(dataclasses.replace(boolq, hub=HubData(str(tmp_path / "set"), folder="boolq")))
    assert len(task.train()) == len(task.validation()) == 4
    assert task.train()[1] == Example("Read: p Then say yes or no: boolq train?", "yes")


# ------------------------------------------------------------------ stand-ins


@pytest.mark.parametrize("kind", sorted(STAND_INS))
def test_folder_is_small_and_complete(kind):
    folder = stand_in_path(kind)
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= set(sizes)
    assert sum(sizes.values()) < 6_000_000
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == kind
    assert config["dtype"] == "float32"


def test_unknown_stand_in_is_refused():
    refuses(ValueError, r"stand-in must be one of 't5', 'gpt2'; got 't6' \(did you mean 't5'", stand_in_path, "t6")


def test_an_installation_without_it(tmp_path, monkeypatch):
    monkeypatch.setattr(mpoe.data.embedded, "__file__", str(tmp_path / "embedded.py"))
    with pytest.raises(FileNotFoundError, match=r"stand-in checkpoint is missing from this installation: .*stand_ins"):
        stand_in_path("t5")


@pytest.mark.parametrize("kind", sorted(STAND_INS))
def test_loads_without_network(kind, monkeypatch):
    def refused(*_):
        raise OSError("no network")

    monkeypatch.setattr(socket, "socket", refused)
    model, tokenizer = load_stand_in(kind)
    assert (model.dtype, model.training) == (torch.float32, False)
    ids = tokenizer("Return the mean of 2 arrays.", return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=4, do_sample=False)
    text = tokenizer.decode(out[0], skip_special_tokens=True)
    if kind == "gpt2":
        assert text.startswith("Return the mean of 2 arrays.")


def test_t5_tokenizer_round_trips_and_labels_are_single_tokens():
    _, tokenizer = load_stand_in("t5")
    [item] = encode_text_to_text([Example("name of: return the mean", "mean")], tokenizer)
    assert item["input_ids"][-1] == tokenizer.eos_token_id
    assert tokenizer.decode(item["input_ids"], skip_special_tokens=True) == "name of: return the mean"
    for label in get_task("doc_module").labels:
        assert len(tokenizer(label)["input_ids"]) == 2, label
    assert len(tokenizer("[it]")["input_ids"]) <= 3


def test_gpt2_tokenizer_is_lossless():
    _, tokenizer = load_stand_in("gpt2")
    text = "Tabs\tand  blanks,\n    indents, ünïcode and <html>."
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_gpt2_predicts_held_out_documentation():
    model, tokenizer = load_stand_in("gpt2")
    blocks = encode_language_modeling(with_subsets(get_task("doc_lm"), n_test=120).test(), tokenizer, 128)
    loss, _ = language_modeling_loss(model, tokenizer, blocks)
    assert loss < 4.2  # log(2048) = 7.6 knows nothing
    loss = model(**{k: torch.tensor([blocks[0][k]]) for k in ("input_ids", "labels")}).loss
    assert torch.isfinite(loss)
