"""Single ops: products, routing and embedding, each against plain torch computing the dense result."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mpoe_bench.cases import expert_choice, random_blocks, relative_error, workload_shape
from mpoe_bench.contender import Contender, grad_of
from mpoe_bench.peers.dense_experts import sorted_tokens
from mpoe_bench.problem import Truth
from mpoe_bench.section import Build, Comparison
from mpoe_kernels import (
    MPOBlocks,
    MPOShape,
    combine,
    dispatch,
    grouped_mpo_linear,
    mpo_embedding,
    mpo_linear,
    route,
)
from mpoe_kernels.reference import grouped_mpo_linear_reference, mpo_embedding_reference

Tensors = dict[str, Tensor]


def _truth(function: Callable[[Tensors], Tensor], inputs: Tensors, grad_y: Tensor | None) -> Truth:
    """Result and gradients of ``function`` in float64, and the errors of the same formula in the inputs' dtype."""

    def results(dtype: torch.dtype) -> Tensors:
        leaves = {
            name: value.detach().cpu().to(dtype).requires_grad_(grad_y is not None) for name, value in inputs.items()
        }
        y = function(leaves)
        if grad_y is None:
            return {"y": y.detach()}
        y.backward(grad_y.cpu().to(dtype))
        return {"y": y.detach()} | {f"d{name}": grad_of(leaf) for name, leaf in leaves.items()}

    dtype = next(iter(inputs.values())).dtype
    exact, same = results(torch.float64), results(dtype)
    return Truth(exact, {name: relative_error(same[name], value) for name, value in exact.items()}, dtype)


def _contender(
    name: str, kind: str, function: Callable[[], Tensor], inputs: Tensors, grad_y: Tensor | None, facts: dict[str, Any]
) -> Contender:
    def gradients() -> Mapping[str, Tensor]:
        return {f"d{key}": grad_of(leaf) for key, leaf in inputs.items()}

    return Contender(name, kind, function, grad_y, tuple(inputs.values()), gradients, facts)


def linear_comparison(
    shape_names: Sequence[str],
    sizes: tuple[int, int],
    experts: int,
    tokens: int,
    dtype: torch.dtype,
    device: str,
    backends: Sequence[str],
) -> Comparison:
    """`mpo_linear` (one expert) or `grouped_mpo_linear` against one dense ``F.linear`` on the same rows."""
    torch.manual_seed(3)
    x = torch.randn(tokens, sizes[0]).to(device, dtype).requires_grad_()
    grad_y = torch.randn(tokens, sizes[1]).to(device, dtype)
    routing = route(expert_choice("uniform", tokens, experts).to(device), experts)
    op = "mpo_linear" if experts == 1 else "grouped_mpo_linear"
    dense = (torch.randn(sizes[1], sizes[0]) / sizes[0] ** 0.5).to(device, dtype).requires_grad_()
    baseline = "F.linear"

    def build_dense() -> tuple[Contender, Truth]:
        inputs = {"x": x, "weight": dense}
        truth = _truth(lambda t: F.linear(t["x"], t["weight"]), inputs, grad_y)
        return _contender(baseline, "limit", lambda: F.linear(x, dense), inputs, grad_y, {}), truth

    builds: list[tuple[str, str, Build]] = [(baseline, "limit", build_dense)]
    for shape_name in shape_names:
        shape = workload_shape(shape_name, *sizes)
        for backend in backends:
            name = f"{op} {shape_name} [{backend}]"

            def build(
                shape: MPOShape = shape, name: str = name, shape_name: str = shape_name, backend: str = backend
            ) -> tuple[Contender, Truth]:
                found = random_blocks(shape, experts, dtype)
                parts = {k: getattr(found, k).to(device).requires_grad_() for k in ("left", "central", "right")}
                blocks = MPOBlocks(**parts, in_features=sizes[0], out_features=sizes[1], shape=shape)
                offsets, rows = routing.expert_offsets, routing.token_of_slot

                def reference(t: Tensors) -> Tensor:
                    mine = MPOBlocks(t["left"], t["central"], t["right"], sizes[0], sizes[1])
                    return grouped_mpo_linear_reference(t["x"], mine, offsets.cpu(), row_index=rows.cpu())

                def function() -> Tensor:
                    if experts == 1:
                        return mpo_linear(x, blocks, backend=backend)
                    return grouped_mpo_linear(x, blocks, offsets, row_index=rows, backend=backend)

                inputs = {"x": x, **parts}
                facts = {"shape": shape_name, "backend": backend}
                return _contender(name, "mpoe", function, inputs, grad_y, facts), _truth(reference, inputs, grad_y)

            builds.append((name, "mpoe", build))
    dtype_name = str(dtype).split(".")[-1]
    title = f"op {op} {sizes[0]}x{sizes[1]} E={experts} T={tokens} {dtype_name}"
    facts = {"experts": experts, "tokens": tokens, "dtype": dtype_name, "model": sizes[0], "hidden": sizes[1]}
    return Comparison("op", title, builds, baseline, tokens, facts)


