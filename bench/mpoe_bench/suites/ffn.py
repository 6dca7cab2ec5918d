"""Feed-forward layers: MPO experts of several shapes and the peers, against the dense FFN on the same tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mpoe.layers import MPOExperts
from mpoe_bench.contender import Build, Comparison, Contender, size_facts
from mpoe_bench.peers import peer_builds
from mpoe_bench.problem import Batch, FFNCase, Problem, Problems, Truth, grad_of, probe, without_kinks
from mpoe_bench.targets import ORIGINAL
from mpoe_kernels import route

LIMIT = "dense FFN"


def dense_limit(case: FFNCase, batch: Batch) -> tuple[Contender, Truth]:
    """The dense FFN on the same tokens: no mixture of experts can do less."""
    torch.manual_seed(2)
    up = (torch.randn(case.hidden, case.model) / case.model**0.5).to(case.device, case.dtype)
    down = (torch.randn(case.model, case.hidden) / case.hidden**0.5).to(case.device, case.dtype)
    leaves = [t.requires_grad_(case.train) for t in (up, down)]
    z = batch.x.detach().double() @ up.detach().double().T
    grad_y = without_kinks(batch.grad_y, z) if case.train else None
    del z

    def ffn(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return nn.functional.linear(nn.functional.relu(nn.functional.linear(x, up)), down)

    def results(dtype: torch.dtype) -> dict[str, Tensor]:
        tensors = [t.detach().to(dtype).clone().requires_grad_(case.train) for t in (batch.x, up, down)]
        y = ffn(*tensors)
        if grad_y is None:
            return {"y": y.cpu()}
        y.backward(grad_y.to(dtype))
        y, x_grad, up_grad, down_grad = (t.detach().cpu() for t in (y, *(grad_of(t) for t in tensors)))
        d_up, d_down = up_grad.T @ probe(case.hidden, dtype), down_grad.T @ probe(case.model, dtype)
        return {"y": y, "dx": x_grad, "d_up_probe": d_up, "d_down_probe": d_down}

    def gradients() -> Mapping[str, Tensor]:
        return {
            "dx": grad_of(batch.x),
            "d_up_probe": (grad_of(up).T.cpu().double() @ probe(case.hidden)),
            "d_down_probe": (grad_of(down).T.cpu().double() @ probe(case.model)),
        }

    contender = Contender(
        lambda: ffn(batch.x, up, down),
        grad_y,
        (batch.x, *leaves),
        gradients,
        size_facts(up.numel() + down.numel(), case.dtype),
    )
    return contender, Truth.of(results, case.dtype)


def mpo_experts(problem: Problem, backend: str, mask_central: bool = False) -> Contender:
    """The experts of `mpoe.layers`, as a converted model runs them: sort, fold, two grouped products, combine."""
    case, batch = problem.case, problem.batch
    shapes = {"up": problem.up_shape, "down": problem.down_shape}
    layer = MPOExperts(shapes, case.experts, "relu", backend=backend, device="meta", dtype=case.dtype)
    layer = layer.to_empty(device=case.device)
    for module, cores in ((layer.up, problem.up), (layer.down, problem.down)):
        module.central_masked = mask_central
        for name, core in zip(module.core_names(), cores, strict=True):
            module.get_parameter(name).data.copy_(core)
    layer.requires_grad_(case.train)

    def gradients() -> Mapping[str, Tensor]:
        found: dict[str, Tensor] = {"dx": grad_of(batch.x)}
        for kind, module in (("up", layer.up), ("down", layer.down)):
            for k, name in enumerate(module.core_names()):
                if not (mask_central and name == "central"):
                    found[f"d_{kind}.{k}"] = grad_of(module.get_parameter(name))
        return found

    facts: dict[str, Any] = {"shape": problem.shape_name, "backend": backend, "masked": mask_central}
    facts |= size_facts(problem.parameters(), case.dtype)
    facts["floor"] = problem.floor(mask_central)
    return Contender(
        lambda: layer(batch.x, route(batch.index, case.experts), batch.gates),
        problem.grad_y,
        (batch.x, *layer.parameters()),
        gradients,
        facts,
    )


def mpoe_name(shape: str, backend: str, masked: bool = False) -> str:
    """Name of an MPO contender."""
    return f"mpoe {shape}{', central masked' if masked else ''} [{backend}]"


def mpoe_builds(shape: str, backends: Sequence[str], masked: bool = False) -> Iterator[tuple[str, str, Build]]:
    """One build per backend, from the problems of a case; ``auto`` is the package's choice."""
    for backend in backends:

        def build(problems: Problems, backend: str = backend) -> tuple[Contender, Truth]:
            problem = problems.of(shape)
            return mpo_experts(problem, backend, masked), problem.truth

        yield mpoe_name(shape, backend, masked), "mpoe", build


def ffn_comparison(
    case: FFNCase,
    shapes: Sequence[str],
    backends: Sequence[str],
    *,
    peers: Sequence[str] = (),
    original: Sequence[str] = (),
    masked: Sequence[str] = (),
    key: str = "ffn",
) -> Comparison:
    """One case with many contenders.

    Args:
        case: sizes.
        shapes: names of MPO shapes, each measured on every backend.
        backends: backends whose contenders take part.
        peers: peers whose speed does not depend on a shape; they get the weights of the first shape.
        original: shapes on which the original's algorithm takes part.
        masked: shapes measured again with the central gradient masked.
        key: the section's key in the results.
    """
    builds: list[tuple[str, str, Build]] = [(LIMIT, "limit", lambda shared: dense_limit(case, shared.batch))]
    for name in shapes:
        builds += mpoe_builds(name, backends)
    for name in masked if case.train else ():
        builds += mpoe_builds(name, backends, masked=True)
    builds += peer_builds(peers, shapes[0])
    for shape in original:
        builds += peer_builds((ORIGINAL,), shape)
    phases = ("forward", "train") if case.train else ("forward",)
    title = f"{'decode' if key == 'decode' else 'FFN'} {case.title}"
    return Comparison(key, title, partial(Problems, case), builds, LIMIT, case.tokens, case.facts(), phases)
