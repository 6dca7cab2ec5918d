"""Sections: whatever is wrong, fails or is absent gets no times, and says why."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from mpoe_bench.contender import Contender, UnavailableError
from mpoe_bench.peers import PEERS, peer_builds
from mpoe_bench.problem import FFNCase, Problem, make_batch
from mpoe_bench.run import failures
from mpoe_bench.section import NOT_HERE, Comparison, Setup, run_section
from mpoe_bench.subjects import LIMIT, dense_limit, mpoe_builds
from mpoe_bench.suites.ffn import ffn_comparison
from mpoe_bench.suites.scale import GPU_PEERS
from mpoe_bench.tables import table_of
from mpoe_bench.timing import Budget, cpu_measure

CASE = FFNCase(24, 48, 3, 12)
SETUP = Setup(Budget(0.002, 0.0, min_rounds=2, max_rounds=2), cpu_measure(), backends=("eager",))


def section_with(change, case: FFNCase = CASE, peer: str = "dense experts, loop") -> dict:
    """A section of the dense FFN, MPO experts, and a peer that ``change`` has changed."""
    batch = make_batch(case)
    problem = Problem(case, "separable", batch)

    def sabotaged():
        contender = PEERS[peer](problem)
        return change(contender), problem.truth

    builds = [
        (LIMIT, "limit", lambda: dense_limit(case, batch)),
        *mpoe_builds(problem, ("eager",)),
        ("sabotaged", "peer", sabotaged),
    ]
    return run_section(Comparison("ffn", "t", builds, LIMIT, case.tokens, case.facts()), SETUP)


def row_of(section: dict, name: str) -> dict:
    return next(row for row in section["rows"] if row["name"] == name)


def test_an_honest_peer_is_timed() -> None:
    section = section_with(lambda contender: contender)
    for row in section["rows"]:
        assert row["reason"] is None
        assert row["forward"]["x"] > 0
        assert row["train"]["x"] > 0
        assert row["memory"]["train"]["peak"] > row["memory"]["train"]["kept"] > 0
    assert row_of(section, LIMIT)["forward"]["x"] == 1.0


def wrong_result(contender: Contender) -> Contender:
    function = contender.function
    return replace(contender, function=lambda: function() * 1.01)


def wrong_row(contender: Contender) -> Contender:
    function = contender.function

    def roll() -> torch.Tensor:
        y = function()
        return torch.cat([y[1:2], y[:1], y[2:]])

    return replace(contender, function=roll)


def wrong_gradient(contender: Contender) -> Contender:
    gradients = contender.gradients
    return replace(contender, gradients=lambda: {**gradients(), "dx": gradients()["dx"] * 1.01})


def not_a_number(contender: Contender) -> Contender:
    function = contender.function
    return replace(contender, function=lambda: function() + float("nan"))


def wrong_shape(contender: Contender) -> Contender:
    function = contender.function
    return replace(contender, function=lambda: function()[:-1], grad_y=None)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (wrong_result, "error of y"),
        (wrong_row, "error of y"),
        (wrong_gradient, "error of dx"),
        (not_a_number, "error of y is nan"),
        (wrong_shape, "y is [11, 24] instead of [12, 24]"),
    ],
)
def test_a_sabotaged_contender_has_no_speed(change, words: str) -> None:
    section = section_with(change)
    row = row_of(section, "sabotaged")
    assert row["reason"].startswith("wrong result, not timed")
    assert words in row["reason"]
    assert not {"forward", "train", "memory"} & row.keys()
    table = table_of(section)
    assert "sabotaged" not in [cells[0] for cells in table.rows]
    assert any("sabotaged" in note and words in note for note in table.notes)


def test_our_own_wrong_result_fails_the_run_and_a_peers_does_not() -> None:
    section = section_with(wrong_result)
    assert failures([section]) == []
    row_of(section, "sabotaged")["kind"] = "mpoe"
    assert "wrong result" in failures([section])[0]


def test_absent_and_failing_contenders_leave_the_others_alone() -> None:
    def absent(_: Contender) -> Contender:
        raise UnavailableError("no such package")

    def broken(_: Contender) -> Contender:
        raise MemoryError("out of it")

    for change, reason in ((absent, f"{NOT_HERE}: no such package"), (broken, "failed: MemoryError: out of it")):
        section = section_with(change)
        assert row_of(section, "sabotaged")["reason"] == reason
        assert row_of(section, "mpoe separable [eager]")["forward"]["x"] > 0


def test_a_wrong_baseline_is_no_baseline() -> None:
    batch = make_batch(CASE)

    def build():
        contender, truth = dense_limit(CASE, batch)
        return wrong_result(contender), truth

    with pytest.raises(RuntimeError, match="baseline 'dense FFN' cannot be measured"):
        run_section(Comparison("ffn", "t", [(LIMIT, "limit", build)], LIMIT), SETUP)


# What runs on a CPU; tensorly-torch where it is installed.
CPU_PEERS = tuple(name for name in PEERS if name not in GPU_PEERS)


@pytest.mark.parametrize("shape", ["separable", "paper_4", "paper_full", "light_8"])
@pytest.mark.parametrize("load", ["uniform", "all_to_one"])
def test_every_peer_computes_the_truth(shape: str, load: str) -> None:
    case = replace(CASE, load=load)
    problem = Problem(case, shape, make_batch(case))
    section = run_section(
        Comparison("ffn", "t", peer_builds(CPU_PEERS, problem), None, case.tokens, case.facts()), SETUP
    )
    for row in section["rows"]:
        if row["name"].startswith("tltorch") and (row["reason"] or "").startswith(NOT_HERE):
            assert "tensorly-torch" in row["reason"] or "padding" in row["reason"]
        elif row["name"].startswith("einsum of the cores") and "opt_einsum" in (row["reason"] or ""):
            assert row["reason"].startswith(NOT_HERE)
        else:
            assert row["reason"] is None
            assert row["errors"].keys() >= {"y", "dx"}
            assert len(row["errors"]) > 3  # and the weights' gradients


def test_an_unknown_peer_is_refused() -> None:
    with pytest.raises(ValueError, match="peers must be among"):
        ffn_comparison(CASE, ("separable",), ("eager",), peers=("Mixtral",))


def test_masked_contenders_have_no_central_gradient() -> None:
    problem = Problem(CASE, "separable", make_batch(CASE))
    contender, truth = next(iter(mpoe_builds(problem, ("eager",), masked=True)))[2]()
    contender.train()
    found = contender.gradients()
    central = problem.up_shape.central
    assert f"d_up.{central}" not in found
    assert f"d_up.{(central + 1) % 3}" in found
    assert truth.faults(found) == []
