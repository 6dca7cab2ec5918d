"""BERT with mixtures of experts: the base model, sequence classification and masked language modelling."""

from __future__ import annotations

import functools
from typing import Any

from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertModel

from mpoe.models.base import IGNORED_AT_INFERENCE, MPOEModelMixin, checked_mpoe_dict
from mpoe.models.outputs import MPOEMaskedLMOutput, MPOEModelOutputWithPooling, MPOESequenceClassifierOutput


class MPOEBertConfig(BertConfig):
    """`BertConfig` with a field ``mpoe``: the dict of an `mpoe.MPOEConfig`."""

    model_type = "mpoe_bert"
    keys_to_ignore_at_inference = IGNORED_AT_INFERENCE

    def __init__(self, mpoe: Any = None, **kwargs: Any) -> None:
        self.mpoe = checked_mpoe_dict(mpoe)
        super().__init__(**kwargs)


class MPOEBertModel(MPOEModelMixin, BertModel):
    """`BertModel` whose feed-forward networks are mixtures of experts."""

    config_class = MPOEBertConfig
    config: MPOEBertConfig
    mpoe_family = "bert"
    mpoe_output = MPOEModelOutputWithPooling

    def __init__(self, config: MPOEBertConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config, add_pooling_layer)
        self.install_experts()

    @functools.wraps(BertModel.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        return self._routed_forward(super().forward, args, kwargs)


class MPOEBertForSequenceClassification(MPOEModelMixin, BertForSequenceClassification):
    """`BertForSequenceClassification` whose feed-forward networks are mixtures of experts."""

    config_class = MPOEBertConfig
    config: MPOEBertConfig
    mpoe_family = "bert"
    mpoe_output = MPOESequenceClassifierOutput

    def __init__(self, config: MPOEBertConfig) -> None:
        super().__init__(config)
        self.install_experts()

    @functools.wraps(BertForSequenceClassification.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        return self._routed_forward(super().forward, args, kwargs)


class MPOEBertForMaskedLM(MPOEModelMixin, BertForMaskedLM):
    """`BertForMaskedLM` whose feed-forward networks are mixtures of experts."""

    config_class = MPOEBertConfig
    config: MPOEBertConfig
    mpoe_family = "bert"
    mpoe_output = MPOEMaskedLMOutput

    def __init__(self, config: MPOEBertConfig) -> None:
        super().__init__(config)
        self.install_experts()

    @functools.wraps(BertForMaskedLM.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        return self._routed_forward(super().forward, args, kwargs)
