"""Sections: whatever is wrong, fails or is absent gets no times, and says why."""

from dataclasses import replace

import pytest
import torch
from mpoe_bench.contender import NOT_HERE, checked, gradients_of
from mpoe_bench.layers import (
    LIMIT,
    Place,
    case_layer,
    granite,
    layers_comparison,
    named_case,
    original_layer,
    peer_layers,
)
from mpoe_bench.peers import PEERS
from mpoe_bench.run import run_suite
from mpoe_bench.suites import Plan
from mpoe_bench.tables import table_of

from mpoe_kernels import BackendError
from tests.cases import in_two_dtypes

MODEL, EXPERTS, TOKENS = 24, 3, 12
AT = Place(MODEL, TOKENS)


def comparison_of(layers, at=AT):
    return layers_comparison("ffn", "FFN", layers, at, experts=EXPERTS)


def ours(shape, masked=False):
    case = named_case(shape, MODEL, EXPERTS, masked)
    return case_layer(f"mpoe {shape}", shape, case, "eager", AT)


def honest():
    """The dense FFN, MPO experts, and a peer."""
    return comparison_of([ours("separable"), *peer_layers(("dense experts, loop",), EXPERTS, AT)])


def builds_of(change, kind="peer", baseline=lambda contender: contender):
    """The dense FFN, MPO experts, and a peer that ``change`` has changed."""
    (limit, limits, dense), own, (_, _, peer) = honest().contenders

    def changed(build, change):
        def made(shared):
            contender, truth = build(shared)
            return change(contender), truth

        return made

    return [
        (limit, limits, changed(dense, baseline)),
        own,
        ("sabotaged", kind, changed(peer, change)),
    ]


def shared():
    return honest().context()


@pytest.fixture
def measure(monkeypatch):
    """The results of a session that measures one comparison of these contenders."""

    def measured(builds):
        comparison = replace(honest(), title="t", contenders=builds)
        monkeypatch.setattr(Plan, "of", lambda *_: [comparison])
        return run_suite(threads=1, scale="tiny", backend="eager")

    return measured


def rows_of(results):
    (section,) = results["sections"]
    return {row["name"]: row for row in section["rows"]}


def result(how, **others):
    """A change of what a contender computes."""
    return lambda contender: replace(
        contender, function=lambda: how(contender.function()), **others
    )


wrong_result = result(lambda y: y * 1.01)


@pytest.mark.parametrize(
    "change, words",
    [
        (wrong_result, "error of y"),
        (result(lambda y: torch.cat([y[1:2], y[:1], y[2:]])), "error of y"),
        (result(lambda y: y.detach() + 1.01 * (y - y.detach())), "error of dx is 1.0e-02"),
        (result(lambda y: y + float("nan")), "error of y is nan"),
        (result(lambda y: y[:-1], grad_y=None), "y is [11, 24] instead of [12, 24]"),
    ],
)
def test_a_sabotaged_contender_has_no_speed(change, words):
    *_, (name, kind, build) = builds_of(change)
    contender, row = checked(name, kind, build, shared())
    assert contender is None
    assert row["reason"].startswith("wrong result, not timed")
    assert words in row["reason"]
    table = table_of({"key": "ffn", "title": "t", "baseline": LIMIT, "rows": [row]})
    assert not any(table.columns.values())
    assert table.notes == [f"sabotaged: {row['reason']}"]


def test_our_own_wrong_result_fails_the_run_and_a_peers_does_not(measure):
    peer, own = (measure(builds_of(wrong_result, kind)) for kind in ("peer", "mpoe"))
    assert peer["failures"] == []
    assert "sabotaged (t): wrong result" in own["failures"][0]
    for results in (peer, own):
        rows = rows_of(results)
        assert not {"forward", "train", "memory"} & rows["sabotaged"].keys()
        assert rows["mpoe separable [eager]"]["forward"]["x"] > 0  # the others are measured


def test_absent_and_failing_contenders_say_why():
    def absent(_):
        raise BackendError("no such package")

    def broken(_):
        raise MemoryError("out of it")

    for change, reason in (
        (absent, f"{NOT_HERE}: no such package"),
        (broken, "failed: MemoryError: out of it"),
    ):
        *_, (name, kind, build) = builds_of(change)
        assert checked(name, kind, build, shared())[1]["reason"] == reason


def test_a_wrong_baseline_is_no_baseline(measure):
    results = measure(builds_of(lambda contender: contender, baseline=wrong_result))
    assert "dense FFN (t): wrong result, not timed" in results["failures"][0]
    assert not any("forward" in row for row in rows_of(results).values())


@in_two_dtypes
def test_every_peer_computes_the_truth(dtype):
    at = AT._replace(dtype=dtype)
    layers = [
        *peer_layers(tuple(PEERS), EXPERTS, at),
        *(
            original_layer(shape, EXPERTS, at)
            for shape in ("separable", "paper_4", "paper_full", "light_8")
        ),
        granite(at),
    ]
    comparison = comparison_of(layers, at)
    for name, kind, build in comparison.contenders:
        row = checked(name, kind, build, comparison.context())[1]
        assert row["reason"] is None, row
        assert row["errors"].keys() > {"y", "dx"}  # and the weights' gradients


def test_masked_contenders_have_no_central_gradient():
    contender, truth = comparison_of([ours("separable", masked=True)]).contenders[1][2](shared())
    contender.train()
    found = gradients_of(contender.leaves)
    assert not [name for name in found if "central" in name]
    assert [name for name in found if "auxiliary" in name]
    assert truth.compare(found)[1] == []
