"""Local files: what is detected, what is refused, and that every refusal names file and line."""

import gzip
import json

import pytest

from mpoe.data.spec import regression_text
from mpoe.data.tables import read_table
from mpoe.data.task import SPLITS, Example
from mpoe.data.tasks import load_task_from_folder
from tests.assertions import refuses

ROWS = [{"idx": i, "sentence": f"sentence {i}", "label": i % 2} for i in range(6)]


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    data = text.encode("utf-8") if isinstance(text, str) else text
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
    return path


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def folder_of(tmp_path, rows, **others):
    for split in SPLITS:
        write(tmp_path / f"{split}.jsonl", others.get(split, jsonl(rows)))
    return tmp_path


@pytest.mark.parametrize("suffix", ".jsonl .jsonl.gz .csv .csv.gz .tsv .tsv.gz".split())
def test_formats_give_the_same_task(tmp_path, suffix):
    if suffix.startswith(".jsonl"):
        text = jsonl(ROWS)
    else:
        mark = "," if suffix.startswith(".csv") else "\t"
        text = (
            mark.join(ROWS[0])
            + "\r\n"
            + "".join(mark.join(map(str, r.values())) + "\r\n" for r in ROWS)
        )
    for stem in ("train", "dev", "test"):
        write(tmp_path / "my.task" / f"{stem}{suffix}", "\ufeff" + text)
    task = load_task_from_folder(tmp_path / "my.task")
    assert (task.name, task.kind, task.labels) == ("my_task", "classification", ("0", "1"))
    assert task.metrics == ("accuracy", "f1", "matthews")
    assert task.validation()[1] == Example("my_task sentence: sentence 1", "1")


def test_quotes_are_plain_in_tsv_and_structure_in_csv(tmp_path):
    tsv = write(tmp_path / "a.tsv", 'text\tlabel\nsay "hi\t01\n')
    assert read_table(tsv) == [({"text": 'say "hi', "label": "01"}, f"{tsv}, line 2")]
    csv = write(tmp_path / "a.csv", 'text,label\n"two\nlines, one cell",null\n\nnext,0\n')
    (first, place), (_, last) = read_table(csv)
    assert first == {"text": "two\nlines, one cell", "label": "null"}  # as written
    assert (place, last) == (f"{csv}, line 3", f"{csv}, line 5")
    headless = read_table(write(tmp_path / "b.tsv", "1\tgood\n0\tbad\n"), ["label", "text"])
    assert [cells["text"] for cells, _ in headless] == ["good", "bad"]


def test_labels_words_and_numbers(tmp_path):
    rows = [{"text": "a", "more": "b", "label": x} for x in (10, 2, 2.0, "10")]
    task = load_task_from_folder(folder_of(tmp_path / "n", rows))
    assert task.labels == ("2", "10")  # numeric order, 2.0 is 2
    assert task.train()[0].source == "n text: a more: b"
    task = load_task_from_folder(
        tmp_path / "n", label_words={2: "low", "10": "high"}, text_columns=["more"]
    )
    assert task.labels == ("low", "high")
    assert task.train()[0] == Example("n more: b", "high")
    words = [{"text": "a", "label": x} for x in ("spam", "ham", "eggs")]
    task = load_task_from_folder(folder_of(tmp_path / "w", words))
    assert task.labels == ("eggs", "ham", "spam")
    assert task.metrics == ("accuracy", "macro_f1", "matthews")
    assert load_task_from_folder(tmp_path / "w", metrics=["matthews"]).metrics == ("matthews",)
    generation = load_task_from_folder(tmp_path / "w", kind="generation")
    assert generation.kind == "generation"
    assert generation.train()[0].target == "spam"


def test_regression_is_rounded_to_fifths(tmp_path):
    rows = [{"sentence": "a", "score": x} for x in (2.57, -0.04, 4, -1.11)]
    task = load_task_from_folder(folder_of(tmp_path, rows))
    assert task.kind == "regression"
    assert task.metrics == ("pearson", "spearman")
    assert [e.target for e in task.train()] == ["2.6", "0.0", "4.0", "-1.2"]
    assert regression_text(0.1) == "0.0"
    assert regression_text(-0.3) == "-0.4"


def sections(path, text):
    return [cells["text"] for cells, _ in read_table(write(path, text))]


def test_a_text_file_is_read_as_it_is(tmp_path):
    assert sections(tmp_path / "lines.txt", "one\r\ntwo\n\n") == ["one\n", "two\n"]
    code = "def f(x):\n    return x\n\n\n" * 2000
    found = sections(tmp_path / "code.txt.gz", code)
    assert "".join(found) == code
    assert len(found) == 25  # of 2,000 characters, and on to the next blank line
    assert [part for part in found if not part.endswith("\n\n")] == []
    without_blank_lines = sections(tmp_path / "long.py", "x = 1\n" * 4000)
    assert len(without_blank_lines) == 10  # of twice a twentieth
    write(tmp_path / "lm/train.txt", f"first\n\n{code}")
    task = load_task_from_folder(tmp_path / "lm")
    assert not task.train()[0].ends
    rows = load_task_from_folder(folder_of(tmp_path / "rows", [{"text": "  a\n"}, {"text": "b"}]))
    assert [(example.source, example.ends) for example in rows.train()] == [
        ("  a\n", True),
        ("b", True),
    ]


