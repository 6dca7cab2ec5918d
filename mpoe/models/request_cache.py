"""The evidence of requests in Transformers' caches, as one layer more, behind the model's own.

So whatever selects, repeats, reorders, crops or resets the rows of a cache does the same to the
evidence. It holds the sums up to every token, not the last ones alone, since a crop goes back to
those.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from mpoe.layers.request import Evidence


class EvidenceLayer(DynamicLayer):
    """Keys are sums of logits, float32 ``[B, L, S, E]``, values the tokens counted, ``[B, 1, S,
    1]``."""


def cache_in(values: Mapping[str, Any]) -> Any:
    """The cache among a model's arguments or results, under the name that its Transformers has."""
    cache = values.get("cache")
    return values.get("past_key_values") if cache is None else cache


def _layer_of(cache: Cache) -> EvidenceLayer | None:
    last = cache.layers[-1] if cache.layers else None
    return last if isinstance(last, EvidenceLayer) else None


def evidence_before(cache: Any) -> Evidence:
    """What a call that continues ``cache`` starts with; ``None``: nothing. Tokens of a cache that
    no router saw, as a dense model's, do not count.

    Raises:
        TypeError: another kind of cache, which has no layers.
    """
    if cache is None:
        return Evidence()
    if not isinstance(cache, Cache):
        raise TypeError(
            "past_key_values must be a Cache of Transformers for routers with a request_weight; "
            f"got {type(cache).__name__}"
        )
    layer = _layer_of(cache)
    known = 0 if layer is None else min(layer.get_seq_length(), int(cache.get_seq_length()))
    if layer is None or layer.keys is None or layer.values is None or not known:
        return Evidence()
    return Evidence(layer.keys[:, :, known - 1], layer.values[:, 0, known - 1])


def keep_evidence(evidence: Evidence, cache: Any) -> None:
    """Put a call's sums into the cache that now has the call's tokens; ``None``: nowhere."""
    if cache is None or evidence.count is None:
        return
    layer = _layer_of(cache)
    if layer is None:
        layer = EvidenceLayer()
        # by which models tell caches of one size, whose rest they mask, from growing ones
        layer.is_compileable = cache.is_compileable
        cache.layers.append(layer)
    sums = torch.stack(evidence.sums, 1)
    count = evidence.count[:, None, :, None]
    unseen = int(cache.get_seq_length()) - sums.shape[2] - layer.get_seq_length()
    if unseen < 0:
        layer.crop(unseen)
    elif unseen:
        padding = (0, 0, unseen, 0)
        sums, count = F.pad(sums, padding), F.pad(count, padding)
    layer.update(sums, count)
