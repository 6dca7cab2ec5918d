"""Feed-forward networks that keep their projections: experts are inserted between them, or stand beside them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from mpoe.config import MPOEConfig
from mpoe.layers.kept import KeptFeedForward
from mpoe.models.sites import FFNSite


@dataclass(frozen=True)
class KeptSite(FFNSite):
    """A dense feed-forward network, which becomes a `KeptFeedForward` around its own projections."""

    shape: ClassVar[str]

    @classmethod
    def of(cls, site: FFNSite) -> KeptSite:
        """The same network, to be converted in this way."""
        return cls(**{f.name: getattr(site, f.name) for f in dataclasses.fields(FFNSite)})

    @property
    def replaced(self) -> list[nn.Module]:
        return []

    @property
    def place(self) -> str:
        """Name of the module that is replaced."""
        return self.name

    @property
    def inside(self) -> dict[str, str]:
        """Attribute name of each projection inside the replaced module."""
        start = f"{self.place}."
        return {kind: prefix.removeprefix(start) for kind, prefix in self.prefixes.items() if prefix.startswith(start)}

    @property
    def obstacle(self) -> str | None:
        """What the conversion lacks, if it is impossible."""
        raise NotImplementedError

    def check(self, config: MPOEConfig) -> None:
        """Refuse projections of another structure or with mismatched sizes."""
        if self.obstacle is not None:
            raise ValueError(f"{self.name}: shape {self.shape!r} needs {self.obstacle} (shape='separable' supports it)")
        rows, columns = self.weight("up").shape
        for kind, (i, f) in {"up": (rows, columns), "gate_proj": (rows, columns), "down": (columns, rows)}.items():
            if kind in self.dense and tuple(self.weight(kind).shape) != (i, f):
                raise ValueError(
                    f"{self.prefixes[kind]} must be for a weight [{i}, {f}]; got {list(self.weight(kind).shape)}"
                )

    def _layer(self, cls: type[Any], config: MPOEConfig, **options: Any) -> Any:
        """A ``cls`` of these sizes, device and dtype, whose experts the caller fills or initialises."""
        up = self.weight("up")
        options |= {key: self.options[key] for key in ("activation", "output_dropout")}
        options |= {"names": self.inside, "columns": self.columns, "stream": self.stream}
        made = cls(*up.shape, config.for_experts(self.name), device="meta", dtype=up.dtype, **options)
        return made.to_empty(device=up.device)


def kept_modules(model: nn.Module) -> dict[str, KeptFeedForward]:
    """Every network of a model that kept its projections, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, KeptFeedForward)}
