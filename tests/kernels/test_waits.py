"""On a GPU nothing waits for the device unless it is named: choices for many problems, and the calls themselves."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from mpoe_bench.cases import workload_shape
from torch.utils._python_dispatch import TorchDispatchMode

from mpoe_kernels.backends import BACKENDS
from mpoe_kernels.contract import STRATEGIES, BlockDims
from mpoe_kernels.contract.ranking import Problem, rank, shortlist
from mpoe_kernels.triton import architecture
from tests.cases import SMALL_SHAPES

from .test_grouped import Problem as Product

OPS = ("grouped_mpo_linear", "grouped_mpo_linear_backward")
SHAPES = ("paper_full", "paper_64", "light_64", "separable")
SIZES = ((768, 3072), (4096, 14336))
CARDS = {(8, 0): "sm_80", (8, 9): "sm_80", (9, 0): "sm_90", (10, 0): "sm_100", (12, 0): "sm_100"}


@pytest.fixture(params=CARDS, ids=str)
def card(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU with Triton and without the CUDA kernels, which PyTorch seems to have."""
    target = architecture.target_named(CARDS[request.param])
    monkeypatch.setattr(architecture, "target_of", lambda _: target)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: request.param)
    monkeypatch.setattr(BACKENDS["triton"], "unavailable_reasons", list)


@pytest.mark.usefixtures("card")
def test_what_waits_is_never_chosen() -> None:
    """480 problems for each card."""
    count = 0
    for op, shape, size, dtype in product(OPS, SHAPES, SIZES, (torch.float32, torch.float16, torch.bfloat16)):
        dims = BlockDims.of_shape(workload_shape(shape, *size))
        for experts, slots in product((1, 8, 64, 1024), (0, 1, 64, 4096, 32768)):
            able = rank(Problem(op, dims, experts, slots, dtype, "cuda:0", keeps=dims.is_separable and op == OPS[0]))
            assert able
            assert not any(candidate.waits for candidate in able)
            assert shortlist(able)
            count += 1
    assert count == 960


@pytest.mark.usefixtures("card")
def test_what_waits_runs_if_it_is_named() -> None:
    dims = BlockDims.of_shape(workload_shape("paper_64", 768, 3072))
    able = rank(Problem(OPS[0], dims, 8, 64, torch.float32, "cuda:0", backend="eager"))
    assert all(candidate.waits for candidate in able)


class NothingIsRead(TorchDispatchMode):
    """What reads a number from a tensor would wait for a GPU."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = str(function)
        assert "_local_scalar_dense" not in name, "a number is read"
        assert "nonzero" not in name, "a size depends on values"
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_calls_read_no_numbers(strategy: str, gather: bool) -> None:
    """With library products in place of grouped ones, which on a CPU do read their offsets."""
    problem = Product("separable" if strategy == "separable" else "padded", torch.float32, gather, "gelu")
    problem.x = problem.x[:, : SMALL_SHAPES["padded" if strategy != "separable" else "separable"].in_features]
    with NothingIsRead():
        problem.results(strategy)
