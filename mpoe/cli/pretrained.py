"""Finds and loads models by the name that the user typed: a stand-in, a folder or a hub name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpoe.cli.errors import CommandError, close_matches
from mpoe.data.mappings import read_mapping
from mpoe.models.table import CAUSAL, ENCODER, SEQ2SEQ, TABLE, TYPE_PREFIX, known_type

if TYPE_CHECKING:
    from mpoe.data.task import Task

_TOKENIZER_FILES = ("tokenizer*", "*.model", "vocab*")
STAND_INS = ("t5", "gpt2")


@dataclass(frozen=True)
class Source:
    """A model that was found but not loaded yet.

    ``path``: argument for ``from_pretrained``; ``model_type`` and ``architecture`` (the class, if named): from its
    configuration; ``style``: seq2seq, causal or encoder.
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
        ValueError: nothing of that name, a folder without a model, a broken configuration, or an unsupported family.
    """
    if name in STAND_INS:
        from mpoe.data.embedded import stand_in_path

        return Source(str(stand_in_path(name)), name)
    folder = Path(name)
    if folder.exists() and not folder.is_dir():
        raise CommandError(f"model must be a folder, a hub name, t5 or gpt2; {folder} is a file")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise CommandError(f"model: {folder} holds no config.json, so it is not a saved model")
    values = read_mapping(folder / "config.json", "configuration") if folder.is_dir() else _values_on_the_hub(name)
    names = values.get("architectures")
    return Source(name, known_type(name, values), str(names[0]) if isinstance(names, list) and names else "")


def _values_on_the_hub(name: str) -> dict[str, Any]:
    from transformers import PreTrainedConfig

    if name.startswith((".", "/", "~")) or name.count("/") > 1 or _beside(name):
        raise CommandError(f"model: no such folder: {name}{close_matches(Path(name).name, _beside(name))}")
    try:
        values, _ = PreTrainedConfig.get_config_dict(name, local_files_only=not _hub_answers())
        return dict(values)
    except (OSError, ValueError) as error:
        hint = close_matches(name, [*STAND_INS, *(path.name for path in Path().iterdir() if path.is_dir())])
        reason = str(error).strip().partition("\n")[0]
        raise CommandError(
            f"model: {name!r} is not a folder here, no built-in model ({', '.join(STAND_INS)}), and the hub did not "
            f"give it ({reason}){hint}"
        ) from error


def _beside(name: str) -> list[str]:
    """The folders beside a path such as runs/first, if runs is here; a hub's owner is not."""
    parent = Path(name).parent
    return [path.name for path in parent.iterdir()] if parent != Path() and parent.is_dir() else []


def _hub_answers() -> bool:
    """Whether the hub can be reached; its library would try for 30 s. Not asked offline or through a proxy."""
    import socket
    from urllib.parse import urlsplit
    from urllib.request import getproxies

    from huggingface_hub import constants

    host = urlsplit(constants.ENDPOINT)
    if constants.HF_HUB_OFFLINE or getproxies():
        return True
    try:
        socket.create_connection((str(host.hostname), host.port or 443), timeout=3).close()
    except OSError:
        return False
    return True


def quiet_transformers() -> None:
    """No progress bars for reading and writing weight files (the Trainer's own bars stay)."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def labels_for(source: Source, task: Task) -> tuple[str, ...]:
    """The labels that an encoder's head tells apart, in its order: the model's own if they are the task's, otherwise
    the task's; none for numbers."""
    from transformers import AutoConfig

    if source.is_classifier:
        own = tuple(AutoConfig.from_pretrained(source.path).id2label.values())
        if set(own) == set(task.labels):
            return own
    return task.labels


def load_model(source: Source, labels: Sequence[str] | None = None) -> Any:
    """The model in float32, in eval mode: dense models by their Auto class, converted ones by `load_mpoe`.

    ``labels``: an encoder gets a head for them (none: for a number), unless it has that head already.

    Raises:
        ValueError: weights that are missing, damaged, or do not match the configuration.
    """
    quiet_transformers()
    options: dict[str, Any] = {}
    if labels is not None:
        kind = "single_label_classification" if labels else "regression"
        names = dict(enumerate(labels or ("value",)))
        options = {"num_labels": len(names), "problem_type": kind, "ignore_mismatched_sizes": True}
        options |= {"id2label": names, "label2id": {name: index for index, name in names.items()}}
    if source.is_mpoe and options:
        from mpoe.models.classes import classes_of

        classes_of(source.model_type.removeprefix(TYPE_PREFIX))  # which registers them with the Auto classes
    elif source.is_mpoe:
        from mpoe.models import load_mpoe

        return load_mpoe(source.path).eval()
    import transformers

    from mpoe.models.weight_files import check_weight_files

    if Path(source.path).is_dir():
        check_weight_files(Path(source.path))
    auto = {SEQ2SEQ: "AutoModelForSeq2SeqLM", CAUSAL: "AutoModelForCausalLM", ENCODER: "AutoModel"}[source.style]
    if source.is_classifier or options:
        auto = "AutoModelForSequenceClassification"
    try:
        model = getattr(transformers, auto).from_pretrained(source.path, dtype="float32", **options).eval()
    except Exception as error:  # Transformers and its file readers have no common exception for damaged files
        raise CommandError(f"model: the weights of {source.path} cannot be loaded: {error}") from error
    if Path(source.path).is_dir():
        check_weight_files(Path(source.path), model)
    return model


def tokenizer_if_any(source: Source) -> Any:
    """As `load_tokenizer`; None, with a line that says so, for a folder that holds the model alone."""
    if Path(source.path).is_dir() and not any(any(Path(source.path).glob(names)) for names in _TOKENIZER_FILES):
        print(f"{source.path} holds no tokenizer, so none is saved with the result")
        return None
    return load_tokenizer(source)


def load_tokenizer(source: Source) -> Any:
    """The tokenizer saved with the model; for a decoder-only model without a padding token, padding uses the end token.

    Raises:
        CommandError: there is none.
    """
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source.path)
    except Exception as error:  # the tokenizers library raises bare ones
        raise CommandError(f"model: no usable tokenizer in {source.path}: {error}") from error
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
