"""Finds and loads models by the name that the user typed: a stand-in, a folder or a hub name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpoe.cli.errors import CommandError, close_matches
from mpoe.models.table import CAUSAL, ENCODER, MODEL_TYPES, SEQ2SEQ, TABLE, TYPE_PREFIX

STAND_INS = ("t5", "gpt2")


@dataclass(frozen=True)
class Source:
    """A model that was found but not loaded yet.

    ``path``: argument for ``from_pretrained``; ``model_type``: from its configuration; ``style``: seq2seq, causal or
    encoder.
    """

    path: str
    model_type: str

    @property
    def style(self) -> str:
        return TABLE[self.model_type.removeprefix(TYPE_PREFIX)].style

    @property
    def is_mpoe(self) -> bool:
        return self.model_type.startswith(TYPE_PREFIX)


def find(name: str) -> Source:
    """Locate a model and read its family from its configuration, without loading weights.

    Raises:
        CommandError: nothing of that name, a folder without a model, or an unsupported family.
    """
    if name in STAND_INS:
        from mpoe.data.embedded import stand_in_path

        return Source(str(stand_in_path(name)), name)
    folder = Path(name)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise CommandError(f"model: {folder} holds no config.json, so it is not a saved model")
    if folder.exists() and not folder.is_dir():
        raise CommandError(f"model must be a folder, a hub name, t5 or gpt2; {folder} is a file")
    model_type = _model_type(name, is_folder=folder.is_dir())
    if model_type not in (*TABLE, *MODEL_TYPES):
        raise CommandError(
            f"model {name!r} is of the family {model_type!r}, which mpoe does not know; it knows {', '.join(TABLE)} "
            "(and models converted from them)"
        )
    return Source(name, model_type)


def _model_type(name: str, is_folder: bool) -> str:
    from transformers import PreTrainedConfig

    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if not is_folder and looks_local:
        raise CommandError(f"model: no such folder: {name}")
    try:
        values, _ = PreTrainedConfig.get_config_dict(name)
    except (OSError, ValueError) as error:
        if is_folder:
            raise CommandError(f"model: {Path(name) / 'config.json'} is not readable: {error}") from error
        hint = close_matches(name, STAND_INS)
        reason = str(error).strip().partition("\n")[0]
        known = f"no built-in model ({', '.join(STAND_INS)})"
        raise CommandError(
            f"model: {name!r} is not a folder here, {known}, and the hub did not give it ({reason}){hint}"
        ) from error
    return str(values.get("model_type", "unknown"))


def quiet_transformers() -> None:
    """No progress bars for reading and writing weight files (the Trainer's own bars stay)."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def load_model(source: Source) -> Any:
    """The model in float32, in eval mode: dense models by their Auto class, converted ones by `load_mpoe`.

    Raises:
        ValueError: weights that are missing, damaged, or do not match the configuration.
    """
    quiet_transformers()
    if source.is_mpoe:
        from mpoe.models import load_mpoe

        return load_mpoe(source.path).eval()
    import transformers

    from mpoe.models.weight_files import check_weight_files

    if Path(source.path).is_dir():
        check_weight_files(Path(source.path))
    auto = {SEQ2SEQ: "AutoModelForSeq2SeqLM", CAUSAL: "AutoModelForCausalLM", ENCODER: "AutoModel"}[source.style]
    try:
        model = getattr(transformers, auto).from_pretrained(source.path, dtype="float32").eval()
    except Exception as error:  # Transformers and its file readers have no common exception for damaged files
        raise CommandError(f"model: the weights of {source.path} cannot be loaded: {error}") from error
    if Path(source.path).is_dir():
        check_weight_files(Path(source.path), model)
    return model


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
