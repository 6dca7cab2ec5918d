"""What Transformers and other tools do with a model: save and open it, quantise it, choose how its experts run."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mpoe.config.checks import check_choice
from mpoe.layers.dense import IMPLEMENTATIONS
from mpoe.models.card import replace_template, write_card
from mpoe.models.report import mpo_modules, parameter_kind
from mpoe.models.weight_files import BASE_FILE, ONLY_FILE
from mpoe_kernels.version import __version__

REMOTE_FILE = "modeling_mpoe.py"
_REMOTE_CODE = '''"""Opens this model in programs that do not import mpoe (with ``trust_remote_code=True``)."""

try:
    from mpoe.models import {names}
except ImportError as error:
    raise ImportError('this model needs the package mpoe: pip install "mpoe>={version}"') from error
'''


def quantisable_parameters(model: nn.Module) -> dict[str, int]:
    """How much of a model is quantised by tools that replace linear layers, such as bitsandbytes and torchao.

    Args:
        model: an MPOE model that is not quantised yet.

    Returns:
        Numbers of parameters: ``linear`` in `nn.Linear` and `Conv1D`; and, for the others, ``central``,
        ``auxiliary``, ``expert``, ``router`` and ``rest`` (see `mpoe.models.parameter_kind`). Tied ones count once.
    """
    linear = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, (nn.Linear, Conv1D))
        for parameter in module.parameters(recurse=False)
    }
    kinds = parameter_kind(model)
    numbers = dict.fromkeys(("linear", "central", "auxiliary", "expert", "router", "rest"), 0)
    for name, parameter in model.named_parameters():
        numbers["linear" if id(parameter) in linear else kinds[name]] += parameter.numel()
    return numbers


def warn_of_quantiser(model: Any, method: str) -> None:
    """Warn how much of ``model`` the quantiser ``method`` has left unquantised."""
    config = type(model.config).from_dict(
        {name: value for name, value in model.config.to_dict().items() if name != "quantization_config"}
    )
    with torch.device("meta"):
        numbers = quantisable_parameters(type(model)(config))
    total = max(sum(numbers.values()), 1)
    left = {kind: number for kind, number in numbers.items() if kind not in ("linear", "rest") and number}
    if left:
        parts = ", ".join(f"{kind} {number / total:.0%}" for kind, number in left.items())
        warnings.warn(
            f"{method} quantises linear layers, {numbers['linear'] / total:.0%} of the parameters of "
            f"{type(model).__name__} at most; as they were: {parts} (after `mpoe export` other tools quantise the "
            "experts too)",
            stacklevel=4,
        )


# For the type checker the mixin is a model; at run time it is a plain class before the dense class in the bases.
if TYPE_CHECKING:
    _Model = PreTrainedModel
else:
    _Model = object


class OthersMixin(_Model):
    """The part of an MPOE model that other tools use.

    Attributes:
        has_stock_experts: whether the dense class is a mixture with its own experts.
        auto_classes: Auto class -> name of the converted class.
    """

    has_stock_experts: ClassVar[bool] = False
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

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in Transformers; warns if a quantiser leaves MPO weights unquantised."""
        result = super().from_pretrained(*args, **kwargs)
        model = result[0] if isinstance(result, tuple) else result
        quantiser = getattr(model, "hf_quantizer", None)
        if quantiser is not None:
            method = quantiser.quantization_config.quant_method
            warn_of_quantiser(model, str(getattr(method, "value", method)))
        return result

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # Transformers looks for it in the file that defines the class

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """As in Transformers, for the implementations of our dense experts.

        Raises: ValueError: another implementation.
        """
        if requested_experts is None:
            return "eager"  # while the dense model is built
        check_choice("experts_implementation", requested_experts, IMPLEMENTATIONS)
        return str(super().get_correct_experts_implementation(requested_experts))
