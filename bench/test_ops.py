"""The ops, each against plain torch computing the dense result."""

from __future__ import annotations

import pytest
import torch
from conftest import backends_of, parametrize, scale_of
from mpoe_bench.suites.ops import embedding_comparison, linear_comparison, routing_comparison


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    scale, backends = scale_of(metafunc.config), backends_of(metafunc.config)
    sizes, tokens = (scale.model, scale.hidden), scale.many_tokens // 4
    shapes = ("separable", scale.shape("light_64"), scale.shape("paper_64"), "paper_full")
    experts = scale.few_experts
    if metafunc.function is test_linear:
        found = [
            linear_comparison(shapes, sizes, count, tokens, dtype, "cpu", backends)
            for count in (1, experts)
            for dtype in (torch.float32, torch.bfloat16)
        ]
    elif metafunc.function is test_routing:
        found = [routing_comparison(scale.model, experts, scale.many_tokens, top_k, "cpu") for top_k in (1, 2)]
    else:
        found = [embedding_comparison(scale.vocabulary, scale.model, (64, 16), tokens, "cpu", backends)]
    parametrize(metafunc, found)


def test_linear(time_contender, comparison, contender, phase) -> None:
    time_contender(comparison, contender, phase)


def test_routing(time_contender, comparison, contender, phase) -> None:
    time_contender(comparison, contender, phase)


def test_embedding(time_contender, comparison, contender, phase) -> None:
    time_contender(comparison, contender, phase)
