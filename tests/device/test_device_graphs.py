"""opcheck, torch.compile and CUDA graphs on the device, for every backend that runs there."""

import pytest
import torch
from mpoe_bench.cases import expert_choice, random_blocks
from mpoe_bench.contender import graphed

from mpoe_kernels import MPOBlocks, grouped_mpo_linear, mpo_ffn, route
from tests.cases import SMALL_SHAPES

from .test_device_experts import op_of, problem_of
from .test_device_ops import make_blocks

SHAPE = SMALL_SHAPES["light"]


def tensors(device):
    """x, left, central, right."""
    blocks = random_blocks(SHAPE, 3)
    found = (torch.randn(9, SHAPE.in_features), blocks.left, blocks.central, blocks.right)
    return [t.detach().to(device, torch.float32).requires_grad_() for t in found]


def offsets(device):
    return torch.tensor([0, 4, 4, 9], dtype=torch.int32, device=device)


def product(backend, x, left, central, right, ends):
    blocks = MPOBlocks(left, central, right, SHAPE.in_features, SHAPE.out_features)
    return grouped_mpo_linear(x, blocks, ends, activation="gelu", backend=backend)


def test_opcheck(able, device):
    sizes = (SHAPE.in_features, SHAPE.out_features, "gelu", "rebuild", able, True)
    torch.library.opcheck(
        torch.ops.mpoe.grouped_mpo_linear.default,
        (*tensors(device), offsets(device), None, None, *sizes),
    )
    index = expert_choice("zipf", 9, 3).to(device)
    torch.library.opcheck(torch.ops.mpoe.route.default, (index, 3, 2, None, able))


def test_compiled_graphs_are_whole_and_give_the_same(able, device):
    inputs, ends = tensors(device), offsets(device)
    grad = torch.randn(9, SHAPE.out_features, device=device)
    compiler = "inductor" if device.type == "cuda" else "aot_eager"
    compiled = torch.compile(product, fullgraph=True, backend=compiler)

    def run(function):
        y = function(able, *inputs, ends)
        return [y.detach(), *torch.autograd.grad(y, inputs, grad)]

    for found, plain in zip(run(compiled), run(product), strict=True):
        torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5)


def run_apart(function, *arguments):
    """Call a function in a new process, so that what it leaves behind is gone; raises what it
    raised."""
    torch.multiprocessing.spawn(_without_rank, (function, *arguments))


def _without_rank(_, function, *arguments):
    function(*arguments)


def captured(step, found, device):
    """What fills ``found`` with the result of a step, on a GPU in a CUDA graph."""

    def replay():
        found.copy_(step())

    return graphed(replay) if device.startswith("cuda") else replay


def replay_a_decoding_step(backend, name, device):
    """Routing and both products, captured with one routing and replayed with another."""
    torch.manual_seed(0)
    shape = SMALL_SHAPES[name]
    down_shape = shape.mirrored() if shape.is_separable else shape
    parts = [
        make_blocks(each, 3, torch.float32, torch.device(device)) for each in (shape, down_shape)
    ]
    x, index = (
        torch.randn(4, shape.in_features, device=device),
        torch.tensor([[0], [1], [1], [2]], device=device),
    )
    gates = torch.ones(4, 1, device=device)
    found = torch.empty(4, down_shape.out_features, device=device)

    def step():
        with torch.no_grad():
            return mpo_ffn(x, route(index, 3, backend=backend), gates, *parts, backend=backend)

    replay = captured(step, found, device)
    x.copy_(torch.randn_like(x))
    index.copy_(torch.tensor([[2], [2], [0], [2]], device=device))
    replay()
    torch.testing.assert_close(found, step())


def replay_experts(backend, name, tokens, device):
    """Experts captured with one routing, replayed with five others, bit for bit."""
    problem = problem_of(name, torch.bfloat16, torch.device(device), tokens=tokens, none_share=0.0)
    found = torch.empty_like(problem.grad, dtype=torch.bfloat16)
    index = problem.index.clone()
    problem.index = index

    def step():
        with torch.no_grad():
            return problem.run(type(problem).OP, torch.bfloat16, backend=backend)["o"]

    replay = captured(step, found, device)
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        index.copy_(torch.randint(0, problem.experts, index.shape, generator=generator))
        replay()
        assert torch.equal(found, step()), f"routing {seed}"


def check_captured(backend, device):
    if device.type == "cuda" and backend == "eager":
        pytest.skip("plain PyTorch asks the device for sizes, so it is never captured")


@pytest.mark.parametrize("name", ["light", "separable"])
def test_a_decoding_step_fits_a_cuda_graph(able, name, device):
    """In a process of its own: a capture that breaks off spoils its process."""
    check_captured(able, device)
    if device.type == "cuda":
        run_apart(replay_a_decoding_step, able, name, str(device))
    else:
        replay_a_decoding_step(able, name, str(device))


@pytest.mark.parametrize("tokens", [1, 64], ids=["T1", "T64"])
@pytest.mark.parametrize("name", ["neurons of 64", "hidden of 64"])
def test_experts_fit_a_cuda_graph_whatever_the_routing(name, tokens, backend, device, check_able):
    check_able(backend, op_of(name))
    check_captured(backend, device)
    if device.type == "cuda":
        run_apart(replay_experts, backend, name, tokens, str(device))
    else:
        replay_experts(backend, name, tokens, str(device))
