"""Fixture of the model tests."""

from __future__ import annotations

import pytest

from mpoe import MPOEConfig, convert_to_mpoe

from .small_models import dense_model


@pytest.fixture
def converted():
    """Factory: a converted model of a family, see `small_models.FAMILIES`."""

    def make(family, **config):
        return convert_to_mpoe(dense_model(family), MPOEConfig(**{"num_experts": 4, "shape": "separable", **config}))

    return make
