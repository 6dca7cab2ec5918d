"""The tasks that come described, from the hub and from the official folders; the embedded corpus
and stand-ins."""

import ast
import dataclasses
import json
import socket
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
import torch

from mpoe.data import documentation
from mpoe.data.documentation import (
    DocRecord,
    dotted_name,
    load_documentation,
    read_module,
    read_package,
    split_of,
    unit_hash,
)
from mpoe.data.embedded_tasks import FAMILIES, MASK, TELLING, family_of, mask_names, module_items
from mpoe.data.encode import encode_language_modeling, encode_text_to_text
from mpoe.data.predict import language_modeling_loss
from mpoe.data.spec import HubData
from mpoe.data.stand_in_models import STAND_INS, load_stand_in, stand_in_path
from mpoe.data.task import SPLITS, Example, with_subsets
from mpoe.data.tasks import (
    STANDARD,
    find_spec,
    get_task,
    load_task,
    load_task_from_folder,
    standard_specs,
)
from tests.assertions import refuses

GLUE = "cola sst2 mrpc qqp stsb mnli qnli rte wnli".split()
SUPERGLUE = ("superglue-boolq", "superglue-cb", "superglue-rte")
CHOICES = ("social_i_qa", "cosmos_qa", "winogrande", "hellaswag", "commonsense_qa")
TRANSLATION = ("wmt16-ro-en", "wmt16-en-ro", "wmt16-en-cs", "wmt16-en-fi", "wmt14-hi-en")
TRANSLATION += ("iwslt2017-ro-nl", "iwslt2017-en-nl")
OTHERS = "imdb snli scitail paws sick trec yelp_polarity wikitext-2 wikitext-103".split()
LOCAL = ("movie_sentiment", "sms_spam", "word_in_context", "sentiment_rating")

