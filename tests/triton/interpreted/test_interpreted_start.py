"""Which of a kernel's tiles a launch takes: the fastest for such a problem, or without timing the
first."""

import pytest
import torch

from mpoe_kernels.experts import triton as experts
from mpoe_kernels.experts.triton import (
    HIDDEN_TILES,
    LARGE_BLOCK_TILES,
    NEURON_TILES,
    TileChoice,
)
from mpoe_kernels.triton import start
from tests.assertions import refuses
from tests.expert_problems import HiddenProblem

TILES = (start.Tile(16, 16, 16, 4), start.Tile(32, 16, 16, 4))


@pytest.fixture
def timed(monkeypatch):
    """Where the interpreter may time, every run takes less time than the one before; the numbers of
    runs."""
    runs = []

    def milliseconds(run):
        run()
        runs.append(len(runs))
        return 1.0 / len(runs)

    monkeypatch.delenv(start.SETTING, raising=False)
    monkeypatch.setattr(start, "in_interpreter", lambda: False)
    monkeypatch.setattr(start, "_milliseconds", milliseconds)
    monkeypatch.setattr(start, "_FASTEST", {})
    choice = dict.fromkeys((2, 4), TileChoice(TILES))
    monkeypatch.setattr(experts, "HIDDEN_TILES", dict.fromkeys(HIDDEN_TILES, choice))
    return runs


def test_powers_of_two():
    assert [*map(start.power_of_two, (0, 1, 4, 5))] == [1, 1, 4, 8]


def forward(tokens=40, **sizes):
    problem = HiddenProblem(tokens=tokens, experts=1, groups=1, dtype=torch.float32, **sizes)
    return experts.forward(problem.call())


def test_the_fastest_tile_is_kept(timed):
    first = forward()
    assert timed == [0, 1]
    assert torch.equal(forward(), first)
    assert timed == [0, 1]
    assert [way["BM"] for way in start._FASTEST.values()] == [32]


def test_widths_experts_and_powers_of_two_of_tokens_choose_for_themselves(timed):
    forward(40)
    forward(60)
    assert len(timed) == 2, "the same power of two"
    forward(70)
    assert len(timed) == 4
    forward(40, block=8)
    assert len(timed) == 6
    assert len(start._FASTEST) == 3


def test_a_captured_graph_takes_what_was_timed_before(timed, monkeypatch):
    forward()
    rows = []
    launch = start._launch
    monkeypatch.setattr(
        start, "_launch", lambda k, g, a: rows.append(a.get("BM", 0)) or launch(k, g, a)
    )
    monkeypatch.setattr(start, "is_traced", lambda: True)
    forward()
    assert rows[1] == 32
    forward(200)
    assert rows[4] == 16, "of what was not timed the first"
    assert timed == [0, 1]


def test_a_tile_that_does_not_fit_is_passed_over(timed, monkeypatch):
    launch = start._launch

    def refuse(kernel, grid, arguments):
        if arguments.get("BM") in refused:
            raise start.OutOfResources(262144, 101376, "shared memory")
        launch(kernel, grid, arguments)

    monkeypatch.setattr(start, "_launch", refuse)
    refused = [32]
    forward()
    assert [way["BM"] for way in start._FASTEST.values()] == [16]
    refused += [16]
    refuses(start.BackendError, "it needs 262144 of shared memory", forward, 90)


@pytest.mark.parametrize("why", ["deterministic", "setting", "ranks", "captured"])
def test_nothing_is_timed_where_results_must_not_depend_on_a_clock(why, timed, monkeypatch):
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


def test_tiles_of_a_kernel_share_the_order_of_sums_and_the_number_of_parts():
    """Partial results are allocated before the tile is known, and a token's bits must not depend on
    it."""
    large = {kernel: {2: choice} for kernel, choice in LARGE_BLOCK_TILES.items()}
    for table in (HIDDEN_TILES, large, NEURON_TILES):
        for kernel in table.keys() - {"weights"}:
            for choice in table[kernel].values():
                few = choice.few or choice.many[0]
                sizes = {(tile.columns, tile.inner) for tile in (*choice.many, few)}
                assert len(sizes) == 1, kernel
                alone = choice.alone or few
                assert alone.inner == few.inner, kernel
    for size in (2, 4):
        fused = NEURON_TILES["fused"][size].many[0]
        assert fused.inner == NEURON_TILES["hidden"][size].many[0].inner
