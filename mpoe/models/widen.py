"""A wider dense model: the baseline of a mixture's size."""

from __future__ import annotations

import copy
from typing import Any

import torch

from mpoe.config import MPOEConfig
from mpoe.models.find import dense_networks, find_sites
from mpoe.models.sites import install_empty
from mpoe.models.table import DENSE

# fields of configurations that hold the hidden size of feed-forward networks
_FIELDS = ("d_ff", "n_inner", "intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim")


def hidden_size_as_mixture(dense: Any, config: MPOEConfig) -> int:
    """The hidden size at which ``dense`` has as many parameters as after its conversion with ``config``.

    Raises:
        ValueError: a model outside the table of dense families.
    """
    if dense.config.model_type not in DENSE:
        raise ValueError(f"a wider model must be of {', '.join(DENSE)}; got {dense.config.model_type}")
    with torch.device("meta"):
        mixture = type(dense)(dense.config)
    install_empty(mixture, find_sites(mixture, config), config)
    more = sum(p.numel() for p in mixture.parameters()) - sum(p.numel() for p in dense.parameters())
    sites = dense_networks(dense)
    rows = [site.weight(kind).shape[0 if kind != "down" else 1] for site in sites for kind in site.dense]
    per_unit = sum(rows) + sum(site.bias(kind) is not None for site in sites for kind in site.dense if kind != "down")
    return int(sites[0].weight("up").shape[1]) + round(more / per_unit)


@torch.no_grad()
def widened(dense: Any, hidden: int) -> Any:
    """A copy of a dense model with more hidden units that computes the same: the new units' output weights are 0.

    Their input weights are random, as large as the model's own.

    Args:
        dense: of a family in `mpoe.models.table` without experts.
        hidden: the new hidden size of its feed-forward networks.
    """
    config = copy.deepcopy(dense.config)
    for name in _FIELDS:
        if hasattr(config, name):
            setattr(config, name, hidden)
    model = type(dense)(config).to(dense.device, dense.dtype).train(dense.training)
    if hasattr(dense, "loss_type"):
        model.loss_type = dense.loss_type
    networks = list(zip(dense_networks(dense), dense_networks(model), strict=True))
    own = tuple(f"{prefix}." for old, _ in networks for prefix in old.prefixes.values())
    model.load_state_dict({n: v for n, v in dense.state_dict().items() if not n.startswith(own)}, strict=False)
    for old, new in networks:
        for kind, module in new.dense.items():
            if kind == "down":
                torch.nn.init.zeros_(module.weight)  # type: ignore[arg-type]
            else:
                torch.nn.init.normal_(module.weight, std=float(old.weight(kind).std()))  # type: ignore[arg-type]
            if getattr(module, "bias", None) is not None:
                torch.nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        for kind in new.dense:
            rows, columns = old.weight(kind).shape
            new.weight(kind)[:rows, :columns] = old.weight(kind)
            bias, kept = new.bias(kind), old.bias(kind)
            if bias is not None and kept is not None:
                bias[: len(kept)] = kept
    return model
