"""Which of a kernel's tiles a launch takes: the fastest, or without timing the first."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import pytest
import torch
import triton

from mpoe_kernels.hidden_experts import triton as hidden
from mpoe_kernels.neurons import triton as neurons
from mpoe_kernels.triton import start
from tests.expert_problems import HiddenProblem

TILES = (start.Tile(16, 16, 16, 4), start.Tile(32, 16, 16, 4))


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Where the interpreter may time, every run takes less time than the one before; the numbers of runs."""
    runs: list[int] = []

    def bench(call: Callable[[], object], quantiles: object) -> list[float]:
        call()
        runs.append(len(runs))
        return [1.0 / len(runs)] * 3

    monkeypatch.delenv(start.SETTING, raising=False)
    monkeypatch.setattr(start, "in_interpreter", lambda: False)
    monkeypatch.setattr(triton, "autotune", partial(triton.autotune, do_bench=bench))
    monkeypatch.setattr(hidden, "TILES", dict.fromkeys(hidden.TILES, dict.fromkeys((2, 4), (*TILES, TILES[0]))))
    start._tuner.cache_clear()
    return runs


def forward(tokens: int = 40) -> torch.Tensor:
    problem = HiddenProblem(tokens=tokens, experts=1, groups=1, dtype=torch.float32)
    return hidden.forward(problem.call())


def test_the_fastest_tile_is_kept(timed: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    tuners: list[Any] = []
    made = start._tuner.__wrapped__
    monkeypatch.setattr(start, "_tuner", lru_cache(lambda *key: tuners.append(made(*key)) or tuners[-1]))
    first = forward()
    assert timed == [0, 1]
    assert torch.equal(forward(), first)
    assert timed == [0, 1]
    (tuner,) = tuners
    assert tuner.best_config.kwargs["BM"] == 32


def test_products_and_sums_are_fused_on_the_timed_way_too(timed: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    fused: list[bool] = []
    run = triton.runtime.Autotuner.run

    def record(tuner: Any, *arguments: Any, **options: Any) -> Any:
        fused.append(options["enable_fp_fusion"])
        return run(tuner, *arguments, **options)

    monkeypatch.setattr(triton.runtime.Autotuner, "run", record)
    forward()
    assert fused
    assert all(fused)


@pytest.mark.parametrize("why", ["deterministic", "setting", "ranks", "captured"])
def test_nothing_is_timed_where_results_must_not_depend_on_a_clock(
    why: str, timed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    if why == "deterministic":
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    elif why == "setting":
        monkeypatch.setenv(start.SETTING, "0")
    elif why == "ranks":
        monkeypatch.setattr(start, "several_ranks", lambda: True)
    else:
        monkeypatch.setattr(start, "is_traced", lambda: True)
    forward()
    assert timed == []


def test_no_tile_of_a_kernel_changes_the_number_of_parts() -> None:
    """Partial results are allocated before the tile is known."""
    for table in (hidden.TILES, neurons.TILES):
        for kernel, by_size in table.items():
            for tiles in by_size.values():
                assert len({tile.columns for tile in tiles}) == 1 or kernel == "weights"
