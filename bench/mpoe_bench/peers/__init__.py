"""The peers: other ways to compute a mixture of experts, reimplemented or called through their own packages.

Every peer is a function ``(Problem) -> Contender``; one that cannot take part raises `UnavailableError`.
"""

from __future__ import annotations

from collections.abc import Callable

from mpoe_bench.contender import Contender
from mpoe_bench.peers import dense_experts, gpu, huggingface, original, tensor_networks
from mpoe_bench.problem import Problem, Truth
from mpoe_bench.section import Build

PEERS: dict[str, Callable[[Problem], Contender]] = {
    "dense experts, loop": dense_experts.loop,
    "dense experts, grouped_mm": dense_experts.grouped_mm,
    "dense experts, one-hot einsum": dense_experts.one_hot,
    "transformers Switch": huggingface.switch_sparse_mlp,
    "original: rebuild all": original.rebuild_all,
    "einsum of the cores": tensor_networks.einsum_of_cores,
    "tltorch factorized": tensor_networks.tltorch_factorized,
    "tltorch reconstructed": tensor_networks.tltorch_reconstructed,
    "ScatterMoE": gpu.scattermoe,
    "MegaBlocks grouped GEMM": gpu.megablocks,
    "triton_kernels": gpu.triton_kernels,
    "SonicMoE": gpu.sonicmoe,
    "QuACK grouped GEMM": gpu.quack,
    "Liger SwiGLU as ReLU, 1.5x FLOPs": gpu.liger,
}
# Peers that work on the cores, so their speed depends on the kind of shape; that of the others does not.
OF_CORES = ("original: rebuild all", "einsum of the cores", "tltorch factorized", "tltorch reconstructed")


def peer_name(peer: str, problem: Problem) -> str:
    """``original: rebuild all (paper_64)``: names of peers that work on cores include the shape."""
    return f"{peer} ({problem.shape_name})" if peer in OF_CORES else peer


def peer_builds(peers: tuple[str, ...], problem: Problem) -> list[tuple[str, str, Build]]:
    """(name, kind, builder) of the named peers on one problem.

    Raises:
        ValueError: an unknown peer.
    """
    builds: list[tuple[str, str, Build]] = []
    for peer in peers:
        if peer not in PEERS:
            raise ValueError(f"peers must be among {list(PEERS)}; got {peer!r}")

        def build(peer: str = peer) -> tuple[Contender, Truth]:
            contender = PEERS[peer](problem)
            contender.name = peer_name(peer, problem)
            return contender, problem.truth

        builds.append((peer_name(peer, problem), "peer", build))
    return builds
