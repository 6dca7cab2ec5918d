"""Models by the name that the user typed (a stand-in, a folder or a hub name), and what commands
write: atomic files, whole models, and folders that are checked before any work."""

import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import transformers
from huggingface_hub import constants
from transformers.utils import logging

from mpoe.cli.errors import CommandError, close_matches
from mpoe.config.checks import refusing
from mpoe.data.mappings import read_mapping
from mpoe.data.stand_in_models import STAND_INS, stand_in_path
from mpoe.data.task import Task
from mpoe.models import load_mpoe
from mpoe.models.classes import STYLE_HEADS, classes_of
from mpoe.models.table import ENCODER, TABLE, TYPE_PREFIX, known_type
from mpoe.models.weight_files import check_links, check_weight_files
from mpoe.training.published import finish

ADAPTER_CONFIG = "adapter_config.json"
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

    def is_in(self, folder: Path) -> bool:
        """Whether its files are those of a folder."""
        return folder.exists() and Path(self.path).is_dir() and folder.samefile(self.path)


def find(name: str) -> Source:
    """Locate a model and read its family from its configuration, without loading weights.

    Raises:
        ValueError: as `read_configuration`, an unsupported family, an adapter beside the model.
    """
    values = read_configuration(name)
    if (Path(name) / ADAPTER_CONFIG).exists():
        raise CommandError(
            f"model must be one alone; {name} holds an adapter too ({ADAPTER_CONFIG}), which "
            "Transformers would load with it, or with the base that it names: merge it, or move it"
        )
    names = values.get("architectures")
    architecture = str(names[0]) if isinstance(names, list) and names else ""
    path = str(stand_in_path(name)) if name in STAND_INS else name
    return Source(path, known_type(name, values), architecture)


def find_to_copy(name: str) -> Source:
    """As `find`, of a model that goes into an output: no file of its folder may be a link that
    leads out of it (ValueError)."""
    source = find(name)
    check_links(Path(source.path))
    return source


def read_configuration(name: str, others: Iterable[str] = ()) -> dict:
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
        offline = not _hub_answers()
        return transformers.PreTrainedConfig.get_config_dict(name, local_files_only=offline)[0]
    except (OSError, ValueError) as error:
        known = [*STAND_INS, *others, *(path.name for path in Path().iterdir() if path.is_dir())]
        reason = str(error).strip().partition("\n")[0]
        raise CommandError(
            f"model: {name!r} is not a folder here, no built-in model ({', '.join(STAND_INS)}), "
            f"and the hub did not give it ({reason}){close_matches(name, known)}"
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
    options: dict = {}
    if labels is not None:
        kind = "single_label_classification" if labels else "regression"
        names = dict(enumerate(labels or ("value",)))
        options = {
            "num_labels": len(names),
            "problem_type": kind,
            "ignore_mismatched_sizes": True,
            "id2label": names,
            "label2id": {name: index for index, name in names.items()},
        }
    if source.is_mpoe and not options:
        return load_mpoe(source.path)
    if source.is_mpoe:  # so that they are registered with the Auto classes
        classes_of(source.model_type.removeprefix(TYPE_PREFIX))
    auto = STYLE_HEADS[source.style]
    if source.is_classifier or options:
        auto = "AutoModelForSequenceClassification"
    load = getattr(transformers, auto).from_pretrained
    # Transformers and its file readers have no common exception for damaged files
    with refusing(f"model: the weights of {source.path} cannot be loaded: "):
        model = load(source.path, dtype="float32", **options).eval()
    if Path(source.path).is_dir():
        check_weight_files(Path(source.path), model)
    return model


def tokenizer_if_any(source: Source) -> Any:
    """As `load_tokenizer`; None, with a line that says so, for a folder that holds the model
    alone."""
    folder = Path(source.path)
    if folder.is_dir() and not any(any(folder.glob(names)) for names in _TOKENIZER_FILES):
        print(f"{source.path} holds no tokenizer: what needs one is left out")
        return None
    return load_tokenizer(source)


def load_tokenizer(source: Source) -> Any:
    """The tokenizer saved with the model; for a decoder-only model without a padding token, padding
    uses the end token.

    Raises:
        ValueError: there is none.
    """
    # the tokenizers library raises bare exceptions
    with refusing(f"model: no usable tokenizer in {source.path}: "):
        tokenizer = transformers.AutoTokenizer.from_pretrained(source.path)
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
