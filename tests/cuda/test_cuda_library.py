"""The compiled library: which GPUs it runs on, what it reports if it cannot run, and what it
offers."""

import re
from pathlib import Path

import pytest
import torch
from mpoe_bench.cases import workload_shape

from mpoe_kernels import BackendError, backend_reasons, cuda_library, route, use_backend
from mpoe_kernels.backends import CUDA, TRITON, Request, select
from mpoe_kernels.compiled import CompiledLibrary, load_library, open_ops
from mpoe_kernels.contract import STRATEGIES, BlockDims, Contraction
from mpoe_kernels.contract.ranking import Problem, rank
from mpoe_kernels.cuda_library import runs_on
from mpoe_kernels.linear.cuda import LinearKernels
from mpoe_kernels.linear.grouped import ON_CHIP
from mpoe_kernels.triton import architecture
from tests.assertions import refuses

SHIPPED = "80-real 90a-real 100-real 100-virtual"


@pytest.mark.parametrize(
    "architectures, capability, runs",
    [
        (SHIPPED, (7, 5), False),
        (SHIPPED, (8, 0), True),
        (SHIPPED, (8, 9), True),
        (SHIPPED, (9, 0), True),
        (SHIPPED, (10, 0), True),
        (SHIPPED, (10, 3), True),
        (SHIPPED, (12, 0), True),
        ("90a-real", (9, 0), True),
        ("90a-real", (8, 0), False),
        ("86-real", (8, 0), False),
        ("80-real", (9, 0), False),
        ("80", (9, 0), True),
        ("90a", (10, 0), False),
        ("90a-virtual", (9, 0), True),
        ("100f-real", (10, 0), True),
        ("100f-real", (10, 3), True),
        ("100f-virtual", (12, 0), False),
        ("103f-real", (10, 0), False),
        ("120f", (12, 1), True),
        ("120f", (13, 0), False),
    ],
)
def test_which_gpus_the_code_runs_on(architectures, capability, runs):
    assert runs_on(architectures, *capability) == runs


def test_a_torch_without_cuda_does_not_open_the_library(monkeypatch, tmp_path):
    (tmp_path / cuda_library.LIBRARY).write_bytes(b"code for a GPU")
    monkeypatch.setattr(cuda_library, "FOLDER", tmp_path)
    monkeypatch.setattr(torch.version, "cuda", None)
    (reason,) = cuda_library._load().reasons
    assert "is built without CUDA" in reason


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_backend_says_so():
    assert "no CUDA device was found" in backend_reasons()["cuda"]
    refuses(BackendError, "no CUDA device", use_backend("cuda").__enter__)
    refuses(
        BackendError,
        "it runs on cuda, not on cpu",
        route,
        torch.zeros(1, 1, dtype=torch.int64),
        1,
        backend="cuda",
    )


@pytest.fixture
def cards(monkeypatch):
    """GPUs of the compute capabilities that a test puts in the list, and code for sm_90 alone."""
    capabilities = []
    library = CompiledLibrary(Path("library"), info={"architectures": "90-real"})
    monkeypatch.setattr(cuda_library, "CUDA_LIBRARY", library)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device: capabilities[device.index]
    )
    cuda_library.card_reasons.cache_clear()
    yield capabilities
    cuda_library.card_reasons.cache_clear()


def test_a_gpu_that_the_code_does_not_run_on_stops_no_other(cards):
    cards += [(9, 0), (8, 0)]
    assert cuda_library.unavailable_reasons() == []
    assert CUDA.request_reasons(Request("combine", "cuda:0", torch.float32)) == []
    reason = "it was compiled for 90-real, cuda:1 is sm_80"
    assert CUDA.request_reasons(Request("combine", "cuda:1", torch.float32)) == [reason]


def test_where_the_code_runs_on_no_gpu_each_is_named(cards):
    cards += [(8, 0), (12, 0)]
    assert cuda_library.unavailable_reasons() == [
        "it was compiled for 90-real, cuda:0 is sm_80",
        "it was compiled for 90-real, cuda:1 is sm_120",
    ]


