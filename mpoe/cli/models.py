"""Models by the name that the user typed (a stand-in, a folder or a hub name), and what commands
write: atomic files, whole models, and folders that are checked before any work."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit
from urllib.request import getproxies

import transformers
from huggingface_hub import constants
from transformers.utils import logging

from mpoe.cli.command import CommandError, close_matches
from mpoe.data.embedded import STAND_INS, stand_in_path
from mpoe.data.mappings import read_mapping
from mpoe.data.task import Task
from mpoe.models import load_mpoe
from mpoe.models.classes import STYLE_HEADS, classes_of
from mpoe.models.table import ENCODER, TABLE, TYPE_PREFIX, known_type
from mpoe.models.weight_files import check_links, check_weight_files, write_text
from mpoe.training.checkpoints import clean_leftovers, delete
from mpoe.training.output_dir import check_folder
from mpoe.training.published import (
    CONFIG,
    finish,
    foreign_files,
    publish,
    staging_folder,
    written_files,
)
from mpoe.training.run_lock import check_free, hold

_TOKENIZER_FILES = ("tokenizer*", "*.model", "vocab*")


@dataclass(frozen=True)
class Source:
    """A model that was found but not loaded yet.

    ``path``: argument for ``from_pretrained``; ``model_type`` and ``architecture`` (the class, if
    named): from its configuration; ``style``: seq2seq, causal or encoder.
    """

    path: str
    model_type: str
    architecture: str = ""

    @property
    def style(self) -> str:
        return TABLE[self.model_type.removeprefix(TYPE_PREFIX)].style

    @property
    def is_classifier(self) -> bool:
        """Whether it is an encoder with a head for labels or numbers."""
        return self.style == ENCODER and self.architecture.endswith("ForSequenceClassification")

    @property
    def is_mpoe(self) -> bool:
        return self.model_type.startswith(TYPE_PREFIX)


def find(name: str) -> Source:
    """Locate a model and read its family from its configuration, without loading weights.

    Raises:
        ValueError: as `read_configuration`, or an unsupported family.
    """
    values = read_configuration(name)
    names = values.get("architectures")
    architecture = str(names[0]) if isinstance(names, list) and names else ""
    return Source(
        str(stand_in_path(name)) if name in STAND_INS else name,
        known_type(name, values),
        architecture,
    )


def find_to_copy(name: str) -> Source:
    """As `find`, of a model that goes into an output: no file of its folder may be a link that
    leads out of it (ValueError)."""
    source = find(name)
    check_links(Path(source.path))
    return source


def read_configuration(name: str, others: Iterable[str] = ()) -> dict[str, Any]:
    """The values of the ``config.json`` of a model; ``others`` are further names that a message may
    suggest.

    Raises:
        ValueError: nothing of that name, a folder without a model, a broken configuration.
    """
    folder = stand_in_path(name) if name in STAND_INS else Path(name)
    if folder.exists() and not folder.is_dir():
        raise CommandError(f"model must be a folder, a hub name, t5 or gpt2; {folder} is a file")
    finish(folder)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise CommandError(f"model: {folder} holds no config.json, so it is not a saved model")
    if folder.is_dir():
        return read_mapping(folder / "config.json", "configuration")
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or _beside(name):
        raise CommandError(
            f"model: no such folder: {name}{close_matches(Path(name).name, _beside(name))}"
        )
    try:
        values, _ = transformers.PreTrainedConfig.get_config_dict(
            name, local_files_only=not _hub_answers()
        )
        return dict(values)
    except (OSError, ValueError) as error:
        known = [*STAND_INS, *others, *(path.name for path in Path().iterdir() if path.is_dir())]
        reason = str(error).strip().partition("\n")[0]
        raise CommandError(
            f"model: {name!r} is not a folder here, no built-in model ({', '.join(STAND_INS)}), "
            "and the hub did not "
            f"give it ({reason}){close_matches(name, known)}"
        ) from error


def _beside(name: str) -> list[str]:
    """The folders beside a path such as runs/first, if runs is here; a hub's owner is not."""
    parent = Path(name).parent
    return [path.name for path in parent.iterdir()] if parent != Path() and parent.is_dir() else []


def _hub_answers() -> bool:
    """Whether the hub can be reached; its library would try for 30 s. Not asked offline or through
    a proxy."""
    host = urlsplit(constants.ENDPOINT)
    if constants.HF_HUB_OFFLINE or getproxies():
        return True
    try:
        socket.create_connection((str(host.hostname), host.port or 443), timeout=3).close()
    except OSError:
        return False
    return True


def labels_for(source: Source, task: Task) -> tuple[str, ...]:
    """The labels that an encoder's head tells apart, in its order: the model's own if they are the
    task's, otherwise the task's; none for numbers."""
    if source.is_classifier:
        labels = tuple(transformers.AutoConfig.from_pretrained(source.path).id2label.values())
        if set(labels) == set(task.labels):
            return labels
    return task.labels


