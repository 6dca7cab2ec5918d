"""On a GPU nothing waits for the device unless it is named: choices for many problems, and the calls themselves."""

from __future__ import annotations

import warnings
from dataclasses import replace
from itertools import product

import pytest
import torch
from mpoe_bench.cases import workload_shape
from mpoe_bench.gpu_cases import Case, cases
from torch.utils._python_dispatch import TorchDispatchMode

from mpoe_kernels.backends import BACKENDS, Request, select
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
def test_experts_and_routing_have_kernels_for_every_size() -> None:
    ops = ["hidden_experts", "neuron_experts", "dispatch", "combine"]
    ops += ["route", *(f"{op}_backward" for op in ops)]
    for op, dtype, size in product(ops, (torch.float32, torch.float16, torch.bfloat16), (1, 64, 100, 1024, 4096)):
        chosen = select(Request(op, "cuda:0", dtype, {"block": size, "neurons": size}))
        assert chosen is BACKENDS["triton"].kernels[op]


@pytest.mark.parametrize("top_k", [1, 2, 8])
@pytest.mark.parametrize(
    "case", cases((768,)), ids=lambda case: f"{case.shape}-{case.experts}{'-masked' * case.masked}"
)
def test_layers_run_on_tensors_without_memory(case: Case, top_k: int) -> None:
    """Forward and backward, decoding and training: what reads a number from such a tensor raises an error."""
    pytest.importorskip("triton")
    from shipped_kernels import as_on_gpu

    layer = replace(case, top_k=top_k).layer("meta")
    for tokens, dtype in product((1, 64, 4096), (torch.bfloat16, torch.float32)):
        x = torch.empty(tokens, 768, dtype=dtype, device="meta", requires_grad=True)
        with as_on_gpu("sm_90", timed=True), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nothing balances the experts of a single layer
            with torch.no_grad():
                layer.to(dtype).eval()(x)
            y = layer.train()(x)
            y.backward(torch.empty_like(y))


def test_tensors_without_memory_refuse_to_be_read() -> None:
    with pytest.raises(RuntimeError, match="meta"):
        torch.empty(2, dtype=torch.int32, device="meta").tolist()


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
    shape = SMALL_SHAPES["separable" if strategy == "separable" else "padded"]
    problem = Product(shape, gathered=gather, activation="gelu")
    with NothingIsRead():
        problem.results(strategy)
