"""With `torch.use_deterministic_algorithms` a run has the same bits on any number of threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mpoe.config import MPOEConfig
from mpoe.layers import MPOEFeedForward
from tests.assertions import torch_threads

from .backend_cases import require


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def test_training_goes_on_with_another_number_of_threads() -> None:
    """Native kernels and a fixed plan: a run saved on one thread and resumed on two ends as it would have on one."""
    require("native")
    torch.manual_seed(0)
    x = torch.randn(8, 64)
    config = MPOEConfig(num_experts=8, shape="paper")
    start = MPOEFeedForward(64, 256, config).state_dict()

    def steps(state: dict[str, torch.Tensor], count: int, threads: int) -> dict[str, torch.Tensor]:
        layer = MPOEFeedForward(64, 256, config)
        layer.load_state_dict(state)
        optimizer = torch.optim.SGD(layer.parameters(), 0.1)
        with torch_threads(threads):
            for _ in range(count):
                optimizer.zero_grad()
                layer(x).square().mean().backward()
                optimizer.step()
        return {name: value.clone() for name, value in layer.state_dict().items()}

    with deterministic():
        whole = steps(start, 3, 1)
        resumed = steps(steps(start, 2, 1), 1, 2)
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    assert any(not torch.equal(value, start[name]) for name, value in whole.items())
