"""The backends that op tests run on. What each supports is read from its table, so new kernels are
tested at once."""

import os

import pytest
import torch

from mpoe_kernels import BackendError, backend_reasons, backends
from mpoe_kernels.backends import CONTRACTIONS, Backend, Candidate, Request
from mpoe_kernels.contract import STRATEGIES, BlockDims
from mpoe_kernels.contract.autotune import resolve_contraction
from mpoe_kernels.contract.ranking import Problem
from tests.cases import SMALL_SHAPES
from tests.conftest import skip_or_fail

# ``MPOE_TEST_BACKENDS`` names other backends, as in tests/cuda/test_public_ops.py.
BACKENDS = tuple(os.environ.get("MPOE_TEST_BACKENDS", "eager native").split())
# float64 first: if a backend has it, gradients are also checked by finite differences.
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LINEAR = "grouped_mpo_linear"

on_every_backend = pytest.mark.parametrize("backend", BACKENDS)


def supports(backend, op, dtype):
    """Whether this backend has a CPU kernel for this op and dtype."""
    return not backends.BACKENDS[backend].unsupported_reasons(Request(op, "cpu", dtype))


def candidate_backend(name, kernels, reasons=lambda _: []):
    """A backend with one candidate per strategy of the ops in ``kernels``; a kernel takes a
    call."""
    ops = {phase: op for op, phase in CONTRACTIONS.items()}

    def candidates(plan):
        return [Candidate(name, plan.strategy, plan.strategy, kernels[ops[plan.phase]])]

    return Backend(name, {}, candidates=candidates, contraction_reasons=reasons)


def eager_kernel(op):
    """What the eager backend runs for a contraction."""
    from mpoe_kernels.linear.eager import linear_backward, linear_forward

    return {"forward": linear_forward, "backward": linear_backward}[CONTRACTIONS[op]]


def dtypes_of(backend, op):
    return [dtype for dtype in DTYPES if supports(backend, op, dtype)]


def require(backend, op="route", dtype=None):
    """Skip a test whose backend is missing (with ``MPOE_REQUIRE_ALL``: fail) or lacks this op or
    dtype."""
    if reasons := backend_reasons()[backend]:
        skip_or_fail(f"backend {backend} cannot run here: {'; '.join(reasons)}")
    if dtype is None and not dtypes_of(backend, op) and op != "route":
        pytest.skip(f"backend {backend} has no kernel for {op}")
    if dtype is not None and not supports(backend, op, dtype):
        pytest.skip(f"backend {backend} has no kernel for {op} in {dtype}")


def _computes(backend, phase, strategy, shape, dtype):
    dims = BlockDims.of_shape(shape)
    op = LINEAR if phase == "forward" else f"{LINEAR}_backward"
    try:
        resolve_contraction(
            Problem(op, dims, 2, 8, dtype, "cpu", backend=backend, strategy=strategy)
        )
    except BackendError:
        return False
    return True


def strategies_of(backend, shape, dtype):
    """Strategies that this backend computes, forward and backward, for a shape and dtype."""
    return [
        strategy
        for strategy in STRATEGIES
        if (strategy != "separable" or shape.is_separable)
        and all(
            _computes(backend, phase, strategy, shape, dtype) for phase in ("forward", "backward")
        )
    ]


def require_strategies(backend, shape, dtype):
    """`strategies_of`, skipping the test if there are none."""
    require(backend)
    found = strategies_of(backend, shape, dtype)
    if not found:
        pytest.skip(f"backend {backend} has no kernel for {LINEAR} of this shape in {dtype}")
    return found


def choices_of(backend, shape, dtype):
    """Strategies and, if the backend can run whatever is chosen, ``auto``.

    A training forward of separable blocks under ``auto`` always takes the strategy ``separable``.
    """
    found = strategies_of(backend, shape, dtype)
    return ["auto", *found] if found and (not shape.is_separable or "separable" in found) else found


def need_of(name, backend, dtype=torch.float32, trains=True):
    """Skip a test whose backend lacks the op of a name, of a layer or a network the linear one; or
    the strategy that blocks of bond 1 train with, if the test ``trains``."""
    if name.startswith(("hidden", "neuron", "mpo_embedding", "dispatch", "combine", "route")):
        require(backend, name, dtype)
    elif name.endswith("hidden"):
        require(backend, "hidden_experts", dtype)
    else:
        strategies = require_strategies(backend, SMALL_SHAPES["separable"], dtype)
        if trains and "separable" not in strategies and not name.endswith("paper"):
            pytest.skip(f"backend {backend} does not compute the strategy that {name} trains with")
