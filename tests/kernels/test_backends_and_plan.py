"""The registry's reasons, the planner's choices, the memory guarantee; ``python -m
mpoe_kernels.info``."""

import gc
import json
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from mpoe_bench.cases import random_blocks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mpoe_kernels import (
    BackendError,
    MPOShape,
    available_backends,
    backend_reasons,
    backends,
    grouped_mpo_linear,
    info,
    plan_contraction,
    use_backend,
)
from mpoe_kernels.contract import BlockDims, Contraction
from mpoe_kernels.contract.kept import processor_name
from mpoe_kernels.contract.orders import merge_flops
from mpoe_kernels.contract.plan import candidate_strategies
from mpoe_kernels.contract.program import ALL_GRADIENTS
from mpoe_kernels.cuda_library import RefusingOps
from mpoe_kernels.define import requested_backend
from mpoe_kernels.linear.eager import linear_backward, linear_forward
from mpoe_kernels.linear.op import BackwardCall, ForwardCall
from mpoe_kernels.native_library import INFO_KEYS, NATIVE_LIBRARY
from mpoe_kernels.triton import architecture
from tests.assertions import in_threads, refuses
from tests.cases import SMALL_SHAPES

from .backend_cases import candidate_backend, eager_kernel


@pytest.fixture
def broken_backend(monkeypatch):
    backend = backends.Backend(
        "broken",
        kernels={},
        unavailable_reasons=lambda: ["it needs a device that is not here"],
        request_reasons=lambda request: [f"it cannot take {request.dtype}"],
    )
    monkeypatch.setitem(backends.BACKENDS, "broken", backend)
    return backend


def run(**options):
    blocks = random_blocks(SMALL_SHAPES["light"], 2)
    return grouped_mpo_linear(
        torch.ones(3, 12, dtype=torch.float64), blocks, torch.tensor([0, 1, 3]), **options
    )


def test_a_named_backend_answers_with_all_reasons_and_never_falls_back(broken_backend):
    assert "broken" not in available_backends()
    assert backend_reasons()["broken"] == ["it needs a device that is not here"]
    with pytest.raises(BackendError) as caught:
        run(backend="broken")
    for reason in (
        "needs a device",
        "no kernel for grouped_mpo_linear",
        "cannot take torch.float64",
    ):
        assert reason in str(caught.value)
    refuses(BackendError, "needs a device", use_backend("broken").__enter__)
    assert run().shape == (3, 12), "the automatic choice passes it over"


def test_the_preferred_backend_is_chosen_and_backward_follows_the_context(monkeypatch):
    calls = []

    def logged(name):
        return lambda *args: (calls.append(name), eager_kernel(name)(*args))[1]

    first = candidate_backend("first", {op: logged(op) for op in backends.CONTRACTIONS})
    monkeypatch.setitem(backends.BACKENDS, "first", first)
    run()
    assert calls == [], "one that is not in the list of preferred ones runs only if it is named"
    monkeypatch.setitem(
        backends.BACKENDS, "first", replace(first)
    )  # another one: nothing is remembered of it
    monkeypatch.setitem(backends.PREFERRED, "cpu", ("first", "eager"))
    run()
    assert calls == ["grouped_mpo_linear"]
    calls.clear()
    with use_backend("eager"):
        run()
    assert calls == []
    blocks = random_blocks(SMALL_SHAPES["light"], 1, requires_grad=True)
    with use_backend("first"):
        y = grouped_mpo_linear(torch.ones(3, 12, dtype=torch.float64), blocks, torch.tensor([0, 3]))
    with use_backend("eager"):
        y.sum().backward()  # backward stays with the backend that ran forward
    assert calls == ["grouped_mpo_linear", "grouped_mpo_linear_backward"]


def test_backend_and_strategy_are_chosen_together(monkeypatch):
    """Fewest FLOPs on the preferred backend, forward and backward independently; naming a strategy
    forces both."""
    calls = []

    def logged(op):
        return lambda call: (calls.append((op, call.strategy)), eager_kernel(op)(call))[1]

    picky = candidate_backend(
        "picky",
        {op: logged(op) for op in backends.CONTRACTIONS},
        reasons=lambda plan: ["it only rebuilds backward"] if plan.phase == "backward" else [],
    )
    monkeypatch.setitem(backends.BACKENDS, "picky", picky)
    monkeypatch.setitem(backends.PREFERRED, "cpu", ("picky", "eager"))
    fewest = plan_contraction(SMALL_SHAPES["light"], 1, 4, torch.float64).strategy
    blocks = random_blocks(SMALL_SHAPES["light"], 1, requires_grad=True)
    x = torch.ones(3, 12, dtype=torch.float64)
    y = grouped_mpo_linear(x, blocks, torch.tensor([0, 3]))
    y.sum().backward()
    assert calls == [("grouped_mpo_linear", fewest)], "backward went to eager"
    calls.clear()
    grouped_mpo_linear(x, blocks, torch.tensor([0, 3]), strategy="rebuild")
    assert calls == [("grouped_mpo_linear", "rebuild")]
    y = grouped_mpo_linear(x, blocks, torch.tensor([0, 3]), backend="picky")
    with pytest.raises(
        BackendError,
        match="backend 'picky' cannot run grouped_mpo_linear_backward: it only rebuilds",
    ):
        y.sum().backward()


