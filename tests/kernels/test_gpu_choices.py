"""What runs on a GPU, without one: choices that wait for nothing, cards that differ, and products
rounded to TF32."""

import warnings
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from mpoe_bench.cases import workload_shape
from mpoe_bench.layers import cases
from torch.utils._python_dispatch import TorchDispatchMode

from mpoe_kernels.backends import BACKENDS, Candidate, Request, select
from mpoe_kernels.contract import STRATEGIES, BlockDims, may_round_to_tf32
from mpoe_kernels.contract.autotune import _key
from mpoe_kernels.contract.ranking import Problem, rank, shortlist
from mpoe_kernels.triton import architecture
from tests.cases import SMALL_SHAPES, either, pairwise

from .test_ffn import Problem as Product

OPS = ("grouped_mpo_linear", "grouped_mpo_linear_backward")
SHAPES = ("paper_full", "paper_64", "light_64", "separable")
SIZES = ((768, 3072), (4096, 14336))
CARDS = {(8, 0): "sm_80", (8, 9): "sm_80", (9, 0): "sm_90", (10, 0): "sm_100", (12, 0): "sm_100"}


@pytest.fixture(params=CARDS, ids=str)
def card(request, monkeypatch):
    """A GPU with Triton and without the CUDA kernels, which PyTorch seems to have."""
    target = architecture.target_named(CARDS[request.param])
    monkeypatch.setattr(architecture, "target_of", lambda _: target)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: request.param)
    monkeypatch.setattr(BACKENDS["triton"], "unavailable_reasons", list)


@pytest.mark.usefixtures("card")
def test_what_waits_is_never_chosen():
    """960 problems for each card."""
    for op, shape, size, dtype in product(
        OPS, SHAPES, SIZES, (torch.float32, torch.float16, torch.bfloat16)
    ):
        dims = BlockDims.of_shape(workload_shape(shape, *size))
        for experts, slots in product((1, 8, 64, 1024), (0, 1, 64, 4096, 32768)):
            able = rank(
                Problem(
                    op,
                    dims,
                    experts,
                    slots,
                    dtype,
                    "cuda:0",
                    keeps=dims.is_separable and op == OPS[0],
                )
            )
            assert able
            assert not any(candidate.waits for candidate in able)
            assert shortlist(able)


def test_variants_of_a_strategy_are_timed_where_another_has_none():
    ways = {"alone": "rebuild", "first": "left_first", "second": "left_first"}
    able = [Candidate("triton", name, strategy, len) for name, strategy in ways.items()]
    assert shortlist(able) == able


@pytest.mark.usefixtures("card")
def test_experts_and_routing_have_kernels():
    ops = ["hidden_experts", "neuron_experts", "dispatch", "combine"]
    ops += ["route", *(f"{op}_backward" for op in ops)]
    for op, dtype in product(ops, (torch.float32, torch.float16, torch.bfloat16)):
        assert select(Request(op, "cuda:0", dtype)) is BACKENDS["triton"].kernels[op]


@pytest.mark.parametrize("case, top_k", pairwise(list(cases((768,))), [1, 2, 8]))
def test_layers_run_on_tensors_without_memory(case, top_k):
    """Forward and backward, decoding and training: what reads a number from such a tensor raises an
    error."""
    pytest.importorskip("triton")
    from shipped_kernels import as_on_gpu

    layer = replace(case, top_k=top_k).layer("meta")
    for tokens, dtype in product((1, 64, 4096), (torch.bfloat16, torch.float32)):
        x = torch.empty(tokens, 768, dtype=dtype, device="meta", requires_grad=True)
        with as_on_gpu("sm_90", only_ours=True), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nothing balances the experts of a single layer
            with torch.no_grad():
                layer.to(dtype).eval()(x)
            y = layer.train()(x)
            y.backward(torch.empty_like(y))


@pytest.mark.usefixtures("card")
def test_what_waits_runs_if_it_is_named_or_there_is_no_other(monkeypatch):
    dims = BlockDims.of_shape(workload_shape("paper_64", 768, 3072))
    problem = Problem(OPS[0], dims, 8, 64, torch.float32, "cuda:0")
    assert all(candidate.waits for candidate in rank(problem._replace(backend="eager")))
    monkeypatch.setattr(BACKENDS["triton"], "unavailable_reasons", lambda: ["it is not installed"])
    assert {(candidate.backend, candidate.waits) for candidate in rank(problem)} == {
        ("eager", True)
    }


