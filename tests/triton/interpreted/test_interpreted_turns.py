"""Programs that add to rows of tokens in turn, two at once and in the wrong order: they do wait for one another."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from triton.runtime import interpreter

from mpoe_kernels.neurons import triton as neurons
from tests.expert_problems import HiddenProblem, NeuronProblem


@pytest.fixture
def waited(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Kernels whose programs waited, where two run at once, those of the grid's end begin first, and the first to take
    a tile computes it only when another program waits."""
    names: list[str] = []
    of_program, somebody_waits = threading.local(), threading.Event()
    builder, launch = interpreter.InterpreterBuilder, interpreter.GridExecutor.__call__
    add, set_grid = builder.create_atomic_rmw, builder.set_grid_dim

    def atomic_add(self: Any, op: Any, pointer: Any, value: Any, *rest: Any) -> Any:
        found = add(self, op, pointer, value, *rest)
        if value.data.item() == 0:
            of_program.polls += 1
            assert of_program.polls < 5000, "it waits for a program that has not begun"
            if of_program.polls > 1:
                somebody_waits.set()
                time.sleep(1e-3)
        elif of_program.polls is None and found.data.item() == 0:  # the first tile
            assert somebody_waits.wait(10), "nobody waits"
        of_program.polls = of_program.polls or 0
        return found

    def run(executor: Any, *arguments: Any, **options: Any) -> None:
        function, programs = executor.fn, list[tuple[tuple[int, ...], dict[str, Any]]]()
        somebody_waits.clear()

        def program(index: tuple[int, ...], given: dict[str, Any]) -> None:
            of_program.index, of_program.polls = index, None
            function(**given)

        def begin(**given: Any) -> None:
            programs.append((of_program.index, given))
            if programs[-1][0] == tuple(size - 1 for size in interpreter.interpreter_builder.grid_dim):
                with ThreadPoolExecutor(2) as pool:
                    list(pool.map(program, *zip(*reversed(programs), strict=True)))

        def set_grid_dim(self: Any, *sizes: int) -> None:
            set_grid(self, *sizes)
            executor.fn = begin

        monkeypatch.setattr(builder, "set_grid_dim", set_grid_dim)
        launch(executor, *arguments, **options)
        names.extend([function.__name__] * somebody_waits.is_set())

    def keep_index(_: Any, index: tuple[int, ...]) -> None:
        of_program.index = index

    monkeypatch.setattr(builder, "grid_idx", property(lambda _: of_program.index, keep_index), raising=False)
    monkeypatch.setattr(builder, "create_atomic_rmw", atomic_add)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", run)
    return names


def test_hidden_experts(waited: list[str]) -> None:
    HiddenProblem(tokens=20, experts=2, top_k=2, groups=1, dtype=torch.float32).check("triton")
    assert set(waited) == {"hidden_rows_kernel"}


@pytest.mark.parametrize(("on_chip", "kernels"), [(0, set()), (64, {"neurons_fused_kernel"})])
def test_neurons(on_chip: int, kernels: set[str], waited: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neurons, "ON_CHIP", dict.fromkeys((2, 4), on_chip))
    NeuronProblem(tokens=20, experts=2, top_k=2, neurons=16, dtype=torch.float32).check("triton")
    assert set(waited) == kernels | {"neurons_rows_kernel"}
