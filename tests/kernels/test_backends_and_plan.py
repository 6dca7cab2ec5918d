"""The registry's reasons, the planner's choices, and the memory promise."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mpoe_kernels import (
    BackendError,
    MPOShape,
    available_backends,
    backend_reasons,
    grouped_mpo_linear,
    plan_contraction,
    use_backend,
)
from mpoe_kernels.backends import registry
from mpoe_kernels.testing.cases import SMALL_SHAPES, random_blocks


@pytest.fixture
def broken_backend(monkeypatch: pytest.MonkeyPatch) -> registry.Backend:
    backend = registry.Backend(
        "broken",
        kernels={},
        unavailable_reasons=lambda: ["it needs a device that is not here"],
        request_reasons=lambda request: [f"it cannot take {request.dtype}"],
    )
    monkeypatch.setitem(registry._BACKENDS, "broken", backend)
    return backend


def run(**options: object) -> torch.Tensor:
    blocks = random_blocks(SMALL_SHAPES["light"], 2)
    return grouped_mpo_linear(torch.ones(3, 12, dtype=torch.float64), blocks, torch.tensor([0, 1, 3]), **options)


def test_eager_is_always_there() -> None:
    assert "eager" in available_backends()
    assert backend_reasons()["eager"] == []
    with use_backend("eager"):
        assert run().shape == (3, 12)


def test_a_named_backend_answers_with_all_reasons_and_never_falls_back(broken_backend: registry.Backend) -> None:
    assert "broken" not in available_backends()
    assert backend_reasons()["broken"] == ["it needs a device that is not here"]
    with pytest.raises(BackendError) as caught:
        run(backend="broken")
    for reason in ("needs a device", "no kernel for grouped_mpo_linear", "cannot take torch.float64"):
        assert reason in str(caught.value)
    with pytest.raises(BackendError, match="needs a device"), use_backend("broken"):
        raise AssertionError("not reached")
    assert run().shape == (3, 12), "the automatic choice passes it over"


def test_the_cheapest_backend_is_chosen_and_backward_follows_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    eager = registry._BACKENDS["eager"]

    def logged(name: str):
        return lambda *args: (calls.append(name), eager.kernels[name](*args))[1]

    cheap = registry.Backend("cheap", {k: logged(k) for k in eager.kernels}, predicted_seconds=lambda _: 0.0)
    monkeypatch.setitem(registry._BACKENDS, "cheap", cheap)
    run()
    assert calls == ["grouped_mpo_linear"]
    calls.clear()
    with use_backend("eager"):
        run()
    assert calls == []
    blocks = random_blocks(SMALL_SHAPES["light"], 1, requires_grad=True)
    with use_backend("cheap"):
        y = grouped_mpo_linear(torch.ones(3, 12, dtype=torch.float64), blocks, torch.tensor([0, 3]))
    with use_backend("eager"):
        y.sum().backward()  # backward stays with the backend that ran forward
    assert calls == ["grouped_mpo_linear", "grouped_mpo_linear_backward"]


def test_no_backend_at_all_lists_everyone(monkeypatch: pytest.MonkeyPatch, broken_backend: registry.Backend) -> None:
    monkeypatch.delitem(registry._BACKENDS, "eager")
    with pytest.raises(BackendError, match=r"no backend can run .*broken: it needs a device"):
        run()


def test_names_are_taken_once_and_checked() -> None:
    with pytest.raises(ValueError, match="already taken"):
        registry.register_backend(registry.Backend("eager", {}))
    with pytest.raises(ValueError, match="backend must be one of"), use_backend("nonsense"):
        raise AssertionError("not reached")


def test_plan_is_printable_and_follows_the_sizes() -> None:
    full = MPOShape.paper(768, 3072)
    plan = plan_contraction(full, num_experts=8, num_tokens=2048, training=True)
    assert plan.strategy == "rebuild"
    assert plan.temporary_bytes == 2 * 768 * 3072 * 4
    assert "rebuild" in str(plan)
    assert "chain" in str(plan)
    masked = plan_contraction(full, 8, 2048, training=True, mask_central=True)
    assert masked.flops < plan.flops
    separable = plan_contraction(MPOShape.separable(768, 3072), 8, 2048)
    assert separable.strategy == "separable"
    assert separable.flops / separable.dense_flops == pytest.approx(1 + 256 / 3072 + 64 / 768)
    low = MPOShape.paper(768, 3072, max_bond=8)
    assert plan_contraction(low, 64, 64).strategy == "chain"
    assert plan_contraction(full, 1, 100_000).strategy == "rebuild"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((8, 0, 4), "num_experts must be at least 1"), ((8, 2, -1), "num_tokens must be at least 0")],
)
def test_plan_refusals(arguments: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_contraction(MPOShape.paper(arguments[0], arguments[0]), *arguments[1:])
    with pytest.raises(TypeError, match="shape must be an MPOShape"):
        plan_contraction("paper", 1, 1)  # type: ignore[arg-type]


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that ops created and that are still alive; ``inputs`` do not count."""

    def __init__(self, *inputs: torch.Tensor) -> None:
        super().__init__()
        self.alive: dict[int, int] = {t.untyped_storage()._cdata: 0 for t in inputs}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                key = storage._cdata
                if key not in self.alive:
                    self.alive[key] = storage.nbytes()
                    weakref.finalize(storage, self.alive.pop, key, None)
        self.peak = max(self.peak, sum(self.alive.values()))
        return out


@pytest.mark.parametrize("experts", [2, 12])
def test_at_most_two_rebuilt_weights_are_alive(experts: int) -> None:
    """Peak of forward and backward kernels beyond inputs and results: two weights, whatever E is."""
    from mpoe_kernels.backends.eager.linear import linear_backward, linear_forward

    shape = MPOShape((4, 4, 4), (4, 8, 4))
    blocks = random_blocks(shape, experts, torch.float32)
    x = torch.randn(experts, shape.in_features)
    offsets = torch.arange(experts + 1, dtype=torch.int32)
    weight_bytes = shape.in_features * shape.out_features * 4
    sizes = (shape.in_features, shape.out_features)
    gc.collect()
    given = (x, blocks.left, blocks.central, blocks.right, offsets)
    with LiveBytes(*given) as forward:
        y, h, saved = linear_forward(
            x, blocks.left, blocks.central, blocks.right, offsets, None, None, *sizes, "none", "rebuild", True
        )
    assert forward.peak <= y.nbytes + 2 * weight_bytes + 4096
    grad = torch.ones_like(y)
    with LiveBytes(*given, grad) as backward:
        grads = linear_backward(
            *(grad, x, blocks.left, blocks.central, blocks.right, offsets, None, h, saved),
            *(*sizes, "none", "rebuild", [True] * 5),
        )
    results = sum(g.nbytes for g in grads)
    one_expert = sum(g[0].nbytes for g in (grads[1], grads[3])) + 2 * grads[2].nbytes
    assert backward.peak <= results + one_expert + y.nbytes + 2 * weight_bytes + 4096
