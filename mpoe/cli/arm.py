"""Arms of a comparison: a mixture, or one of the baselines it is judged by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mpoe.cli.parsing import option

DENSE, WIDER, SWITCH = "dense", "wider", "switch"
BASELINES = {DENSE: "dense", WIDER: "dense, wider", SWITCH: "dense experts"}


@dataclass
class ArmOptions:
    """What the model becomes instead of a mixture of MPO experts."""

    _argument_group_name = "baseline"

    baseline: str | None = option(
        None,
        "train what the mixture is compared with: dense (the model as it is), wider (dense, as large as the mixture), "
        "switch (dense experts)",
        choices=list(BASELINES),
    )

    @property
    def is_dense(self) -> bool:
        """Whether the model stays without experts."""
        return self.baseline in (DENSE, WIDER)


def widened_for(model: Any, config: Any) -> Any:
    """``model``, wider: as large as its mixture ``config``."""
    from mpoe.models.widen import hidden_size_as_mixture, widened

    hidden = hidden_size_as_mixture(model, config)
    wide = widened(model, hidden)
    print(f"baseline wider: hidden size {hidden}, {sum(p.numel() for p in wide.parameters()):,} parameters")
    return wide