def test_text_files_are_language_modelling(tmp_path):
    for split in ("train", "validation"):
        write(tmp_path / "lm" / f"{split}.txt.gz", "one\ntwo\n")
    task = load_task_from_folder(tmp_path / "lm")
    assert (task.kind, task.metrics) == ("language_modeling", ("perplexity",))
    assert task.train() == (Example("one\n"), Example("two\n"))
    refuses(ValueError, r"data_dir .*lm has no test split; use split_validation_test", task.test)
    refuses(
        ValueError,
        "no label column among text",
        load_task_from_folder,
        tmp_path / "lm",
        kind="regression",
    )
    table = load_task_from_folder(folder_of(tmp_path / "t", ROWS), kind="language_modeling")
    assert table.train()[0] == Example("sentence 0")


GOOD = jsonl(ROWS)
CUT = gzip.compress(GOOD.encode() * 200, mtime=0)[:60]


@pytest.mark.parametrize(
    "train, message",
    [
        (
            GOOD + '{"sentence": "x", "label": \n',
            r"train\.jsonl, line 7: malformed JSON: .* at column 27",
        ),
        (GOOD + "[1, 2]\n", r"train\.jsonl, line 7: expected one JSON object per line; got a list"),
        (
            GOOD + '\n{"sentense": "x", "label": 1}\n',
            r"line 8: column 'sentence' is missing \(did you mean 'sentense'\?\)",
        ),
        (
            GOOD + '{"sentence": "x", "label": null}\n',
            r"line 7: column 'label' must hold a text or a number; got None",
        ),
        (
            '{"sentence": "x", "value": 1}\n',
            r"train\.jsonl, line 1: no label column among sentence, value",
        ),
        ('{"words": 3, "label": 1}\n', r"train\.jsonl, line 1: no text column among words, label"),
        (
            '{"sentence": "x", "label": 1}\n',
            r"train\.jsonl, line 1: classification needs at least two different labels; got 1",
        ),
        ("\n \n", r"train\.jsonl: expected at least one row; got none"),
    ],
)
def test_bad_json_lines_are_refused_with_file_and_line(tmp_path, train, message):
    refuses(ValueError, message, load_task_from_folder, folder_of(tmp_path, ROWS, train=train))


def test_bad_rows_of_other_splits_are_refused_too(tmp_path):
    unknown = load_task_from_folder(
        folder_of(tmp_path, ROWS, test=GOOD + '{"sentence": "x", "label": 2}\n')
    )
    refuses(
        ValueError,
        r"test\.jsonl, line 7: label_words .* a word for '2', .* words for 0, 1",
        unknown.test,
    )
    rows = [{"sentence": "x", "score": 0.5}]
    bad = load_task_from_folder(
        folder_of(tmp_path / "r", rows, validation='{"sentence": "x", "score": "high"}\n')
    )
    refuses(
        ValueError,
        r"validation\.jsonl, line 1: expected a finite number; got 'high'",
        bad.validation,
    )


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("a.jsonl", b'{"a": 1}\n{"a": "\xe9"}\n', r"a\.jsonl: expected UTF-8 text; .* byte 0xe9"),
        (
            "a.jsonl",
            b'{"a": ' + b"9" * 5000 + b"}",
            r"a\.jsonl, line 1: malformed JSON: Exceeds the limit",
        ),
        (
            "a.csv",
            b"text,label\nx,y,1\n",
            r"a\.csv, line 2: expected 2 columns \(text, label\); got 3",
        ),
        (
            "a.csv",
            b"text,label\nx,1\nx\n",
            r"a\.csv, line 3: expected 2 columns \(text, label\); got 1",
        ),
        ("a.csv", b'text,label\n"x"y,1\n', r"a\.csv, line 2: malformed csv"),
        ("a.tsv", b"text\ttext\nx\t1\n", r"a\.tsv, line 1: column names must differ"),
        ("a.jsonl.gz", b"plain text", r"a\.jsonl\.gz: cannot be read: Not a gzipped file"),
        ("a.jsonl.gz", CUT, r"a\.jsonl\.gz: cannot be read: Compressed file ended"),
    ],
)
def test_bad_files_are_refused(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    refuses(ValueError, message, read_table, tmp_path / name)


def test_bad_folders_and_arguments_are_refused(tmp_path):
    refuses(ValueError, r"must hold a train file .*got nothing", load_task_from_folder, tmp_path)
    write(tmp_path / "train.jsonl", GOOD)
    alone = load_task_from_folder(tmp_path)
    assert len(alone.train()) + len(alone.validation()) == GOOD.count("\n")
    assert not {e.source for e in alone.train()} & {e.source for e in alone.validation()}
    write(tmp_path / "dev.jsonl", GOOD)
    load_task_from_folder(tmp_path)
    words = r"line 2: label_words .* must have a word for '1'.* words for 0, 2"
    refuses(ValueError, words, load_task_from_folder, tmp_path, label_words={0: "no", 2: "yes"})
    write(tmp_path / "val.csv", "text,label\nx,1\n")
    refuses(
        ValueError,
        r"must hold one validation file; got dev\.jsonl, val\.csv",
        load_task_from_folder,
        tmp_path,
    )


@pytest.mark.parametrize("folder, name", [("my (data)", "my_data_"), ("naïve-1", "naïve-1")])
def test_task_is_named_after_its_folder(tmp_path, folder, name):
    assert load_task_from_folder(folder_of(tmp_path / folder, ROWS)).name == name
