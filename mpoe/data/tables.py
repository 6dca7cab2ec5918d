"""The rows of a task's splits, each with its place, for messages: from files in a folder or the
Hugging Face hub.

Cells of files stay as they are written. The readers of ``datasets``, which reads the hub, would
change some: of a csv file with a cell too many they make the first column an index, and cells that
a line lacks become empty; texts of a json file that look like dates become dates.
"""

import csv
import functools
import gzip
import json
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mpoe.data.spec import Cells, HubData, Section, TaskSpec
from mpoe.data.task import SPLITS, Example, Task, hold_out, with_packages

Table = Sequence[tuple[Cells, str]]  # rows, each with its place
Tables = Mapping[str, Callable[[], Table]]  # split -> a function that reads it
TEXT_COLUMN = "text"  # the only column of a text file
# the last two are WikiText's: wiki.train.raw, wiki.train.tokens
TEXT_SUFFIXES = (".txt", ".raw", ".tokens")
SECTION = 2000  # characters of a text file's rows, at least, unless the file is short
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", *TEXT_SUFFIXES)
SPLIT_STEMS = {
    "train": "train",
    "test": "test",
    **dict.fromkeys(
        ("validation", "valid", "val", "dev", "dev_matched", "validation_matched"), "validation"
    ),
}


def file_format(path: Path) -> str:
    """Suffix that says how to read ``path``, without .gz; "" if unknown."""
    suffix = Path(path.name.removesuffix(".gz")).suffix
    return suffix if suffix in SUFFIXES else ""


def find_files(data_dir: str | Path) -> dict[str, Path]:
    """The file of each split in a folder: train, validation (or valid, val, dev) and test with a
    known suffix, also with .gz and with WikiText's prefix ``wiki.``.

    Raises:
        ValueError: there is no such folder, it holds no train file, or several files of one split.
    """
    folder = Path(data_dir)
    if not folder.is_dir():
        raise ValueError(
            f"data_dir must be an existing folder, or owner/name on the hub; got {str(data_dir)!r}"
        )
    there = sorted(path for path in folder.iterdir() if path.is_file())
    files: dict[str, Path] = {}
    for path in filter(file_format, there):
        stem = path.name.removesuffix(".gz").removesuffix(file_format(path)).removeprefix("wiki.")
        split = SPLIT_STEMS.get(stem)
        if split is None:
            continue
        if split in files:
            raise ValueError(
                f"data_dir {folder} must hold one {split} file; got {files[split].name}, "
                f"{path.name}"
            )
        files[split] = path
    if "train" not in files:
        names = ", ".join(path.name for path in there[:8]) or "nothing"
        raise ValueError(
            f"data_dir {folder} must hold a train file (train with {', '.join(SUFFIXES)}, also "
            f".gz); got {names}"
        )
    return files


def folder_tables(
    folder: str | Path, column_names: Sequence[str] = (), skip_malformed: bool = False
) -> Tables:
    """The files of a folder; raises as `find_files`, and (on reading) as `read_table`."""
    files = find_files(folder).items()
    return {split: partial(read_table, file, column_names, skip_malformed) for split, file in files}


def read_table(path: Path, column_names: Sequence[str] = (), skip_malformed: bool = False) -> Table:
    """Rows of a .jsonl, .csv, .tsv or text file (UTF-8, also with .gz).

    ``column_names`` names the columns of a csv or tsv file whose first line holds none of them.
    Blank lines are skipped, and with ``skip_malformed`` lines with too many or too few columns too
    (a warning counts them). A .tsv file has no quoting (as in GLUE), a .csv file has. A text file,
    and every file with another suffix, is read as it is: its rows are sections, which together are
    the text (see `Section`).

    Raises:
        ValueError: a file that cannot be read or is empty, or a malformed line, which the message
            names.
    """
    try:
        opened: Any = gzip.open if path.suffix == ".gz" else open
        is_text = is_text_file(path)
        with opened(path, "rt", encoding="utf-8-sig", newline=None if is_text else "") as file:
            if is_text:
                rows = list(_sections(path, file.read()))
            elif file_format(path).startswith(".json"):
                rows = list(_json_rows(path, file))
            else:
                rows = list(_csv_rows(path, file, column_names, skip_malformed))
    except UnicodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text; {error}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    if not rows:
        raise ValueError(f"{path}: expected at least one row; got none")
    return rows


def is_text_file(path: Path) -> bool:
    """Whether a file holds running text and no rows of columns."""
    return file_format(path) in ("", *TEXT_SUFFIXES)


