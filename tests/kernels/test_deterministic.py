"""What a choice depends on besides its arguments; less with `torch.use_deterministic_algorithms`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from mpoe_kernels.planner.device import DETERMINISTIC_THREADS

from mpoe.config import MPOEConfig
from mpoe.layers import MPOEFeedForward
from mpoe_kernels import choice, registry
from mpoe_kernels.contract import BlockDims, hardware_of, planned_threads
from mpoe_kernels.testing.assertions import torch_threads

from .backend_cases import candidate_backend, require

SIZES = ("grouped_mpo_linear", BlockDims(8, 8, 64, 12, 48, 64, 8, 8, 768, 3072), 8, 64, torch.float32)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def test_plans_are_for_a_fixed_number_of_threads() -> None:
    with torch_threads(2):
        assert planned_threads() == 2
        with deterministic():
            assert planned_threads() == DETERMINISTIC_THREADS
            fixed = hardware_of("cpu")
    with torch_threads(1), deterministic():
        assert hardware_of("cpu") is fixed


def test_the_choice_is_the_same_on_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    run = {op: lambda call: None for op in registry.CONTRACTIONS}
    # Cheaper on one thread, dearer on two, like a kernel that splits its work badly.
    few = candidate_backend("few", run, lambda _: float(planned_threads()))
    many = candidate_backend("many", run, lambda _: 1.5)
    monkeypatch.setattr(registry, "BACKENDS", {"few": few, "many": many})

    def chosen() -> list[str]:
        names = []
        for threads in (1, 2):
            with torch_threads(threads):
                names.append(choice.resolve_contraction(choice.Problem(*SIZES, "cpu")).backend)
        return names

    assert chosen() == ["few", "many"]
    with deterministic():
        assert chosen() == ["many", "many"]
    # A backend whose bits do not depend on the number of threads comes first.
    monkeypatch.setattr(registry, "BACKENDS", {"few": replace(few, same_on_any_threads=True), "many": many})
    with deterministic():
        assert chosen() == ["few", "few"]
    assert chosen() == ["few", "many"], "what is remembered is not mixed up"


def test_tf32_is_part_of_what_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    run = {op: lambda call: None for op in registry.CONTRACTIONS}
    allowed = False
    full = candidate_backend("full", run, lambda _: 1.0)
    rounding = candidate_backend("rounding", run, lambda _: 0.5 if allowed else 2.0)
    monkeypatch.setattr(registry, "BACKENDS", {"full": full, "rounding": rounding})
    monkeypatch.setattr(choice, "may_round_to_tf32", lambda dtype: allowed and dtype == torch.float32)

    def chosen(device: str) -> str:
        return choice.resolve_contraction(choice.Problem(*SIZES, device)).backend

    assert chosen("cuda:0") == chosen("cpu") == "full"
    allowed = True
    assert chosen("cuda:0") == "rounding"
    assert chosen("cpu") == "full", "TF32 is a GPU's"


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
