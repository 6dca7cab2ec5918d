"""Runs on the device that must agree bit for bit: many in a row, on two streams beside a busy
third."""

from contextlib import nullcontext

import pytest
import torch
from mpoe_bench.cases import expert_choice

from mpoe_kernels import mpo_ffn, route
from tests.cases import SMALL_SHAPES
from tests.linear_problem import cast, leaves

from .test_device_experts import ON_GPU, op_of, problem_of
from .test_device_ops import LARGE, make_blocks

RUNS = 300 if ON_GPU else 3
KINDS = ("neurons of 64", "hidden of 64", "chain", "chain in float32")


def chain_step(backend, device, tokens, dtype):
    """Routing and both products of a network of MPO experts, forward and backward."""
    shape = LARGE["paper"] if ON_GPU else SMALL_SHAPES["light"]
    down = shape.mirrored() if ON_GPU else shape
    blocks = [cast(make_blocks(each, 8, dtype, device), dtype) for each in (shape, down)]
    x = torch.randn(tokens, shape.in_features, device=device, dtype=dtype)
    index = expert_choice("zipf", tokens, 8).to(device)
    gates = torch.rand(tokens, 1, device=device)
    inputs = [x.requires_grad_(), gates.requires_grad_(), *leaves(blocks[0]), *leaves(blocks[1])]

    def step():
        y = mpo_ffn(x, route(index, 8, backend=backend), gates, *blocks, backend=backend)
        return [y.detach(), *torch.autograd.grad(y.float().square().sum(), inputs)]

    return step


def step_of(kind, backend, device, check_able):
    """A call whose results are compared."""
    tokens = 300 if ON_GPU else 9
    if kind.startswith("chain"):
        check_able(backend)
        dtype = torch.float32 if "float32" in kind else torch.bfloat16
        return chain_step(backend, device, tokens, dtype)
    check_able(backend, op_of(kind))
    problem = problem_of(kind, torch.bfloat16, device, tokens=tokens)
    return lambda: list(problem.run(type(problem).OP, torch.bfloat16, backend=backend).values())


def assert_same(first, second, what):
    for number, (one, two) in enumerate(zip(first, second, strict=True)):
        assert torch.equal(one, two), f"{what}: result {number} has other bits"


def on_stream(stream):
    return nullcontext() if stream is None else torch.cuda.stream(stream)


def finished():
    """Everything that a GPU was given is done."""
    if ON_GPU:
        torch.cuda.synchronize()


@pytest.mark.parametrize("kind", KINDS)
def test_many_runs_agree(kind, backend, device, check_able):
    step = step_of(kind, backend, device, check_able)
    first = step()
    for run in range(RUNS):
        assert_same(step(), first, f"run {run}")


@pytest.mark.parametrize("kind", KINDS)
def test_two_streams_beside_a_busy_one_agree(kind, backend, device, check_able):
    step = step_of(kind, backend, device, check_able)
    first = step()
    load = torch.randn(4096 if ON_GPU else 16, 4096 if ON_GPU else 16, device=device)
    busy, one, two = [torch.cuda.Stream() if ON_GPU else None for _ in range(3)]
    finished()
    for run in range(max(1, RUNS // 10)):
        with on_stream(busy):
            for _ in range(8):
                load @ load
        results = []
        for stream in (one, two):
            with on_stream(stream):
                results.append(step())
        finished()
        for number, found in enumerate(results):
            assert_same(found, first, f"run {run} on stream {number}")


@pytest.mark.parametrize("kind", KINDS[:2])
def test_a_token_s_result_does_not_depend_on_its_batch(kind, backend, device, check_able):
    """Of kernels that promise it."""
    check_able(backend, op_of(kind))
    if backend != "triton":
        pytest.skip(
            "the rows of one product of PyTorch's or the CPU's may be summed in another order than "
            "one row's"
        )
    problem = problem_of(kind, torch.bfloat16, device)
    whole = problem.run(type(problem).OP, torch.bfloat16, backend=backend)["o"]
    for name in ("x", "u", "gates"):
        if problem.inputs.get(name) is not None:
            problem.inputs[name] = problem.inputs[name][:1]
    problem.index = problem.index[:1]
    problem.grad = problem.grad[:1]
    alone = problem.run(type(problem).OP, torch.bfloat16, backend=backend)["o"]
    assert torch.equal(alone[0], whole[0])
