"""`FromInitialValues`: modules that initialise, and reset, their parameters by name."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def check_placement(device: object, dtype: object) -> None:
    """Refuse a device that this machine does not have, and a dtype that is not floating-point; None means the default.

    Raises:
        TypeError: neither a device nor its name; not a `torch.dtype`.
        ValueError: no such device here, or a dtype of integers or complex numbers.
    """
    if device is not None and not isinstance(device, (str, torch.device)):
        raise TypeError(f"device must be a torch.device or its name; got {type(device).__name__} {device!r}")
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype; got {type(dtype).__name__} {dtype!r}")
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype must be of floating-point numbers; got {dtype}")
    if device is not None:
        try:
            torch.empty(0, device=device)
        except Exception as error:  # torch raises several kinds for unknown devices and missing drivers
            raise ValueError(f"device must be one that this machine has; got {str(device)!r}") from error


class FromInitialValues(nn.Module):
    """A module that initialises its parameters and buffers from `initial_values`; `from_pretrained` uses them for
    missing ones."""

    def named_tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers by name."""
        return {**dict(self.named_parameters()), **dict(self.named_buffers())}

    def initial_values(self) -> dict[str, Tensor]:
        """New values by name."""
        raise NotImplementedError

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the parameters to new initial values; does nothing on the meta device."""
        tensors = self.named_tensors()
        if any(tensor.is_meta for tensor in tensors.values()):
            return
        for name, value in self.initial_values().items():
            tensors[name].copy_(value)
