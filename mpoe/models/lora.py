"""LoRA on MPO cores through PEFT, whose own layers support only matrices and 3-D parameters.

Every core, read as the matrix ``[d i, j d']`` (one per expert for auxiliary cores), gets a low-rank
addition ``scale * B A`` (Hu et al. 2021, arXiv 2106.09685). The central core's addition is shared
by the experts, like the core itself. Needs the extra ``peft``.
"""

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from mpoe.config.checks import check_type
from mpoe.layers.cores import MPOCores

try:
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import check_adapters_to_merge
except ImportError as error:
    raise ImportError('LoRA on MPO cores needs PEFT: pip install "mpoe[peft]"') from error

# Fields of LoraConfig that select something other than an added low-rank product.
_UNSUPPORTED = ("use_dora", "lora_bias", "lora_dropout")


def lora_on_cores(config: LoraConfig) -> LoraConfig:
    """Let ``config`` adapt the MPO weights that its ``target_modules`` name: ``up``, ``down``,
    ``gate_proj`` of the experts, ``cores`` of MPO attention projections.

    Every `LoraConfig` that PEFT applies to MPO weights goes through here, so that a plain
    ``PeftModel.from_pretrained(model, folder)`` loads an adapter. Calling it beforehand only checks
    the options earlier.

    Returns:
        ``config`` itself.

    Raises:
        TypeError: a config of a method other than LoRA.
        ValueError: an option that has no meaning on cores (DoRA, dropout, bias, another
            initialisation).
    """
    check_type("config", config, LoraConfig, "a peft.LoraConfig")
    given = [name for name in _UNSUPPORTED if getattr(config, name)]
    if given:
        raise ValueError(f"LoRA on MPO cores has no {', '.join(given)}; leave it at its default")
    if not isinstance(config.init_lora_weights, bool):
        raise ValueError(
            "init_lora_weights must be True or False on MPO cores; got "
            f"{config.init_lora_weights!r}"
        )
    config._register_custom_module({MPOCores: LoraCores})
    return config


class LoraCores(nn.Module, LoraLayer):
    """`MPOCores` with low-rank additions to its cores; replaces the `MPOCores` in the experts.

    The rank of a core's addition is ``r``, or less if the core's own rank is smaller.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: LoraConfig,
        r: int = 0,
        lora_alpha: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        LoraLayer.__init__(self, base_layer, **kwargs)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha, config=config)

    def __getattr__(self, name: str) -> Any:
        """Everything else (bias, shape, ...) is that of the wrapped cores."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features

    def update_layer(
        self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any
    ) -> None:
        """Add an adapter with random A and zero B, so the output does not change yet."""
        if r <= 0:
            raise ValueError(f"r must be at least 1; got {r}")
        base: Any = self.get_base_layer()
        down = nn.ParameterDict()
        up = nn.ParameterDict()
        for name in base.core_names():
            core = base.get_parameter(name)
            *experts, d, i, j, d_next = core.shape  # as a matrix [d i, j d']
            rows = d * i
            columns = j * d_next
            rank = min(r, rows, columns)
            a = core.new_empty(*experts, rank, columns)
            bound = 1 / math.sqrt(columns)
            key = name.replace(".", "_")
            down[key] = nn.Parameter(a.uniform_(-bound, bound))
            up[key] = nn.Parameter(core.new_zeros(*experts, rows, rank))
            if config.init_lora_weights is False:
                nn.init.normal_(up[key], std=bound)
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = lora_alpha
        self.scaling[adapter_name] = lora_alpha / (math.sqrt(r) if config.use_rslora else r)
        self.use_rslora[adapter_name] = config.use_rslora
        self.use_dora[adapter_name] = False
        self.lora_bias[adapter_name] = False
        self.lora_A[adapter_name] = down
        self.lora_B[adapter_name] = up
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def delta(self, adapter_name: str, name: str) -> Tensor:
        """The addition of an adapter to the core called ``name``, in the core's shape."""
        key = name.replace(".", "_")
        core = self.get_base_layer().get_parameter(name)
        b, a = (
            cast(nn.ParameterDict, side[adapter_name])[key] for side in (self.lora_B, self.lora_A)
        )
        return (self.scaling[adapter_name] * (b @ a)).view(core.shape).to(core.dtype)

    # ---------------------------------------------------- what experts read

    def cores(self) -> list[Tensor]:
        """As `MPOCores.cores`, with the additions of the active adapters."""
        base: Any = self.get_base_layer()
        if self.disable_adapters and self.merged:
            self.unmerge()
        cores = base.cores()
        if self.disable_adapters or self.merged:
            return cores
        with torch.autocast(
            cores[0].device.type, enabled=False
        ):  # as in fold: rounded once, in the product
            for adapter in (a for a in self.active_adapters if a in self.lora_A):
                cores = [
                    core + self.delta(adapter, name)
                    for core, name in zip(cores, base.core_names(), strict=True)
                ]
        return cores

    blocks, dense_weights = MPOCores.blocks, MPOCores.dense_weights  # of these cores

    # -------------------------------------------------------------- merging

    @torch.no_grad()
    def _add(self, adapter_name: str, sign: float) -> None:
        base: Any = self.get_base_layer()
        for name in base.core_names():
            base.get_parameter(name).add_(self.delta(adapter_name, name), alpha=sign)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters' products to the cores.

        Raises:
            ValueError: with ``safe_merge``, an addition that is not finite; the cores are then
                unchanged.
        """
        names = [
            name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A
        ]
        if safe_merge:
            for adapter in names:
                for core in self.core_names():
                    if not bool(torch.isfinite(self.delta(adapter, core)).all()):
                        raise ValueError(
                            f"adapter {adapter} must be finite to be merged; its addition to "
                            f"{core} is not"
                        )
        for adapter in names:
            self._add(adapter, 1.0)
            self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        """Subtract the merged additions again, up to rounding."""
        while self.merged_adapters:
            self._add(self.merged_adapters.pop(), -1.0)