# columns of the hub's data sets: template columns, label column, labels
HUB_LABELS = {
    **dict.fromkeys("cola sst2 mrpc qqp qnli rte wnli paws imdb yelp_polarity".split(), (0, 1)),
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


def test_all_are_there_and_hidden_tests_are_marked():
    specs = standard_specs()
    assert set(specs) == {*GLUE, *SUPERGLUE, *CHOICES, *TRANSLATION, *OTHERS, *LOCAL}
    assert {name for name, spec in specs.items() if spec.hidden_test} == {
        *GLUE,
        *SUPERGLUE,
        *CHOICES,
    }
    assert {name for name, spec in specs.items() if spec.hub is None} == set(LOCAL)
    assert len({path.name for path in STANDARD.glob("*.yaml")}) == 6


@pytest.fixture
def hub(monkeypatch):
    """Put a function in the place of ``datasets.load_dataset``."""

    def put(load):
        module = ModuleType("datasets")
        module.load_dataset = load
        monkeypatch.setitem(sys.modules, "datasets", module)

    return put


@pytest.mark.parametrize("name", [*GLUE, *SUPERGLUE, *CHOICES, *TRANSLATION, *OTHERS])
def test_from_the_hub(hub, name):
    spec = find_spec(name)
    labels = HUB_LABELS.get(name, ("words",))
    calls = []

    def load(path, config, data_dir, revision):
        calls.append((path, config or data_dir))
        rows = [
            {
                **{column: f"{column} {i}" for column in spec.columns},
                spec.label_column: labels[i % len(labels)],
            }
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
    assert len(train) + (len(validation) if len(validation) == 2 else 0) == (
        18 if name == "snli" else 24
    )
    source = train[0].source
    for column in spec.columns:
        assert f"{column} " in source, column
        assert f"{{{column}}}" not in source, column
    if task.kind == "classification":
        assert {example.target for example in train} == set(task.labels)
        for word in task.labels:
            assert task.score([word], [word]).keys() == set(task.metrics), word
    if spec.hidden_test:
        refuses(
            ValueError,
            f"the test labels of task {name} are not public; use split_validation",
            task.test,
        )
    elif task.kind != "language_modeling":
        assert len(task.test()) == 2


# Files as the official archives hold them: header line or none, and rows with the labels 0/1 in
# their spelling.
OFFICIAL = {
    "cola": ("CoLA", None, ["gj04\t1\t\tIt is raining.", "gj04\t0\t*\tRaining it."]),
    "sst2": ("SST-2", "sentence\tlabel", ["a treat\t1", "a chore\t0"]),
    "mrpc": (
        "MRPC",
        "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String",
        ["1\t7\t8\tone\tuno", '0\t7\t9\t"one\ttwo'],
    ),
    "qqp": (
        "QQP",
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
        ["1\t2\t3\ta?\tb?\t1", "1\t2\t3\ta?\tc?\t0"],
    ),
    "stsb": ("STS-B", "index\tsentence1\tsentence2\tscore", ["0\ta\tb\t3.800", "1\ta\tc\t0.25"]),
    "mnli": (
        "MNLI",
        "index\tsentence1\tsentence2\tlabel1\tgold_label",
        ["0\ta\tb\tneutral\tentailment", "1\ta\tc\tneutral\tcontradiction"],
    ),
    "qnli": (
        "QNLI",
        "index\tquestion\tsentence\tlabel",
        ["0\ta?\tb\tentailment", "1\ta?\tc\tnot_entailment"],
    ),
    "rte": (
        "RTE",
        "index\tsentence1\tsentence2\tlabel",
        ["0\ta\tb\tentailment", "1\ta\tc\tnot_entailment"],
    ),
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


def write_glue(folder, name):
    """The folder of a GLUE task with two rows in each of train and dev, and a test file without
    labels."""
    official, header, rows = OFFICIAL[name]
    (folder / official).mkdir(parents=True, exist_ok=True)
    text = "".join(f"{line}\n" for line in ([header] if header else []) + rows)
    for file in ("train", "dev_matched" if name == "mnli" else "dev"):
        (folder / official / f"{file}.tsv").write_text(text)
    (folder / official / "test.tsv").write_text("index\tsentence\n0\twho knows\n")
    return folder / official


@pytest.mark.parametrize("name", GLUE)
def test_from_the_official_glue_folder(tmp_path, name):
    spec = find_spec(name)
    folder = write_glue(tmp_path, name)
    assert spec.folder == folder.name
    task = load_task(spec, folder)
    assert tuple(example.target for example in task.train()) == EXPECTED[name]
    assert task.validation() == task.train()


def test_labels_that_are_true_and_false(tmp_path):
    rows = [
        {"question": "is it", "passage": "It is.", "label": True, "idx": 0},
        {"question": "is it", "passage": "It is not.", "label": False, "idx": 1},
    ]
    for file in ("train", "val"):
        (tmp_path / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    boolq = find_spec("superglue-boolq")
    assert [example.target for example in load_task(boolq, tmp_path).train()] == ["yes", "no"]


def test_what_the_hub_does_not_give(hub):
    def offline(*_, **__):
        raise ConnectionError("Couldn't reach it")

    hub(offline)
    refuses(
        ValueError,
        r"task rte: there is no folder nyu-mll/glue, and .* \(Couldn't reach it\); give data",
        get_task,
        "rte",
    )
    hub(lambda *_, **__: {"dev": []})
    for read in (lambda: get_task("mnli"), lambda: load_task_from_folder("nyu-mll/glue")):
        refuses(ValueError, r"hub data set nyu-mll/glue must have a train split; got dev", read)
    refuses(
        ValueError,
        "data_dir must be an existing folder",
        load_task_from_folder,
        Path("nyu-mll/glue"),
    )
    rows = [{"text": f"text {i}", "coarse_label": i % 6} for i in range(24)]
    hub(lambda *_, **__: {"train": rows})
    refuses(
        ValueError,
        "hub data set CogComp/trec of task trec has no test split; use split_",
        get_task("trec").test,
    )


def test_the_datasets_package_itself_reads_such_a_repository(tmp_path):
    for folder in (
        "boolq",
        "cb",
    ):  # as the hub lays out a converted data set: a folder per configuration
        (tmp_path / "set" / folder).mkdir(parents=True)
        for split in ("train", "validation", "test"):
            rows = [
                {"question": f"{folder} {split}", "passage": "p", "label": i % 2} for i in range(4)
            ]
            file = tmp_path / "set" / folder / f"{split}.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    boolq = find_spec("superglue-boolq")
    task = load_task(dataclasses.replace(boolq, hub=HubData(str(tmp_path / "set"), folder="boolq")))
    assert len(task.train()) == len(task.validation()) == 4
    assert task.train()[1] == Example("Read: p Then say yes or no: boolq train?", "yes")


# ------------------------------------------------------------------ embedded tasks


SOURCE = '''
"""Module text."""
import missing_module_that_must_not_be_imported
class Pool:
    """Class text."""
    def get(self):
        """Method text."""
        def inner():
            """Nobody's."""
try:
    def build():
        """Function text."""
except ImportError:
    pass
add_newdoc("numpy._core.multiarray", "ndarray", [("fill", """a.fill(value)

    Fill it."""), ("size", """Number of elements.""")])
add_newdoc("numpy._core.umath", "sin", """Sine.""")
add_newdoc("ArrayLike", "Union", """An alias.""")
add_newdoc("numpy", f"{missing}", """Built later.""")
'''


def test_reads_every_kind_of_object_without_importing():
    records = {record.name: record.text for record in read_module(ast.parse(SOURCE), "pool")}
    assert records == {
        "pool": "Module text.",
        "pool.Pool": "Class text.",
        "pool.Pool.get": "Method text.",
        "pool.build": "Function text.",
        "numpy.core.multiarray.ndarray.fill": "a.fill(value)\n\nFill it.",
        "numpy.core.multiarray.ndarray.size": "Number of elements.",
        "numpy.core.umath.sin": "Sine.",
    }


def test_unreadable_and_test_files_are_skipped(tmp_path):
    (tmp_path / "good.py").write_text('"""Good text."""')
    (tmp_path / "broken.py").write_text("def (")
    (tmp_path / "test_good.py").write_text('"""A test."""')
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/more.py").write_text('"""A test."""')
    assert [r.name for r in read_package(tmp_path, "pack")] == ["pack.good"]


def test_a_machine_without_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(documentation.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(documentation, "_corpus", documentation._corpus.__wrapped__)
    refuses(
        FileNotFoundError,
        f"no documented Python source files found in {tmp_path}",
        load_documentation,
        "train",
    )


def test_the_corpus_is_large_and_an_object_has_its_split_by_package_and_name_alone():
    splits = {split: load_documentation(split) for split in SPLITS}
    records = [record for split in splits.values() for record in split]
    assert len(records) > 5000
    assert len({r.name for r in records}) == len({r.text for r in records}) == len(records)
    assert {r.name.split(".")[0] for r in records} >= {"numpy", "asyncio", "email", "topics"}
    assert len(splits["train"]) / len(records) == pytest.approx(0.72, abs=0.03)
    assert len(splits["test"]) / len(records) == pytest.approx(0.20, abs=0.03)
    refuses(ValueError, r"split must be one of 'train'.*'dev'", load_documentation, "dev")
    # Values written down once: a change of hash would move test items into the training split of
    # shipped checkpoints.
    assert unit_hash("mpoe") == pytest.approx(0.9296015736222284, abs=1e-12)
    assert [split_of("email", f"object{i}") for i in range(12)] == ["train"] * 6 + ["test"] + [
        "train"
    ] * 5
    assert next(
        r for r in records if r.name == "email.message.Message.get_payload"
    ).split == split_of("email", "Message.get_payload")
    held_out = {r.name for r in splits["test"]}
    assert not any(e.source.split("\n", 1)[0] in held_out for e in get_task("doc_lm").train())


def test_moved_modules_keep_their_split():
    assert dotted_name("numpy", ("_core", "fromnumeric.py")) == "numpy.core.fromnumeric"
    assert dotted_name("numpy", ("lib", "_function_base_impl.py")) == "numpy.lib.function_base"
    assert dotted_name("", ("_pydecimal.py",)) == "decimal"
    assert dotted_name("", ("email", "__init__.py")) == "email"
    old, new = (
        next(read_module(ast.parse('def f():\n  "text"'), name))
        for name in ("pathlib", "pathlib.local")
    )
    assert old.split == new.split


def test_doc_module_shares_no_source_text_and_shows_no_name_of_its_module():
    task = get_task("doc_module")
    splits = [task.examples(split) for split in SPLITS]
    assert len({e.source.lower() for items in splits for e in items}) == sum(map(len, splits))
    assert len(splits[2]) > 600
    counts = Counter(example.target for example in splits[2])
    assert set(counts) <= set(task.labels)
    assert len(counts) >= 4
    assert max(counts.values()) / counts.total() < 0.45
    for example in splits[2]:
        words = set(example.source.removeprefix("subject of: ").lower().replace(".", " ").split())
        assert not words & TELLING
        assert example.target not in words


def test_items_of_one_record():
    text = (
        "Return the payload of the message. It is an email.message.Message or a str. Third "
        "words come here. And fourth."
    )
    record = DocRecord("email.message.Message.get_payload", text, "train")
    first, second, third = module_items(record)
    assert first == Example(f"subject of: Return the payload of the {MASK}.", "mail")
    assert second.source == f"subject of: It is an {MASK} or a str."
    assert third.target == "mail"
    assert family_of("numpy.polynomial.hermite") == "number"
    assert family_of("numpy.core.fromnumeric") == "array"
    assert family_of("numpy.f2py") is family_of("osx") is None
    assert len(FAMILIES) == 12
    assert mask_names("Use np.Array, not arrays.", {"array", "np"}) == f"Use {MASK}, not arrays."
    assert mask_names("x = 1", {"x"}) == "x = 1"  # one-letter names say nothing


# ------------------------------------------------------------------ stand-ins


def test_unknown_stand_in_is_refused():
    refuses(
        ValueError,
        r"stand-in must be one of 't5', 'gpt2'; got 't6' \(did you mean 't5'",
        stand_in_path,
        "t6",
    )


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
    assert (
        tokenizer.decode(item["input_ids"], skip_special_tokens=True) == "name of: return the mean"
    )
    for label in get_task("doc_module").labels:
        assert len(tokenizer(label)["input_ids"]) == 2, label
    assert len(tokenizer("[it]")["input_ids"]) <= 3


def test_gpt2_predicts_held_out_documentation():
    model, tokenizer = load_stand_in("gpt2")
    blocks = encode_language_modeling(
        with_subsets(get_task("doc_lm"), n_test=40).test(), tokenizer, 128
    )
    loss = language_modeling_loss(model, tokenizer, blocks)
    assert loss < 4.2  # log(2048) = 7.6 knows nothing