def test_use_backend_holds_in_its_thread_alone():
    seen = []
    with use_backend("eager"):
        seen += in_threads(1, lambda _: requested_backend(None))
        with use_backend("auto"):
            seen.append(requested_backend(None))
        seen.append(requested_backend(None))
    assert seen == ["auto", "auto", "eager"]
    with pytest.raises(RuntimeError, match="stop"), use_backend("eager"):
        raise RuntimeError("stop")
    assert requested_backend(None) == "auto"


def test_compiled_graphs_follow_use_backend(monkeypatch):
    """Inside a graph and around it: torch.compile guards on the setting at tracing time."""
    calls = []
    kernel = eager_kernel("grouped_mpo_linear")
    kernels = {"grouped_mpo_linear": lambda *args: (calls.append("slow"), kernel(*args))[1]}
    monkeypatch.setitem(backends.BACKENDS, "slow", candidate_backend("slow", kernels))
    blocks = random_blocks(SMALL_SHAPES["light"], 2)
    x, offsets = torch.ones(3, 12, dtype=torch.float64), torch.tensor([0, 1, 3])

    def inside():
        with use_backend("slow"):
            y = grouped_mpo_linear(x, blocks, offsets)
        return y + grouped_mpo_linear(x, blocks, offsets)

    assert torch.compile(inside, fullgraph=True, backend="aot_eager")().shape == (3, 12)
    assert calls == ["slow"]
    around = torch.compile(
        lambda: grouped_mpo_linear(x, blocks, offsets), fullgraph=True, backend="aot_eager"
    )
    around()
    with use_backend("slow"):
        around()
    around()
    assert calls == ["slow", "slow"]


def test_no_backend_at_all_lists_everyone(monkeypatch, broken_backend):
    # A copy: an item that is deleted and set again would be last in every later test.
    others = {name: backend for name, backend in backends.BACKENDS.items() if name != "eager"}
    monkeypatch.setattr(backends, "BACKENDS", others)
    monkeypatch.setitem(backends.PREFERRED, "cpu", ("native", "broken", "eager"))
    refuses(BackendError, r"no backend can run .*broken: it needs a device", run)


