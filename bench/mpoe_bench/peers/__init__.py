"""The peers: other ways to compute a mixture of experts, reimplemented or called through their own packages.

Every peer is a function ``(Problem) -> Contender``; one that cannot take part raises `UnavailableError`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from mpoe_bench.contender import Build, Contender
from mpoe_bench.peers import cores, dense_experts, gpu
from mpoe_bench.problem import Problem, Problems, Truth

PEERS: dict[str, Callable[[Problem], Contender]] = {
    "dense experts, loop": dense_experts.loop,
    "dense experts, grouped_mm": dense_experts.grouped_mm,
    "dense experts, one-hot einsum": dense_experts.one_hot,
    "transformers Switch": dense_experts.switch,
    "original: rebuild all": cores.rebuild_all,
    "einsum of the cores": cores.einsum_of_cores,
    "ScatterMoE": gpu.scattermoe,
    "SonicMoE": gpu.sonicmoe,
    "QuACK grouped GEMM": gpu.quack,
    "Liger SwiGLU as ReLU, 1.5x FLOPs": gpu.liger,
}
# Peers that work on the cores, so their speed depends on the kind of shape; that of the others does not.
OF_CORES = ("original: rebuild all", "einsum of the cores")


def peer_builds(peers: Sequence[str], shape: str) -> Iterator[tuple[str, str, Build]]:
    """(name, kind, builder) of the named peers; names of peers that work on cores include the shape."""
    for peer in peers:

        def build(problems: Problems, peer: str = peer) -> tuple[Contender, Truth]:
            problem = problems.of(shape)
            return PEERS[peer](problem), problem.truth

        yield f"{peer} ({shape})" if peer in OF_CORES else peer, "peer", build
