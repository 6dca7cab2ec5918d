"""Measured tile choices, with a benchmark whose answer is known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mpoe_kernels.linear.triton.fused_tiles import FusedTile
from mpoe_kernels.registry import BackendError
from mpoe_kernels.triton import tuning
from mpoe_kernels.triton.tuning import autotuned, choose, size_class

TILES = tuple(FusedTile(m, 64, 64, 1 << 14, 4, 2) for m in (128, 64, 32))
CPU = torch.device("cpu")


class Bench:
    """Launching a candidate returns the candidate; the tile with ``m`` rows is the fastest."""

    def __init__(self, m: int) -> None:
        self.m, self.seen = m, []

    def __call__(self, run) -> float:
        tile = run()
        self.seen.append(tile)
        return 1.0 if tile.m == self.m else 2.0


def pick(sizes: tuple[float, ...] = (100, 8, 8), dtype: torch.dtype = torch.bfloat16, launch=lambda tile: tile):
    return choose("rows", CPU, dtype, sizes, TILES, launch)


def test_the_fixed_choice_unless_asked(tmp_path: Path) -> None:
    path = tmp_path / "tiles.json"
    assert pick() is TILES[0]
    with autotuned(path=path):  # no GPU: nothing to measure
        assert pick() is TILES[0]
    assert not path.exists()


def test_the_fastest_is_measured_once_and_kept(tmp_path: Path) -> None:
    path, bench = tmp_path / "new" / "tiles.json", Bench(64)
    with autotuned(bench, path):
        assert pick() is TILES[1]
        assert bench.seen == list(TILES)
        assert pick((65, 8, 8)) is TILES[1], "the same class of sizes"
        assert len(bench.seen) == 3
        pick((300, 8, 8))
        pick(dtype=torch.float32)
        assert len(bench.seen) == 9
    later = Bench(32)
    with autotuned(later, path):
        assert pick() is TILES[1]
    assert not later.seen
    assert pick() is TILES[0], "the context has ended"
    assert [p.name for p in path.parent.iterdir()] == ["tiles.json"], "nothing partial stays"


def test_what_must_not_be_repeated_is_not_measured(tmp_path: Path) -> None:
    bench = Bench(32)
    with autotuned(bench, tmp_path / "tiles.json"):
        assert pick(launch=None) is TILES[0]
    assert not bench.seen


def test_a_candidate_that_does_not_fit_loses(tmp_path: Path) -> None:
    def launch(tile: FusedTile) -> FusedTile:
        if tile.m == 128:
            raise BackendError("too little shared memory")
        return tile

    with autotuned(Bench(128), tmp_path / "tiles.json"):
        assert pick(launch=launch) is TILES[1]


@pytest.mark.parametrize("content", ["{", "[]", '{"version": 1}', '{"version": 1, "devices": {"cpu": 3}}'])
def test_a_broken_file_is_reported_and_replaced(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tiles.json"
    path.write_text(content)
    with autotuned(Bench(32), path), pytest.warns(UserWarning, match=r"kept tiles in .* are not used"):
        assert pick() is TILES[2]
    kept = json.loads(path.read_text())
    assert kept["version"] == tuning.FILE_VERSION


def test_a_kept_tile_that_is_no_longer_shipped_is_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "tiles.json"
    with autotuned(Bench(64), path):
        pick()
    content = json.loads(path.read_text())
    (choices,) = content["devices"].values()
    choices[size_class("rows", torch.bfloat16, (100, 8, 8))][0] = 7
    path.write_text(json.dumps(content))
    with autotuned(Bench(32), path):
        assert pick() is TILES[2]
