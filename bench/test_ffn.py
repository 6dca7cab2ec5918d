"""Feed-forward layers and decode: MPO experts and their peers on the same tokens as the dense FFN."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import backends_of, parametrize, scale_of
from mpoe_bench.problem import FFNCase
from mpoe_bench.suites.ffn import ffn_comparison
from mpoe_bench.suites.scale import DENSE_PEERS


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    scale, backends = scale_of(metafunc.config), backends_of(metafunc.config)
    paper, light = scale.shape("paper_64"), scale.shape("light_64")
    base = FFNCase(scale.model, scale.hidden, scale.few_experts, scale.many_tokens)
    original = (("original: rebuild all", paper),)
    if metafunc.function is test_decode:
        one = replace(base, tokens=1, train=False)
        found = [
            ffn_comparison(replace(one, tokens=tokens), ("separable", "paper_16"), backends, peers=DENSE_PEERS[:1])
            for tokens in (1, 8)
        ]
    else:
        few = replace(base, experts=scale.many_experts, tokens=scale.few_tokens, train=False)
        shapes = ("separable", light, paper, "paper_full")
        found = [
            ffn_comparison(replace(base, dtype=dtype), shapes, backends, peers=DENSE_PEERS, core_peers=original)
            for dtype in (torch.float32, torch.bfloat16)
        ]
        found.append(ffn_comparison(few, ("separable", paper, "paper_16"), backends, peers=DENSE_PEERS))
    parametrize(metafunc, found)


def test_ffn(time_contender, comparison, contender, phase) -> None:
    time_contender(comparison, contender, phase)


def test_decode(time_contender, comparison, contender, phase) -> None:
    time_contender(comparison, contender, phase)