def test_requests_of_other_devices_and_dtypes_are_refused():
    reasons = CUDA.request_reasons(Request("combine", "cpu", torch.float64))
    assert reasons == [
        "it runs on cuda, not on cpu",
        "it computes in float32, bfloat16, float16, not in float64",
    ]
    assert CUDA.request_reasons(Request("route", "cuda", torch.int64)) == []


def test_a_library_that_is_missing_or_none_gives_its_reason(tmp_path):
    path = tmp_path / "_C_cuda.abi3.so"
    (missing,) = load_library(path, open_ops("mpoe_cuda"), "_cuda_missing.txt", set()).reasons
    assert missing.startswith(f"_C_cuda.abi3.so is not in {tmp_path}")
    (tmp_path / "_cuda_missing.txt").write_text("nvcc was not found\n")
    assert load_library(path, open_ops("mpoe_cuda"), "_cuda_missing.txt", set()).reasons == (
        "it was not built: nvcc was not found",
    )
    path.write_text("not a library")
    (broken,) = load_library(path, open_ops("mpoe_cuda"), "_cuda_missing.txt", set()).reasons
    assert broken.startswith(f"{path} does not load on")


@pytest.mark.parametrize("phase", ["forward", "backward"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_weights_stay_on_chip_and_other_strategies_are_refused(strategy, phase):
    kernels = LinearKernels(None)
    shape = "separable" if strategy == "separable" else "paper_64"
    dims = BlockDims.of_shape(workload_shape(shape, 768, 3072))
    plan = Contraction(strategy, dims, 8, 64, torch.bfloat16, phase)
    reasons = kernels.contraction_reasons(plan)
    if strategy == "rebuild":
        assert reasons == []
        assert [candidate.name for candidate in kernels.candidates(plan)] == [ON_CHIP]
    else:
        instead = "take backend='auto' or 'triton', or strategy='rebuild'"
        assert reasons == [f"it computes the strategy 'rebuild' alone, not {strategy!r}; {instead}"]


def test_as_many_experts_as_a_grid_has_places():
    dims = BlockDims.of_shape(workload_shape("paper_64", 768, 3072))
    for phase, experts, refused in [
        ("forward", 65_536, []),
        ("backward", 65_535, []),
        ("backward", 65_536, ["a backward of 65536 experts is too large; at most 65535"]),
    ]:
        plan = Contraction("rebuild", dims, experts, 64, torch.bfloat16, phase)
        assert LinearKernels(None).contraction_reasons(plan) == refused, (phase, experts)


EXPERTS = ("hidden_experts", "hidden_experts_backward", "neuron_experts", "neuron_experts_backward")


@pytest.mark.parametrize("op", EXPERTS)
def test_experts_are_refused_by_name_with_what_to_take_instead(op, monkeypatch):
    for backend in (CUDA, TRITON):
        monkeypatch.setattr(backend, "unavailable_reasons", list)
    monkeypatch.setattr(
        architecture, "triton_reasons", lambda: ["not here"]
    )  # asks no device for its limits
    request = Request(op, "cuda:0", torch.bfloat16)
    instead = f"it has no kernel for {op}; take backend='auto' or 'triton' or 'eager'"
    refuses(
        BackendError,
        re.escape(f"backend 'cuda' cannot run {op}: {instead}"),
        select,
        request,
        "cuda",
    )
    assert select(request) is TRITON.kernels[op]


def test_the_fused_chain_refuses_other_strategies_by_name(monkeypatch):
    monkeypatch.setattr(CUDA, "unavailable_reasons", list)
    dims = BlockDims.of_shape(workload_shape("separable", 768, 3072))
    problem = Problem("grouped_mpo_linear", dims, 8, 64, torch.bfloat16, "cuda:0", backend="cuda")
    assert [candidate.strategy for candidate in rank(problem)] == ["rebuild"]
    refuses(
        BackendError,
        r"'cuda' cannot run .* not 'separable'; take backend='auto' or 'triton'",
        rank,
        problem._replace(keeps=True),
    )  # a forward that trains: the strategy is separable
