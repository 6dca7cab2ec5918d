"""Files of a saved model besides its weights: rate ratios, a model card, and remote code to open it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from transformers import PreTrainedModel

from mpoe.models.card import replace_template, write_card
from mpoe.models.report import mpo_modules
from mpoe_kernels.version import __version__

# Files of a save that holds MPOE parameters only (see `mpoe.models.checkpoint`).
ONLY_FILE = "mpoe_only.safetensors"
BASE_FILE = "mpoe_base.json"
REMOTE_FILE = "modeling_mpoe.py"
_REMOTE_CODE = '''"""Opens this model in programs that do not import mpoe (with ``trust_remote_code=True``)."""

try:
    from mpoe.models import {names}
except ImportError as error:
    raise ImportError('this model needs the package mpoe: pip install "mpoe>={version}"') from error
'''

if TYPE_CHECKING:
    _Model = PreTrainedModel
else:
    _Model = object


class SavingMixin(_Model):
    """The saving part of an MPOE model."""

    auto_classes: dict[str, str]

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Nothing to do: `save_pretrained` writes the remote code itself, not a copy of a module of mpoe."""

    def write_rate_ratios(self) -> None:
        """Put every core's rate ratio into the config."""
        ratios = {name: list(cores.rate_ratios) for name, cores in mpo_modules(self)}
        self.config.mpoe = {**self.config.mpoe, "rate_ratios": ratios}

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """As in Transformers; the config also carries every core's rate ratio and an ``auto_map``, and a model card
        and the file that ``auto_map`` names are written.

        Raises:
            OSError: the folder cannot be written, or the disk is full.
        """
        self.write_rate_ratios()
        names = {"AutoConfig": type(self.config).__name__, **self.auto_classes}
        self.config.auto_map = {auto: f"{Path(REMOTE_FILE).stem}.{name}" for auto, name in names.items()}
        try:
            result = super().save_pretrained(save_directory, *args, **kwargs)
        except SafetensorError as error:
            raise OSError(f"weights could not be written to {save_directory}: {error}") from error
        for name in (ONLY_FILE, BASE_FILE):
            # Otherwise an earlier MPOE-only save in this folder would be loaded instead.
            (Path(save_directory) / name).unlink(missing_ok=True)
        if kwargs.get("is_main_process", True):
            code = _REMOTE_CODE.format(names=", ".join(sorted(set(names.values()))), version=__version__)
            (Path(save_directory) / REMOTE_FILE).write_text(code, encoding="utf-8")
            write_card(self, save_directory)
        return result

    def _upload_modified_files(self, working_dir: Any, *args: Any, **kwargs: Any) -> Any:
        """As in Transformers, with our card if the repository has none."""
        replace_template(self, working_dir)
        return super()._upload_modified_files(working_dir, *args, **kwargs)
