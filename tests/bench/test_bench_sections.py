"""Sections: whatever is wrong, fails or is absent gets no times, and says why."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from mpoe_bench import test_choice, test_speed
from mpoe_bench.contender import NOT_HERE, Comparison, Contender, UnavailableError, checked
from mpoe_bench.peers import PEERS, gpu, peer_builds
from mpoe_bench.problem import FFNCase, Problems
from mpoe_bench.run import run_suite
from mpoe_bench.suites.ffn import LIMIT, dense_limit, mpoe_builds
from mpoe_bench.suites.scale import GPU_PEERS
from mpoe_bench.tables import table_of

CASE = FFNCase(24, 48, 3, 12)
Change = Callable[[Contender], Contender]


def builds_of(change: Change, kind: str = "peer", baseline: Change = lambda contender: contender) -> list:
    """The dense FFN, MPO experts, and a peer that ``change`` has changed."""

    def sabotaged(shared: Problems):
        problem = shared.of("separable")
        return change(PEERS["dense experts, loop"](problem)), problem.truth

    def limit(shared: Problems):
        contender, truth = dense_limit(CASE, shared.batch)
        return baseline(contender), truth

    return [(LIMIT, "limit", limit), *mpoe_builds("separable", ("eager",)), ("sabotaged", kind, sabotaged)]


@pytest.fixture
def measure(monkeypatch: pytest.MonkeyPatch) -> Callable[[list], dict]:
    """The results of a session that measures one comparison of these contenders."""

    def run(builds: list) -> dict:
        comparison = Comparison("ffn", "t", lambda: Problems(CASE), builds, LIMIT, CASE.tokens, CASE.facts())
        monkeypatch.setattr(test_speed, "comparisons_of", lambda *_: [comparison])
        monkeypatch.setattr(test_choice, "judged_of", lambda *_: [])
        return run_suite(threads=1, clock="cpu", scale="tiny", backend="eager")

    return run


def rows_of(results: dict) -> dict[str, dict]:
    (section,) = results["sections"]
    return {row["name"]: row for row in section["rows"]}


def test_an_honest_peer_is_timed(measure) -> None:
    rows = rows_of(measure(builds_of(lambda contender: contender)))
    assert rows.keys() == {LIMIT, "mpoe separable [eager]", "sabotaged"}
    for row in rows.values():
        assert row["reason"] is None
        assert row["forward"]["x"] > 0
        assert row["train"]["low"] <= row["train"]["x"] <= row["train"]["high"]
        assert row["memory"]["train"]["peak"] > row["memory"]["train"]["kept"] > 0
    assert rows[LIMIT]["forward"]["x"] == 1.0


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
    *_, (name, kind, build) = builds_of(change)
    contender, row = checked(name, kind, build, Problems(CASE))
    assert contender is None
    assert row["reason"].startswith("wrong result, not timed")
    assert words in row["reason"]
    table = table_of({"key": "ffn", "title": "t", "baseline": LIMIT, "rows": [row]})
    assert table.rows == []
    assert table.notes == [f"sabotaged: {row['reason']}"]


def test_our_own_wrong_result_fails_the_run_and_a_peers_does_not(measure) -> None:
    peer, own = (measure(builds_of(wrong_result, kind)) for kind in ("peer", "mpoe"))
    assert peer["failures"] == []
    assert "sabotaged (t): wrong result" in own["failures"][0]
    for results in (peer, own):
        rows = rows_of(results)
        assert not {"forward", "train", "memory"} & rows["sabotaged"].keys()
        assert rows["mpoe separable [eager]"]["forward"]["x"] > 0  # the others are measured


def test_absent_and_failing_contenders_say_why() -> None:
    def absent(_: Contender) -> Contender:
        raise UnavailableError("no such package")

    def broken(_: Contender) -> Contender:
        raise MemoryError("out of it")

    for change, reason in ((absent, f"{NOT_HERE}: no such package"), (broken, "failed: MemoryError: out of it")):
        *_, (name, kind, build) = builds_of(change)
        assert checked(name, kind, build, Problems(CASE))[1]["reason"] == reason


def test_a_wrong_baseline_is_no_baseline(measure) -> None:
    results = measure(builds_of(lambda contender: contender, baseline=wrong_result))
    assert "dense FFN (t): wrong result, not timed" in results["failures"][0]
    assert not any("forward" in row for row in rows_of(results).values())


# What runs on a CPU.
CPU_PEERS = tuple(name for name in PEERS if name not in GPU_PEERS)


@pytest.mark.parametrize("shape", ["separable", "paper_4", "paper_full", "light_8"])
@pytest.mark.parametrize("load", ["uniform", "all_to_one"])
def test_every_peer_computes_the_truth(shape: str, load: str) -> None:
    case = replace(CASE, load=load)
    shared = Problems(case)
    for name, kind, build in peer_builds(CPU_PEERS, shape):
        row = checked(name, kind, build, shared)[1]
        assert row["reason"] is None
        assert row["errors"].keys() >= {"y", "dx"}
        assert len(row["errors"]) > 3  # and the weights' gradients


def test_masked_contenders_have_no_central_gradient() -> None:
    shared = Problems(CASE)
    problem = shared.of("separable")
    contender, truth = next(mpoe_builds("separable", ("eager",), masked=True))[2](shared)
    contender.train()
    found = contender.gradients()
    central = problem.up_shape.central
    assert f"d_up.{central}" not in found
    assert f"d_up.{(central + 1) % 3}" in found
    assert truth.faults(found) == []


@pytest.mark.parametrize("peer", GPU_PEERS)
def test_peers_of_gpus_say_why_they_are_absent(peer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ((name, kind, build),) = peer_builds((peer,), "separable")
    reason = checked(name, kind, build, Problems(CASE))[1]["reason"]
    assert reason.startswith(NOT_HERE)
    package = reason.removeprefix(f"{NOT_HERE}: ").removesuffix(" runs on CUDA devices only")
    monkeypatch.setattr(gpu, "DEVICES", ("cpu",))
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not there
    reason = checked(name, kind, build, Problems(CASE))[1]["reason"]
    assert reason.startswith(NOT_HERE)
    assert package in reason