def test_names_are_taken_once_and_checked():
    refuses(ValueError, "already taken", backends.register_backend, backends.Backend("eager", {}))
    refuses(ValueError, "backend must be one of", use_backend("nonsense").__enter__)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of live storages that ops created; ``inputs`` do not count."""

    def __init__(self, *inputs):
        super().__init__()
        self.alive = {t.untyped_storage()._cdata: 0 for t in inputs}
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
def test_at_most_two_rebuilt_weights_are_alive(experts):
    """Peak memory of forward and backward kernels beyond inputs and results: two weights, for any
    E."""
    shape = MPOShape((4, 4, 4), (4, 8, 4))
    blocks = random_blocks(shape, experts, torch.float32)
    x = torch.randn(experts, shape.in_features)
    offsets = torch.arange(experts + 1, dtype=torch.int32)
    weight_bytes = shape.in_features * shape.out_features * 4
    gc.collect()
    given = (x, blocks.left, blocks.central, blocks.right, offsets)
    common = (*given, None, None, shape.in_features, shape.out_features, "none", "rebuild", "eager")
    with LiveBytes(*given) as forward:
        y, h, saved = linear_forward(ForwardCall(*common, save=True))
    assert forward.peak <= y.nbytes + 2 * weight_bytes + 4096
    grad = torch.ones_like(y)
    with LiveBytes(*given, grad) as backward:
        grads = linear_backward(BackwardCall(*common, grad, h, saved, need=[True] * 5))
    results = sum(g.nbytes for g in grads)
    one_expert = sum(g[0].nbytes for g in (grads[1], grads[3])) + 2 * grads[2].nbytes
    assert backward.peak <= results + one_expert + y.nbytes + 2 * weight_bytes + 4096


class Flops(TorchDispatchMode):
    """Counts those of matrix products."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("mm", "addmm_", "bmm"):
            self.count += 2 * args[-2].numel() * args[-1].shape[-1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", SMALL_SHAPES)
def test_eager_computes_the_products_that_are_counted(name):
    """Once each, but for the half of `rebuild`, which a backward that needs x's gradient too builds
    twice."""
    shape, experts, slots = SMALL_SHAPES[name], 3, 12
    dims, blocks = BlockDims.of_shape(shape), random_blocks(shape, experts)
    x, offsets = (
        torch.randn(slots, shape.in_features, dtype=torch.float64),
        torch.tensor([0, 4, 8, 12]),
    )
    given = (
        x,
        blocks.left,
        blocks.central,
        blocks.right,
        offsets,
        None,
        None,
        shape.in_features,
        shape.out_features,
    )
    for strategy in candidate_strategies(dims):
        for need in (
            ALL_GRADIENTS,
            (True, True, False, True),
            (False, True, True, False),
            (False, False, False, True),
        ):
            with Flops() as forward:
                y, h, z = linear_forward(ForwardCall(*given, "none", strategy, "eager", save=True))
            with Flops() as backward:
                linear_backward(
                    BackwardCall(*given, "none", strategy, "eager", y, h, z, need=[*need, False])
                )
            again = 0
            if strategy == "rebuild" and need[0] and need[3 if dims.left_first else 1]:
                again = experts * merge_flops(dims, *("LC" if dims.left_first else "CR"))
            for phase, found, more in (("forward", forward, 0), ("backward", backward, again)):
                plan = Contraction(strategy, dims, experts, slots, x.dtype, phase, need)
                assert found.count == plan.flops + more, (strategy, need, phase)


def test_what_a_compiled_kernel_refuses_is_a_value_error():
    """PyTorch turns it into a RuntimeError that starts with a source file's path."""

    def kernel(message):
        raise RuntimeError(message)

    ops = RefusingOps(SimpleNamespace(kernel=kernel))
    refuses(
        ValueError,
        r"^x must be dense$",
        ops.kernel,
        "somewhere.cpp:12: mpoe refuses: x must be dense",
    )
    refuses(RuntimeError, "out of memory", ops.kernel, "out of memory")


# ------------------------------------------------------------------ info


def test_facts_are_those_of_this_process():
    facts = info.collect()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["backends"] == backend_reasons()
    assert facts["torch_threads"] == torch.get_num_threads()
    assert facts["packages"]["torch"] == info.installed_version("torch")
    assert (facts["native"] is None) == bool(NATIVE_LIBRARY.reasons)
    assert facts["processor"] == processor_name()
    if facts["native"]:
        assert facts["native"].keys() >= INFO_KEYS
        assert facts["native"]["isa_used"] in facts["native"]["isa_compiled"].split()


def test_text_names_every_fact_and_every_reason():
    facts = info.collect(("torch", "no-such-package"))
    facts["backends"] = {"eager": [], "abacus": ["its beads are gone", "it has no frame"]}
    text = info.show(facts)
    for expected in (
        facts["mpoe"],
        facts["python"],
        torch.__version__.split("+")[0],
        "not installed",
        "cpu",
    ):
        assert expected in text
    assert "  eager           yes\n  abacus          no\n" in text
    assert "its beads are gone" in text
    assert "it has no frame" in text


def test_where_choices_are_kept(monkeypatch, tmp_path):
    facts = info.collect()
    assert facts["choices"] is None
    assert "by FLOPs alone (MPOE_AUTOTUNE=0)" in info.show(facts)
    monkeypatch.delenv("MPOE_AUTOTUNE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    facts = info.collect()
    assert facts["choices"] == str(tmp_path / "mpoe/choices.json")
    assert facts["choices"] in info.show(facts)


def test_native_summary():
    built = {
        "compiler": "gcc 12",
        "torch": "any",
        "isa_compiled": "generic avx2 avx512",
        "isa_detected": "avx512",
    }
    assert info.native_summary(None).startswith("no")
    assert info.native_summary({**built, "isa_used": "avx512"}) == (
        "built by gcc 12 for any torch; instructions: avx512 found of generic, avx2, avx512 "
        "compiled"
    )
    assert info.native_summary({**built, "isa_used": "avx2"}).endswith("avx2 in use (MPOE_CPU_ISA)")


def test_command_as_json_and_text(capsys, monkeypatch):
    info.main(["--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["mpoe"] == info.__version__
    assert set(facts["backends"]) == set(backend_reasons())
    monkeypatch.setattr(architecture, "triton_installed", lambda: False)
    architecture.triton_reasons.cache_clear()
    info.main([])
    architecture.triton_reasons.cache_clear()
    text = capsys.readouterr().out
    assert facts["mpoe"] in text
    answer, reason = text[
        text.index("  triton          ", text.index("kernel backends")) :
    ].splitlines()[:2]
    assert answer.endswith("no")
    assert "triton" in reason.lower()
