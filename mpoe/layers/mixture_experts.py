"""`MixtureExperts`: experts of an existing Transformers mixture in MPO form, behind that model's own router."""

from __future__ import annotations

import torch
from torch import Tensor

from mpoe.layers.experts import MPOExperts
from mpoe_kernels import route


class MixtureExperts(MPOExperts):
    """`MPOExperts` with the call interface of the experts in Transformers' mixtures."""

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        """The chosen experts of every token, weighted and summed.

        Args:
            hidden_states: ``[T, I]``, floating.
            top_k_index: chosen experts, int64 ``[T, K]``.
            top_k_weights: their weights ``[T, K]``.

        Returns:
            ``[T, I]`` in the dtype of ``hidden_states``.
        """
        x = hidden_states
        if x.dtype != self.dtype and not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.dtype)
        gates = top_k_weights if top_k_weights.dtype == torch.float64 else top_k_weights.float()
        return super().forward(x, route(top_k_index, self.num_experts), gates).to(hidden_states.dtype)
