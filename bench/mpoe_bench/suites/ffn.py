"""Feed-forward layers: MPO experts of several shapes and the peers, against the dense FFN on the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mpoe_bench.peers import peer_builds
from mpoe_bench.problem import FFNCase, Problem, make_batch
from mpoe_bench.section import Build, Comparison, Setup, run_section
from mpoe_bench.subjects import LIMIT, dense_limit, mpoe_builds


def ffn_section(case: FFNCase, shapes: Sequence[str], setup: Setup, **options: Any) -> dict[str, Any]:
    """Run `ffn_comparison` on the backends of a setup."""
    return run_section(ffn_comparison(case, shapes, setup.backends, **options), setup)


def ffn_comparison(
    case: FFNCase,
    shapes: Sequence[str],
    backends: Sequence[str],
    *,
    peers: Sequence[str] = (),
    core_peers: Sequence[tuple[str, str]] = (),
    masked: Sequence[str] = (),
    key: str = "ffn",
) -> Comparison:
    """One case with many contenders.

    Args:
        case: sizes.
        shapes: names of MPO shapes, each measured on every backend.
        backends: backends whose contenders take part.
        peers: peers whose speed does not depend on a shape; they get the weights of the first shape.
        core_peers: (peer, shape) pairs, for peers that work on cores.
        masked: shapes measured again with the central gradient masked.
        key: the section's key in the results.
    """
    batch = make_batch(case)
    problems = {
        name: Problem(case, name, batch) for name in dict.fromkeys([*shapes, *masked, *dict(core_peers).values()])
    }
    builds: list[tuple[str, str, Build]] = [(LIMIT, "limit", lambda: dense_limit(case, batch))]
    for name in shapes:
        builds += mpoe_builds(problems[name], backends)
    for name in masked if case.train else ():
        builds += mpoe_builds(problems[name], backends, masked=True)
    if peers:
        builds += peer_builds(tuple(peers), problems[shapes[0]])
    for peer, shape in core_peers:
        builds += peer_builds((peer,), problems[shape])
    phases = ("forward", "train") if case.train else ("forward",)
    return Comparison(key, f"FFN {case.title}", builds, LIMIT, case.tokens, case.facts(), phases)