def load_model(source: Source, labels: Sequence[str] | None = None) -> Any:
    """The model in eval mode: dense ones by their Auto class in float32, mixtures by `load_mpoe` in
    their own dtype.

    ``labels``: an encoder gets a head for them (none: for a number), unless it has that head
    already.

    Raises:
        ValueError: weights that are missing, damaged, or do not match the configuration.
    """
    logging.disable_progress_bar()  # of weight files; the Trainer's own bars stay
    options: dict[str, Any] = {}
    if labels is not None:
        kind = "single_label_classification" if labels else "regression"
        names = dict(enumerate(labels or ("value",)))
        options = {"num_labels": len(names), "problem_type": kind, "ignore_mismatched_sizes": True}
        options |= {"id2label": names, "label2id": {name: index for index, name in names.items()}}
    if source.is_mpoe and options:
        classes_of(
            source.model_type.removeprefix(TYPE_PREFIX)
        )  # which registers them with the Auto classes
    elif source.is_mpoe:
        return load_mpoe(source.path)
    is_head = source.is_classifier or options
    auto = "AutoModelForSequenceClassification" if is_head else STYLE_HEADS[source.style]
    try:
        model = (
            getattr(transformers, auto)
            .from_pretrained(source.path, dtype="float32", **options)
            .eval()
        )
    except (
        Exception
    ) as error:  # Transformers and its file readers have no common exception for damaged files
        raise CommandError(
            f"model: the weights of {source.path} cannot be loaded: {error}"
        ) from error
    if Path(source.path).is_dir():
        check_weight_files(Path(source.path), model)
    return model


def tokenizer_if_any(source: Source) -> Any:
    """As `load_tokenizer`; None, with a line that says so, for a folder that holds the model
    alone."""
    if Path(source.path).is_dir() and not any(
        any(Path(source.path).glob(names)) for names in _TOKENIZER_FILES
    ):
        print(f"{source.path} holds no tokenizer: what needs one is left out")
        return None
    return load_tokenizer(source)


def load_tokenizer(source: Source) -> Any:
    """The tokenizer saved with the model; for a decoder-only model without a padding token, padding
    uses the end token.

    Raises:
        CommandError: there is none.
    """
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source.path)
    except Exception as error:  # the tokenizers library raises bare ones
        raise CommandError(f"model: no usable tokenizer in {source.path}: {error}") from error
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


RESULTS_FILE = "results.json"
REPORT_FILE = "report.html"
MODEL_OR_RUN = ("config.json", "run.json")


def write_json(path: Path, values: Any) -> None:
    """Write JSON with `mpoe.models.weight_files.write_text`."""
    write_text(path, json.dumps(values, indent=2, default=str) + "\n")


def check_output(
    name: str,
    folder: str | Path,
    overwrite: bool,
    what: str,
    patterns: Iterable[str],
    others: Iterable[str] = (),
) -> Path:
    """Return ``folder``, the value of the argument ``name``; nothing is written yet.

    Raises:
        NotADirectoryError, PermissionError: it cannot be written or created.
        CommandError: it holds files of the patterns ``others`` (of models and runs), or without
            ``overwrite`` of ``patterns``, which are ``what``.
    """

    def holds(globs: Iterable[str]) -> bool:
        return any(any(path.glob(pattern)) for pattern in globs)

    path = check_folder(name, folder)
    if holds(others):
        raise CommandError(f"{name} {path} holds a model or a run; choose another folder")
    if holds(patterns) and not overwrite:
        raise CommandError(
            f"{name} {path} holds {what}; give --overwrite to replace it, or another folder"
        )
    return path


class Output(NamedTuple):
    """A folder that `check_model_output` has seen: what was given, and its configuration's file
    then: its number, which a later file may get again, and its time."""

    name: str
    folder: Path
    overwrite: bool
    config: tuple[int, int] | None


def check_model_output(name: str, folder: str | Path, overwrite: bool) -> Output:
    """What `model_folder` takes, for the ``folder`` that is the value of the argument ``name``.

    Raises:
        NotADirectoryError, PermissionError: it cannot be written or created.
        FolderInUseError: another process writes it.
        CommandError: it holds a file that no command wrote, or without ``overwrite`` a model.
    """
    path = check_folder(name, folder)
    check_free(path)
    finish(path)
    foreign = foreign_files(path)
    if foreign:
        raise CommandError(
            f"{name} {path} holds {foreign[0]}, which mpoe did not write; choose another folder"
        )
    if written_files(path) and not overwrite:
        raise CommandError(
            f"{name} {path} holds a model; give --overwrite to replace it, or another folder"
        )
    config = path / CONFIG
    state = config.stat() if config.is_file() else None
    return Output(name, path, overwrite, state and (state.st_ino, state.st_mtime_ns))


@contextlib.contextmanager
def model_folder(output: Output, *parts: Any) -> Iterator[Path]:
    """A staging folder into which the ``parts`` (model, tokenizer; None is left out) are saved; its
    files are in the folder of ``output``, in place of those of an earlier model, when the block
    ends without an error.

    Raises:
        CommandError: as `check_model_output`; another process has written the folder since.
    """
    folder = output.folder
    with hold(folder):
        if check_model_output(*output[:3]) != output:
            raise CommandError(
                f"{output.name} {folder} holds a model that another process wrote meanwhile"
            )
        clean_leftovers(folder)
        staging = staging_folder(folder)
        staging.mkdir()
        try:
            for part in parts:
                if part is not None:
                    part.save_pretrained(staging)
            yield staging
            publish(folder)
        except BaseException:
            delete(staging)
            raise


def check_writable_file(name: str, file: Path) -> Path:
    """Return ``file``; ValueError if its folder is missing or a folder has its name."""
    if file.is_dir():
        raise ValueError(f"{name} must be a file; {file} is a folder")
    if not file.parent.is_dir():
        raise ValueError(f"{name} must be in an existing folder; there is no folder {file.parent}")
    return file
