"""Targets judged on made-up results: the worse of two dtypes counts, each kind of backend by its
own limits."""

from mpoe_bench.targets import check_targets


def timing(x):
    return {"seconds": x, "x": x, "low": x, "high": x, "rounds": 3}


def row(name, forward, train=None, **facts):
    found = {"name": name, "kind": "peer", "forward": timing(forward), "reason": None, **facts}
    if train is not None:
        found["train"] = timing(train)
    return found


def ours(shape, backend, forward, train=None, masked=False):
    facts = {"kind": "mpoe", "shape": shape, "backend": backend, "masked": masked}
    return row(f"mpoe {shape} [{backend}]", forward, train, **facts)


def section(dtype, rows, experts=8, tokens=2048, **case):
    known = {"experts": experts, "tokens": tokens, "dtype": dtype, "model": 768, "hidden": 3072}
    return {"key": "ffn", "title": f"FFN {dtype}", "case": known | case, "rows": rows}


def lines_of(sections):
    return {(line["what"], line["backend"]): line for line in check_targets(sections)}


def test_the_worse_dtype_decides():
    sections = [
        section("float32", [ours("separable", "auto", 1.2, 1.4)]),
        section("bfloat16", [ours("separable", "auto", 1.31, 1.4)]),
    ]
    lines = lines_of(sections)
    forward = lines["separable, E=8 T=2048, forward", "auto"]
    assert forward["found"] == {"float32": "1.20", "bfloat16": "1.31"}
    assert forward["wanted"] == "<= 1.3 x dense"
    assert not forward["reached"]
    assert lines["separable, E=8 T=2048, forward + backward", "auto"]["reached"]


def test_faster_than_a_peer_is_a_ratio_of_times():
    original = row("original: rebuild all (paper_64)", 2.6, 2.6)
    loop = row("dense experts, loop", 10.0)
    sections = [
        section("float32", [ours("paper_64", "eager", 2.0, 2.1), original]),
        section(
            "float32", [ours("paper_16", "auto", 4.0), ours("paper_64", "auto", 20.0), loop], 64, 64
        ),
        section("bfloat16", [ours("paper_16", "auto", 4.1), loop], 64, 64),
    ]
    lines = lines_of(sections)
    forward = lines["paper_64, E=8 T=2048, forward, against original: rebuild all", "eager"]
    assert forward["found"] == {"float32": "1.30"}
    assert forward["reached"]
    assert not lines[
        "paper_64, E=8 T=2048, forward + backward, against original: rebuild all", "eager"
    ]["reached"]
    small = lines["paper_16, E=64 T=64, forward, against dense experts, loop", "auto"]
    assert small["found"] == {"float32": "2.50", "bfloat16": "2.44"}
    assert not small["reached"]
    assert not any("paper_64, E=64 T=64" in what for what, _ in lines)  # it has no target there


def test_masked_and_memory():
    whole, masked = (
        ours("paper_full", "auto", 3.0, 4.0),
        ours("paper_full", "auto", 3.0, 3.5, masked=True),
    )
    loop = row("dense experts, loop", 1.0, 1.0, weight_bytes=200, memory={"train": {"peak": 100}})
    whole |= {"weight_bytes": 50, "memory": {"train": {"peak": 251}}}
    lines = lines_of([section("float32", [whole, masked, loop])])
    assert lines["paper_full, E=8 T=2048, forward + backward, central masked", "auto"]["reached"]
    memory = lines["paper_full, E=8 T=2048, weights + peak of forward + backward", "auto"]
    assert not memory["reached"]


def test_mixtures_around_a_dense_network():
    def needs(count):
        return {"memory": {"train": {"peak": count + 5, "kept": 5}}}

    shape = "neurons 8 x 64, 2"
    neurons = ours(shape, "auto", 1.1, 1.25) | needs(12)
    dense = row("dense FFN", 1.0, 1.0) | {"kind": "limit"} | needs(10)
    many = {**section("float32", [dense, neurons], layers=1), "key": "layers"}
    deep = {
        **section("float32", [dense, neurons | {"forward": timing(1.3)}], tokens=64, layers=12),
        "key": "layers",
    }
    lines = lines_of([many, deep])
    assert lines[f"{shape}, layers=1 T=2048, forward", "auto"]["reached"]
    assert not lines[f"{shape}, layers=1 T=2048, forward + backward", "auto"]["reached"]
    assert not lines[f"{shape}, layers=12 T=64, forward", "auto"]["reached"]
    assert (f"{shape}, layers=12 T=64, forward + backward", "auto") not in lines
    memory = lines[f"{shape} 768x3072, memory of forward + backward", "auto"]
    assert memory["found"] == {"float32": "1.20"}
    assert memory["reached"]


def test_planner():
    def reached(within):
        rows = [{"name": str(k), "ratio": 1.15 if k < within else 1.16} for k in range(48)]
        return check_targets([{"key": "planner", "rows": rows, "backend": "auto"}])[0]["reached"]

    assert not reached(43)  # less than 90%
    assert reached(44)
