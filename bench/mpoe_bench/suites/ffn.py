"""Feed-forward layers: MPO experts of several shapes and the peers, against the dense FFN on the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from mpoe_bench.contender import Build, Comparison
from mpoe_bench.peers import peer_builds
from mpoe_bench.problem import FFNCase, Problems
from mpoe_bench.subjects import LIMIT, dense_limit, mpoe_builds


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
    builds: list[tuple[str, str, Build]] = [(LIMIT, "limit", lambda shared: dense_limit(case, shared.batch))]
    for name in shapes:
        builds += mpoe_builds(name, backends)
    for name in masked if case.train else ():
        builds += mpoe_builds(name, backends, masked=True)
    builds += peer_builds(peers, shapes[0])
    for peer, shape in core_peers:
        builds += peer_builds((peer,), shape)
    phases = ("forward", "train") if case.train else ("forward",)
    title = f"{'decode' if key == 'decode' else 'FFN'} {case.title}"
    return Comparison(key, title, partial(Problems, case), builds, LIMIT, case.tokens, case.facts(), phases)
