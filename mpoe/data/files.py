"""Reads local data files; every error names the file and, if possible, the line."""

from __future__ import annotations

import csv
import gzip
import json
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TABLE_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv")
TEXT_SUFFIXES = (".txt", ".raw", ".tokens")  # the last two are WikiText's: wiki.train.raw, wiki.train.tokens
SPLIT_STEMS = {
    "train": ("train",),
    "validation": ("validation", "valid", "val", "dev", "dev_matched", "validation_matched"),
    "test": ("test",),
}


@dataclass(frozen=True)
class Row:
    """One record of a file: its values by column, and the line (counted from 1) it ends on."""

    values: dict[str, Any]
    line: int


def file_format(path: Path) -> str:
    """Suffix that says how to read ``path``, without .gz; "" if unknown."""
    name = path.name.removesuffix(".gz")
    return next((suffix for suffix in (*TABLE_SUFFIXES, *TEXT_SUFFIXES) if name.endswith(suffix)), "")


def is_text(path: Path) -> bool:
    """Whether ``path`` is running text, not a table."""
    return file_format(path) in TEXT_SUFFIXES


def find_split_file(folder: Path, split: str) -> Path | None:
    """The file of a split in ``folder``: train, validation (or valid, val, dev) or test with a known suffix.

    The prefix ``wiki.`` (WikiText) is ignored.

    Raises:
        ValueError: several files match.
    """
    found = []
    for path in sorted(folder.iterdir()):
        suffix = file_format(path)
        stem = path.name.removesuffix(".gz").removesuffix(suffix).removeprefix("wiki.")
        if suffix and path.is_file() and stem in SPLIT_STEMS[split]:
            found.append(path)
    if len(found) > 1:
        raise ValueError(f"data_dir {folder} must hold one {split} file; got {', '.join(p.name for p in found)}")
    return found[0] if found else None


def read_lines(path: Path) -> list[str]:
    """Lines of a UTF-8 text file (also gzipped; a byte order mark is dropped) without their line ends.

    Raises:
        ValueError: no such file, empty file, a broken gzip file, or bytes that are not UTF-8 (with the line).
    """
    try:
        raw = path.read_bytes()
        data = gzip.decompress(raw) if path.name.endswith(".gz") else raw
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise ValueError(f"{path}, line 1: expected UTF-8; got UTF-16 (save the file as UTF-8)")
    lines = []
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        try:
            lines.append(line.decode("utf-8").removesuffix("\r"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}, line {number}: expected UTF-8; {error.reason} at byte {error.start}") from error
    if not any(line.strip() for line in lines):
        raise ValueError(f"{path}: the file is empty")
    return lines


def has_header(path: Path, columns: Iterable[str]) -> bool:
    """Whether the first line of a csv or tsv file holds one of ``columns``."""
    first = read_lines(path)[0]
    fields = first.split("\t" if file_format(path) == ".tsv" else ",")
    return not {field.strip().strip('"') for field in fields}.isdisjoint(columns)


def read_table(path: Path, column_names: Sequence[str] | None = None, skip_malformed: bool = False) -> list[Row]:
    """Rows of a .jsonl, .csv or .tsv file, also with .gz.

    ``column_names`` names the columns of a csv or tsv file that has no header line. Blank lines are skipped, and with
    ``skip_malformed`` lines with too many or too few columns too (a warning counts them). A .tsv file has no quoting
    (as in GLUE), a .csv file has.

    Raises:
        ValueError: unknown suffix, empty file, not UTF-8, a malformed line, a line with too many or too few columns.
    """
    suffix = file_format(path)
    if suffix not in TABLE_SUFFIXES:
        raise ValueError(f"{path}: expected a file named {', '.join(TABLE_SUFFIXES)} (or these with .gz)")
    lines = read_lines(path)
    if suffix.startswith(".json"):
        rows = list(_json_rows(path, lines))
    else:
        rows = list(_csv_rows(path, lines, suffix, column_names, skip_malformed))
    if not rows:
        raise ValueError(f"{path}: the file has a header but no rows")
    return rows


def read_paragraphs(path: Path) -> list[str]:
    """Paragraphs of a text file: separated by blank lines if it has any, else one per line."""
    text = "\n".join(line.strip() for line in read_lines(path)).strip()
    if "\n\n" in text:
        return [" ".join(part.split("\n")).strip() for part in text.split("\n\n") if part.strip()]
    return text.split("\n")


def _json_rows(path: Path, lines: list[str]) -> Iterator[Row]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: malformed JSON: {error.msg} at column {error.colno}") from error
        except (ValueError, RecursionError) as error:  # a number too long, or brackets nested too deeply
            raise ValueError(f"{path}, line {number}: malformed JSON: {error}") from error
        if not isinstance(values, dict):
            kind = type(values).__name__
            raise ValueError(f"{path}, line {number}: expected one JSON object per line; got a {kind}")
        yield Row(values, number)


def _csv_rows(
    path: Path, lines: list[str], suffix: str, column_names: Sequence[str] | None, skip_malformed: bool
) -> Iterator[Row]:
    if suffix == ".tsv":
        reader = csv.reader((line + "\n" for line in lines), delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        reader = csv.reader((line + "\n" for line in lines), strict=True)
    columns = list(column_names) if column_names else None
    skipped = 0
    try:
        for fields in reader:
            if not fields or (len(fields) == 1 and not fields[0].strip()):
                continue
            if columns is None:
                columns = [field.strip() for field in fields]
                if len(set(columns)) != len(columns):
                    raise ValueError(f"{path}, line {reader.line_num}: column names must differ; got {columns}")
                continue
            if len(fields) != len(columns):
                if skip_malformed:
                    skipped += 1
                    continue
                raise ValueError(
                    f"{path}, line {reader.line_num}: expected {len(columns)} columns ({', '.join(columns)}); "
                    f"got {len(fields)}"
                )
            yield Row(dict(zip(columns, fields, strict=True)), reader.line_num)
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: malformed {suffix[1:]}: {error}") from error
    if skipped:
        warnings.warn(f"{path}: left out {skipped} lines with a wrong number of columns", stacklevel=2)