class NothingIsRead(TorchDispatchMode):
    """What reads a number from a tensor would wait for a GPU."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = str(function)
        assert "_local_scalar_dense" not in name, "a number is read"
        assert "nonzero" not in name, "a size depends on values"
        return function(*arguments, **(options or {}))


@either("gather")
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_calls_read_no_numbers(strategy, gather):
    """With library products in place of grouped ones, which on a CPU do read their offsets."""
    shape = SMALL_SHAPES["separable" if strategy == "separable" else "padded"]
    problem = Product(shape, gathered=gather, activation="gelu", inverse=False)
    with NothingIsRead():
        problem.run(strategy)


NAMES = ("NVIDIA A100-SXM4-80GB", "NVIDIA B200")
CAPABILITIES = ((8, 0), (10, 0))
DIMS = BlockDims(8, 8, 64, 12, 48, 64, 8, 8, 768, 3072)


def _index(device):
    return torch.device("cuda" if device is None else device).index or 0


@pytest.fixture
def gpus(monkeypatch):
    """cuda:0 is current, cuda:1 is a different card."""
    questions = (architecture.gpu_available, architecture._gpu_architecture, architecture._gpu)

    def forget_all():
        for question in questions:
            question.cache_clear()

    def properties(device=None):
        return SimpleNamespace(
            name=NAMES[_index(device)],
            shared_memory_per_multiprocessor=1 << 18,
            shared_memory_per_block_optin=(227 if _index(device) else 163) << 10,
            multi_processor_count=148 if _index(device) else 108,
        )

    forget_all()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: NAMES[_index(device)])
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device=None: CAPABILITIES[_index(device)]
    )
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    yield
    monkeypatch.undo()
    forget_all()


def test_shared_memory(gpus, monkeypatch):
    assert architecture.target_of(torch.device("cuda:0")) == ("sm_80", 163 << 10, 108)
    assert architecture.target_of(torch.device("cuda:1")) == ("sm_100", 227 << 10, 148)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (11, 0))
    assert architecture._gpu_architecture(2) == "sm_100"


def test_a_choice_is_kept_for_its_card_alone(gpus):
    arguments = ("grouped_mpo_linear", DIMS, 8, 64, torch.bfloat16)
    first, second = (_key(Problem(*arguments, f"cuda:{index}")) for index in (0, 1))
    assert NAMES[0] in first
    assert NAMES[1] in second


class OnSecondGpu(torch.Tensor):
    """A tensor that says it is on cuda:1."""

    def get_device(self):
        return 1


def on_gpu(*size):
    return torch.empty(size, dtype=torch.bfloat16).as_subclass(OnSecondGpu)


class Kernel:
    """Stands in for a Triton kernel and records its launches."""

    __name__ = "a_kernel"

    def __init__(self, events, error=None):
        self.events, self.error = events, error

    def __getitem__(self, grid):
        def launch(**arguments):
            self.events.append("launch")
            if self.error is not None:
                raise self.error

        return launch


@pytest.fixture
def events(monkeypatch):
    """Records changes of the current GPU, initially cuda:0."""
    found = []

    def change(index):
        if index >= 0:
            found.append(index)
        return 0 if index >= 0 else -1

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "_exchange_device", change)
    monkeypatch.setattr(torch.cuda, "_maybe_exchange_device", change)
    return found


def test_triton_launches_on_the_gpu_of_its_tensors(events):
    start = pytest.importorskip("mpoe_kernels.triton.start").start
    start(Kernel(events), (1,), SIZE=4, x=on_gpu(4), y=on_gpu(4))
    assert events == [1, "launch", 0]


def test_after_a_failed_launch_the_gpu_is_the_current_one_again(events):
    start = pytest.importorskip("mpoe_kernels.triton.start").start
    with pytest.raises(ZeroDivisionError):
        start(Kernel(events, ZeroDivisionError()), (1,), x=on_gpu(4))
    assert events == [1, "launch", 0]


def test_in_the_interpreter_no_gpu_is_asked_for(events):
    start = pytest.importorskip("mpoe_kernels.triton.start").start
    start(Kernel(events), (1,), x=torch.empty(4))
    assert events == ["launch"]


MATMUL = torch.backends.cuda.matmul


def _set(where, name, value):
    return lambda: setattr(where, name, value)


# The older settings, then the newer ones; once a newer one is used, PyTorch refuses to read the
# older ones.
WAYS = {
    "nothing": (lambda: None, False),
    "allow_tf32": (_set(MATMUL, "allow_tf32", True), True),
    "high": (lambda: torch.set_float32_matmul_precision("high"), True),
    "everywhere tf32": (_set(torch.backends, "fp32_precision", "tf32"), True),
    "everywhere ieee": (_set(torch.backends, "fp32_precision", "ieee"), False),
    "matmul tf32": (_set(MATMUL, "fp32_precision", "tf32"), True),
}


@pytest.fixture(params=WAYS)
def allowed(request):
    """Configures PyTorch in one of the ways; yields whether TF32 is then allowed."""

    def reset():
        torch.backends.fp32_precision = MATMUL.fp32_precision = "none"

    tell, expected = WAYS[request.param]
    reset()
    try:
        tell()
        yield expected
    finally:
        torch.set_float32_matmul_precision("highest")
        reset()


def test_only_float32_is_rounded(allowed):
    assert may_round_to_tf32(torch.float32) == allowed
    assert not may_round_to_tf32(torch.bfloat16)
    assert not may_round_to_tf32(torch.float64)


def test_triton_follows(allowed):
    pytest.importorskip("triton")
    from mpoe_kernels.triton.start import precision

    assert precision(torch.float32) == ("tf32" if allowed else "ieee")
    assert precision(torch.bfloat16) == "ieee"
