"""Single ops: products, routing and embedding, each against plain torch computing the dense result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mpoe_bench.cases import expert_choice, random_blocks, workload_shape
from mpoe_bench.contender import Build, Comparison, Contender
from mpoe_bench.peers.dense_experts import sorted_tokens
from mpoe_bench.problem import Truth, grad_of
from mpoe_kernels import MPOBlocks, MPOShape, combine, dispatch, grouped_mpo_linear, mpo_embedding, mpo_linear, route
from mpoe_kernels.reference import grouped_mpo_linear_reference, mpo_embedding_reference

Tensors = dict[str, Tensor]
Formula = Callable[[Tensors], Tensor]


def _built(formula: Formula, truth: Formula, leaves: Tensors, grad_y: Tensor, **facts: Any) -> tuple[Contender, Truth]:
    """A contender of ``formula``, and the results and gradients of ``truth`` in float64 and in the leaves' dtype."""

    def results(dtype: torch.dtype) -> Tensors:
        own = {name: value.detach().cpu().to(dtype).requires_grad_() for name, value in leaves.items()}
        y = truth(own)
        y.backward(grad_y.cpu().to(dtype))
        return {"y": y.detach()} | {f"d{name}": grad_of(leaf) for name, leaf in own.items()}

    contender = Contender(
        lambda: formula(leaves),
        grad_y,
        tuple(leaves.values()),
        lambda: {f"d{name}": grad_of(leaf) for name, leaf in leaves.items()},
        facts,
    )
    return contender, Truth.of(results, next(iter(leaves.values())).dtype)


def _parts(shape: MPOShape, experts: int, dtype: torch.dtype, device: str) -> Tensors:
    blocks = random_blocks(shape, experts, dtype)
    return {name: getattr(blocks, name).to(device).requires_grad_() for name in ("left", "central", "right")}


def _blocks(parts: Tensors, shape: MPOShape) -> MPOBlocks:
    return MPOBlocks(parts["left"], parts["central"], parts["right"], shape.in_features, shape.out_features, shape)


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
    op = "mpo_linear" if experts == 1 else "grouped_mpo_linear"
    baseline = "F.linear"

    def context() -> Any:
        torch.manual_seed(3)
        x, grad_y = (torch.randn(tokens, size).to(device, dtype) for size in sizes)
        return x.requires_grad_(), grad_y, route(expert_choice("uniform", tokens, experts).to(device), experts)

    def dense(shared: Any) -> tuple[Contender, Truth]:
        x, grad_y, _ = shared
        weight = (torch.randn(sizes[1], sizes[0]) / sizes[0] ** 0.5).to(device, dtype).requires_grad_()

        def formula(t: Tensors) -> Tensor:
            return F.linear(t["x"], t["weight"])

        return _built(formula, formula, {"x": x, "weight": weight}, grad_y)

    def ours(shared: Any, shape_name: str, backend: str) -> tuple[Contender, Truth]:
        (x, grad_y, routing), shape = shared, workload_shape(shape_name, *sizes)
        offsets, rows = routing.expert_offsets, routing.token_of_slot

        def formula(t: Tensors) -> Tensor:
            if experts == 1:
                return mpo_linear(t["x"], _blocks(t, shape), backend=backend)
            return grouped_mpo_linear(t["x"], _blocks(t, shape), offsets, row_index=rows, backend=backend)

        def truth(t: Tensors) -> Tensor:
            return grouped_mpo_linear_reference(t["x"], _blocks(t, shape), offsets.cpu(), row_index=rows.cpu())

        leaves = {"x": x, **_parts(shape, experts, dtype, device)}
        return _built(formula, truth, leaves, grad_y, shape=shape_name, backend=backend)

    builds: list[tuple[str, str, Build]] = [(baseline, "limit", dense)]
    for name in shape_names:
        for backend in backends:
            builds.append((f"{op} {name} [{backend}]", "mpoe", partial(ours, shape_name=name, backend=backend)))
    dtype_name = str(dtype).split(".")[-1]
    title = f"op {op} {sizes[0]}x{sizes[1]} E={experts} T={tokens} {dtype_name}"
    facts = {"experts": experts, "tokens": tokens, "dtype": dtype_name, "model": sizes[0], "hidden": sizes[1]}
    return Comparison("op", title, context, builds, baseline, tokens, facts)