def routing_comparison(width: int, experts: int, tokens: int, top_k: int, device: str) -> Comparison:
    """`route` + `dispatch` + `combine` against argsort, indexing and index_add; the result is the gated sum of x."""
    torch.manual_seed(4)
    x = torch.randn(tokens, width, device=device).requires_grad_()
    grad_y = torch.randn(tokens, width, device=device)
    index = expert_choice("uniform", tokens, experts, top_k).to(device)
    gates = torch.rand(tokens, top_k, device=device)

    def plain(x: Tensor, gates: Tensor) -> Tensor:
        order, inverse, _ = sorted_tokens(index.reshape(-1), experts)
        rows = x[order // top_k]
        return (rows[inverse].view(tokens, top_k, width) * gates[:, :, None]).sum(1)

    def ours() -> Tensor:
        routing = route(index, experts)
        return combine(dispatch(x, routing), routing, gates)

    truth = _truth(lambda t: t["x"] * gates.cpu().to(t["x"].dtype).sum(1, keepdim=True), {"x": x}, grad_y)
    baseline = "argsort + indexing"
    facts = {"experts": experts, "tokens": tokens, "top_k": top_k}
    builds: list[tuple[str, str, Build]] = [
        (
            baseline,
            "peer",
            lambda: (_contender(baseline, "limit", lambda: plain(x, gates), {"x": x}, grad_y, {}), truth),
        ),
        (
            "route + dispatch + combine",
            "mpoe",
            lambda: (_contender("route + dispatch + combine", "mpoe", ours, {"x": x}, grad_y, {}), truth),
        ),
    ]
    title = f"op routing [{tokens}, {width}] E={experts} K={top_k}"
    return Comparison("op", title, builds, baseline, tokens, facts)


def embedding_comparison(
    vocabulary: int, width: int, bonds: Sequence[int | None], tokens: int, device: str, backends: Sequence[str]
) -> Comparison:
    """`mpo_embedding` against ``F.embedding`` of the full table."""
    torch.manual_seed(5)
    ids = torch.randint(vocabulary, (tokens,), device=device)
    grad_y = torch.randn(tokens, width, device=device)
    table = torch.randn(vocabulary, width, device=device).requires_grad_()
    baseline = "F.embedding"

    def build_table() -> tuple[Contender, Truth]:
        truth = _truth(lambda t: F.embedding(ids.cpu(), t["table"]), {"table": table}, grad_y)
        return _contender(baseline, "limit", lambda: F.embedding(ids, table), {"table": table}, grad_y, {}), truth

    builds: list[tuple[str, str, Build]] = [(baseline, "limit", build_table)]
    for bond in bonds:
        shape = MPOShape.paper(vocabulary, width, max_bond=bond)
        for backend in backends:
            name = f"mpo_embedding {'full bonds' if bond is None else f'bond {bond}'} [{backend}]"

            def build(shape: MPOShape = shape, name: str = name, backend: str = backend) -> tuple[Contender, Truth]:
                found = random_blocks(shape, 1, torch.float32)
                parts = {k: getattr(found, k).to(device).requires_grad_() for k in ("left", "central", "right")}
                blocks = MPOBlocks(**parts, in_features=vocabulary, out_features=width, shape=shape)

                def reference(t: Tensors) -> Tensor:
                    mine = MPOBlocks(t["left"], t["central"], t["right"], vocabulary, width)
                    return mpo_embedding_reference(ids.cpu(), mine)

                def function() -> Tensor:
                    return mpo_embedding(ids, blocks, backend=backend)

                facts = {"backend": backend, "parameters": shape.parameters()}
                return _contender(name, "mpoe", function, parts, grad_y, facts), _truth(reference, parts, grad_y)

            builds.append((name, "mpoe", build))
    title = f"op embedding {vocabulary}x{width} T={tokens}"
    return Comparison("op", title, builds, baseline, tokens, {"tokens": tokens})
