"""Targets judged on made-up results, on both sides of every limit."""

import pytest
from mpoe_bench.peers import LOOP, ORIGINAL
from mpoe_bench.targets import MOST_MEMORY, check_targets

BOTH_SIDES = pytest.mark.parametrize("reached", [True, False], ids=["reached", "missed"])


def timing(x):
    return {"seconds": x, "x": x, "low": x, "high": x, "rounds": 3}


def row(name, forward, train=None, **facts):
    result = {"name": name, "kind": "peer", "forward": timing(forward), "reason": None, **facts}
    if train is not None:
        result["train"] = timing(train)
    return result


def ours(shape, backend, forward, train=None, masked=False):
    facts = {"kind": "mpoe", "shape": shape, "backend": backend, "masked": masked}
    return row(f"mpoe {shape} [{backend}]", forward, train, **facts)


def section(dtype, rows, experts=8, tokens=2048, key="ffn", **case):
    known = {"experts": experts, "tokens": tokens, "dtype": dtype, "model": 768, "hidden": 3072}
    return {"key": key, "title": f"FFN {dtype}", "case": known | case, "rows": rows}


def judged(*sections):
    """By target: what was measured, and whether it is reached."""
    lines = check_targets(sections)
    return {line["what"]: (line["found"], line["reached"]) for line in lines}


@BOTH_SIDES
def test_the_worse_dtype_decides(reached):
    slower = 0.0 if reached else 0.01
    lines = judged(
        section("float32", [ours("separable", "auto", 1.3 + slower, 1.4)]),
        section("bfloat16", [ours("separable", "auto", 1.2, 1.45 + slower)]),
    )
    forward = {"float32": f"{1.3 + slower:.2f}", "bfloat16": "1.20"}
    both = {"float32": "1.40", "bfloat16": f"{1.45 + slower:.2f}"}
    assert lines == {
        "separable, E=8 T=2048, forward": (forward, reached),
        "separable, E=8 T=2048, forward + backward": (both, reached),
    }


def test_each_backend_has_its_own_limits():
    rows = [ours("separable", backend, 1.4) for backend in ("eager", "native")]
    lines = check_targets([section("float32", rows)])
    assert [(line["backend"], line["wanted"], line["reached"]) for line in lines] == [
        ("eager", "<= 1.5 x dense", True),
        ("native", "<= 1.3 x dense", False),
    ]


@BOTH_SIDES
def test_faster_than_a_peer_is_a_ratio_of_times(reached):
    ratio = 1.3 if reached else 1.2
    peer = row(f"{ORIGINAL} (paper_64)", 2.0 * ratio, 3.9)
    lines = judged(section("float32", [ours("paper_64", "eager", 2.0, 3.0), peer]))
    what = "paper_64, E=8 T=2048, forward"
    assert lines == {
        f"{what}, against {ORIGINAL}": ({"float32": f"{ratio:.2f}"}, reached),
        f"{what} + backward, against {ORIGINAL}": ({"float32": "1.30"}, True),
    }


def test_a_shape_is_judged_where_it_has_a_target():
    rows = [ours("paper_16", "auto", 4.0), ours("paper_64", "auto", 20.0), row(LOOP, 10.0)]
    lines = judged(section("float32", rows, experts=64, tokens=64))
    assert lines == {f"paper_16, E=64 T=64, forward, against {LOOP}": ({"float32": "2.50"}, True)}


@BOTH_SIDES
def test_masked_training_is_faster_than_unmasked(reached):
    masked = ours("paper_full", "auto", 3.0, 3.99 if reached else 4.0, masked=True)
    lines = judged(section("float32", [ours("paper_full", "auto", 3.0, 4.0), masked]))
    assert lines["paper_full, E=8 T=2048, forward + backward, central masked"][1] is reached


@BOTH_SIDES
def test_weights_count_in_the_memory_of_training(reached):
    loop = row(LOOP, 1.0, 1.0, weight_bytes=200, memory={"train": {"peak": 100}})
    peak = 249 if reached else 250
    mpo = ours("paper_full", "auto", 3.0, 4.0)
    mpo |= {"weight_bytes": 50, "memory": {"train": {"peak": peak}}}
    lines = judged(section("float32", [mpo, loop]))
    assert lines["paper_full, E=8 T=2048, weights + peak of forward + backward"][1] is reached


@BOTH_SIDES
@pytest.mark.parametrize(
    "case, phase, limit",
    [
        ({"layers": 1, "tokens": 2048}, "forward", 1.12),
        ({"layers": 1, "tokens": 2048}, "forward + backward", 1.2),
        ({"layers": 12, "tokens": 64}, "forward", 1.25),
    ],
)
def test_mixtures_around_a_dense_network(case, phase, limit, reached):
    shape = "neurons 8 x 64, 2"
    x = limit if reached else limit + 0.01
    lines = judged(section("float32", [ours(shape, "auto", x, x)], key="layers", **case))
    what = f"{shape}, layers={case['layers']} T={case['tokens']}, {phase}"
    assert lines[what] == ({"float32": f"{x:.2f}"}, reached)
    decodes = case["layers"] == 12  # which has no target for training
    assert len(lines) == 1 + (not decodes)


@BOTH_SIDES
def test_what_training_keeps_is_not_its_memory(reached):
    def needs(temporary):
        return {"memory": {"train": {"peak": temporary + 5, "kept": 5}}}

    dense = row("dense FFN", 1.0, 1.0, **needs(100)) | {"kind": "limit"}
    most = round(100 * MOST_MEMORY)
    mixture = ours("neurons 8 x 64, 2", "auto", 1.1, 1.1) | needs(most if reached else most + 1)
    lines = judged(section("float32", [dense, mixture], key="layers", layers=1))
    assert lines["neurons 8 x 64, 2 768x3072, memory of forward + backward"][1] is reached


@pytest.mark.parametrize("within, reached", [(36, True), (35, False)])
def test_nine_tenths_of_the_planners_choices_are_near_the_best(within, reached):
    ratios = [1.15] * within + [1.16] * (40 - within)
    rows = [{"name": str(k), "ratio": ratio} for k, ratio in enumerate(ratios)]
    (line,) = check_targets([{"key": "planner", "rows": rows, "backend": "auto"}])
    assert line["reached"] is reached