def _sections(path: Path, text: str) -> Iterator[tuple[Cells, str]]:
    """Parts of a text that are the text again when they are joined; they end with a line, if
    possible a blank one."""
    least = min(SECTION, len(text) // 20)
    parts = [""]
    for line in text.splitlines(keepends=True):
        parts[-1] += line
        enough = least if line.isspace() else 2 * least
        if len(parts[-1]) >= enough and parts[-1].strip():
            parts.append("")
    for number, part in enumerate(filter(str.strip, parts), start=1):
        yield Section({TEXT_COLUMN: part}), f"{path}, section {number}"


def _json_rows(path: Path, lines: Iterable[str]) -> Iterator[tuple[Cells, str]]:
    for number, line in enumerate(lines, start=1):
        place = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            cells = json.loads(line.rstrip())
        except json.JSONDecodeError as error:
            reason = f"{error.msg} at column {error.colno}"
            raise ValueError(f"{place}: malformed JSON: {reason}") from error
        except (ValueError, RecursionError) as error:  # a number too long, too many brackets
            raise ValueError(f"{place}: malformed JSON: {error}") from error
        if not isinstance(cells, dict):
            raise ValueError(
                f"{place}: expected one JSON object per line; got a {type(cells).__name__}"
            )
        yield cells, place


def _csv_rows(
    path: Path, lines: Iterable[str], column_names: Sequence[str], skip_malformed: bool
) -> Iterator[tuple[Cells, str]]:
    reader = csv.reader(lines, strict=True)
    if file_format(path) == ".tsv":
        reader = csv.reader(lines, strict=True, delimiter="\t", quoting=csv.QUOTE_NONE)
    columns: list[str] = []
    skipped = 0
    try:
        for cells in reader:
            place = f"{path}, line {reader.line_num}"
            if len(cells) < 2 and not "".join(cells).strip():
                continue
            if not columns:
                columns = [cell.strip() for cell in cells]
                headless = bool(column_names) and set(columns).isdisjoint(column_names)
                columns = list(column_names) if headless else columns
                if len(set(columns)) != len(columns):
                    raise ValueError(f"{place}: column names must differ; got {columns}")
                if not headless:
                    continue
            if len(cells) == len(columns):
                yield dict(zip(columns, cells, strict=True)), place
            elif skip_malformed:
                skipped += 1
            else:
                expected = f"expected {len(columns)} columns ({', '.join(columns)})"
                raise ValueError(f"{place}: {expected}; got {len(cells)}")
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: malformed csv: {error}") from error
    if skipped:
        warnings.warn(
            f"{path}: left out {skipped} lines with a wrong number of columns", stacklevel=2
        )


def hub_tables(hub: HubData, task: str) -> Tables:
    """The splits of a data set on the hub, under our names.

    Raises:
        ValueError: the data set cannot be loaded, or has no train split.
    """
    from datasets import load_dataset

    try:
        splits = load_dataset(hub.path, hub.config, data_dir=hub.folder, revision=hub.revision)
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"task {task}: there is no folder {hub.path}, and the hub did not give such a data set "
            f"({reason}); give data_dir, a folder that holds a folder {task} of local files"
        ) from error
    theirs = {split: hub.splits.get(split, split) for split in SPLITS}
    if theirs["train"] not in splits:
        raise ValueError(
            f"hub data set {hub.path} must have a train split; got {', '.join(splits)}"
        )

    def read(split: str) -> Table:
        rows = enumerate(splits[theirs[split]])
        return [(row, f"{hub.path}, {split}, row {index}") for index, row in rows]

    return {split: partial(read, split) for split, name in theirs.items() if name in splits}


def make_task(spec: TaskSpec, tables: Tables, source: str) -> Task:
    """The task of the rows that ``spec`` describes; a split is read when it is first asked for.

    Without validation rows they are taken out of the training ones: a tenth of them, at most a
    thousand. The choice is the same for every seed, so training never sees an item that a later
    evaluation uses. ``source``: what holds the tables, for messages.

    Raises:
        ValueError: (on reading) there is no such split, its labels are not public, or a row does
            not fit.
        RuntimeError: as `with_packages`.
    """

    @functools.cache
    def read(split: str) -> tuple[Example, ...]:
        examples = (spec.example(cells, where) for cells, where in tables[split]())
        return tuple(example for example in examples if example is not None)

    @functools.cache
    def divided() -> tuple[tuple[Example, ...], tuple[Example, ...]]:
        return hold_out(read("train"), 0.1, 0, f"train of task {spec.name}", most=1000)

    def rows(split: str) -> tuple[Example, ...]:
        if split == "test" and spec.hidden_test:
            raise ValueError(
                f"the test labels of task {spec.name} are not public; use split_validation_test"
            )
        if split != "test" and "validation" not in tables:
            return divided()[split == "validation"]
        if split not in tables:
            raise ValueError(f"{source} has no {split} split; use split_validation_test or add one")
        return read(split)

    return with_packages(spec.task(rows))
