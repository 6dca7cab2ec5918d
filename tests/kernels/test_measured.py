"""Measured times replace predicted ones where they exist."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mpoe_kernels import BackendError, choice, measured, registry
from mpoe_kernels.contract import BlockDims, contraction

from .backend_cases import candidate_backend

DIMS = BlockDims(8, 8, 64, 12, 48, 64, 8, 8, 768, 3072)


def plan(slots: int, phase: str = "forward"):
    return contraction("rebuild", DIMS, 8, slots, torch.bfloat16, phase)


def test_times_are_interpolated_between_measured_numbers_of_slots(tmp_path: Path) -> None:
    name = measured.key("cuda", "rebuild", plan(1))
    assert name == "cuda rebuild forward bfloat16 8x8x64x12x48x64x8x8x768x3072 E8"
    file = tmp_path / "measured.json"
    file.write_text(json.dumps({"Some GPU": {name: [[300, 4e-3], [100, 2e-3]]}}))
    table = measured.read(file)["Some GPU"]
    for slots, seconds in ((100, 2e-3), (150, 2.5e-3), (300, 4e-3), (99, None), (301, None)):
        assert measured.seconds_of(table, "cuda", "rebuild", plan(slots)) == pytest.approx(seconds)
    assert measured.seconds_of(table, "triton", "rebuild", plan(100)) is None
    assert measured.seconds_of({}, "cuda", "rebuild", plan(100)) is None


def test_gradients_are_part_of_the_key() -> None:
    every, masked = (
        plan(8, "backward"),
        contraction("rebuild", DIMS, 8, 8, torch.bfloat16, "backward", (True, True, False, True)),
    )
    assert measured.key("cuda", "rebuild", every).endswith("E8 need1111")
    assert measured.key("cuda", "rebuild", masked).endswith("E8 need1101")


@pytest.mark.parametrize("pairs", [[], [[8, 0.0]], [[-1, 1.0]]])
def test_entries_without_sense_are_refused(tmp_path: Path, pairs: list) -> None:
    (tmp_path / "measured.json").write_text(json.dumps({"Some GPU": {"a key": pairs}}))
    with pytest.raises(ValueError, match="'a key' must hold pairs of slots and positive seconds"):
        measured.read(tmp_path / "measured.json")


def test_the_shipped_file_can_be_read() -> None:
    assert isinstance(measured.read(measured.FILE), dict)


def test_a_measured_time_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two backends whose predictions say the opposite; naming a backend still wins."""
    kernels = {"grouped_mpo_linear": lambda: None}
    quick = candidate_backend("quick", kernels, lambda _: 1e-6)
    slow = candidate_backend("slow", kernels, lambda _: 1e-3)
    monkeypatch.setattr(registry, "BACKENDS", {"quick": quick, "slow": slow})

    def chosen(slots: int, backend: str = "auto") -> str:
        arguments = ("grouped_mpo_linear", DIMS, 8, slots, torch.bfloat16, "cuda")
        return choice.resolve_contraction(choice.Problem(*arguments, backend=backend, strategy="rebuild")).backend

    assert chosen(64) == "quick"
    table = {measured.key("quick", "rebuild", plan(1)): [(1, 5e-3), (4096, 5e-3)]}
    monkeypatch.setattr(measured, "table_here", lambda device: table if device == "cuda" else {})
    assert chosen(65) == "slow"
    assert chosen(66, "quick") == "quick"
    assert chosen(5000) == "quick", "beyond what was measured the prediction holds"
    with pytest.raises((BackendError, KeyError)):
        chosen(67, "absent")
