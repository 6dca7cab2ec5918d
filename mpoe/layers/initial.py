"""`FromInitialValues`: parameters that start, and start again, at values a module draws by name."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FromInitialValues(nn.Module):
    """A module whose `initial_values` say where its parameters begin; `from_pretrained` uses them for missing ones."""

    def initial_values(self) -> dict[str, Tensor]:
        """Fresh values by parameter name."""
        raise NotImplementedError

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the parameters to fresh values; on the meta device there is nothing to set."""
        if any(parameter.is_meta for parameter in self.parameters()):
            return
        for name, value in self.initial_values().items():
            self.get_parameter(name).copy_(value)
