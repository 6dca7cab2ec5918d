"""The peers: other ways to compute a mixture of experts, reimplemented or called through their own packages.

Every peer is a function ``(Problem) -> Contender``; one that cannot take part raises `UnavailableError`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from mpoe_bench.contender import Build, Contender
from mpoe_bench.peers import dense_experts, gpu, original
from mpoe_bench.problem import Problem, Problems, Truth
from mpoe_bench.targets import GROUPED, LOOP, ORIGINAL

PEERS: dict[str, Callable[[Problem], Contender]] = {
    LOOP: dense_experts.loop,
    GROUPED: dense_experts.grouped_mm,
    "dense experts, one-hot einsum": dense_experts.one_hot,
    "transformers Switch": dense_experts.switch,
    ORIGINAL: original.rebuild_all,
    "ScatterMoE": gpu.scattermoe,
    "SonicMoE": gpu.sonicmoe,
    "QuACK grouped GEMM": gpu.quack,
    "Liger SwiGLU as ReLU, 1.5x FLOPs": gpu.liger,
}


def peer_builds(peers: Sequence[str], shape: str) -> Iterator[tuple[str, str, Build]]:
    """(name, kind, builder) of the named peers; the original works on the cores of a shape, which its name tells."""
    for peer in peers:

        def build(problems: Problems, peer: str = peer) -> tuple[Contender, Truth]:
            problem = problems.of(shape)
            return PEERS[peer](problem), problem.truth

        yield f"{peer} ({shape})" if peer == ORIGINAL else peer, "peer", build