def routing_comparison(width: int, experts: int, tokens: int, top_k: int, device: str) -> Comparison:
    """`route` + `dispatch` + `combine` against argsort, indexing and index_add; the result is the gated sum of x."""

    def context() -> Any:
        torch.manual_seed(4)
        x, grad_y = (torch.randn(tokens, width, device=device) for _ in range(2))
        index = expert_choice("uniform", tokens, experts, top_k).to(device)
        return x.requires_grad_(), grad_y, index, torch.rand(tokens, top_k, device=device)

    def build(shared: Any, formula: Callable[[Tensor, Tensor, Tensor], Tensor]) -> tuple[Contender, Truth]:
        x, grad_y, index, gates = shared

        def truth(t: Tensors) -> Tensor:
            return t["x"] * gates.cpu().to(t["x"].dtype).sum(1, keepdim=True)

        return _built(lambda t: formula(t["x"], index, gates), truth, {"x": x}, grad_y)

    def plain(x: Tensor, index: Tensor, gates: Tensor) -> Tensor:
        order, inverse, _ = sorted_tokens(index.reshape(-1), experts)
        rows = x[order // top_k]
        return (rows[inverse].view(tokens, top_k, width) * gates[:, :, None]).sum(1)

    def ours(x: Tensor, index: Tensor, gates: Tensor) -> Tensor:
        routing = route(index, experts)
        return combine(dispatch(x, routing), routing, gates)

    baseline = "argsort + indexing"
    builds: list[tuple[str, str, Build]] = [
        (baseline, "peer", lambda shared: build(shared, plain)),
        ("route + dispatch + combine", "mpoe", lambda shared: build(shared, ours)),
    ]
    facts = {"experts": experts, "tokens": tokens, "top_k": top_k}
    title = f"op routing [{tokens}, {width}] E={experts} K={top_k}"
    return Comparison("op", title, context, builds, baseline, tokens, facts)


def embedding_comparison(
    vocabulary: int, width: int, bonds: Sequence[int | None], tokens: int, device: str, backends: Sequence[str]
) -> Comparison:
    """`mpo_embedding` against ``F.embedding`` of the full table."""
    baseline = "F.embedding"

    def context() -> Any:
        torch.manual_seed(5)
        return torch.randint(vocabulary, (tokens,), device=device), torch.randn(tokens, width, device=device)

    def table(shared: Any) -> tuple[Contender, Truth]:
        ids, grad_y = shared
        leaves = {"table": torch.randn(vocabulary, width, device=device).requires_grad_()}
        return _built(
            lambda t: F.embedding(ids, t["table"]), lambda t: F.embedding(ids.cpu(), t["table"]), leaves, grad_y
        )

    def ours(shared: Any, bond: int | None, backend: str) -> tuple[Contender, Truth]:
        (ids, grad_y), shape = shared, MPOShape.paper(vocabulary, width, max_bond=bond)
        return _built(
            lambda t: mpo_embedding(ids, _blocks(t, shape), backend=backend),
            lambda t: mpo_embedding_reference(ids.cpu(), _blocks(t, shape)),
            _parts(shape, 1, torch.float32, device),
            grad_y,
            backend=backend,
            parameters=shape.parameters(),
        )

    builds: list[tuple[str, str, Build]] = [(baseline, "limit", table)]
    for bond in bonds:
        for backend in backends:
            name = f"mpo_embedding {'full bonds' if bond is None else f'bond {bond}'} [{backend}]"
            builds.append((name, "mpoe", partial(ours, bond=bond, backend=backend)))
    title = f"op embedding {vocabulary}x{width} T={tokens}"
    return Comparison("op", title, context, builds, baseline, tokens, {"tokens": tokens})
