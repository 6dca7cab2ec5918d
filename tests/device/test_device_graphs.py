"""opcheck, torch.compile, CUDA graphs and repeated runs on the device, for every backend that runs there."""

from __future__ import annotations

import sys

import pytest
import torch
from mpoe_bench.cases import expert_choice, random_blocks
from torch import Tensor

from mpoe_kernels import MPOBlocks, grouped_mpo_linear
from tests.cases import SMALL_SHAPES

from .decoding_graph import replay_a_decoding_step, run_apart

SHAPE = SMALL_SHAPES["light"]


def tensors(device: torch.device, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x, left, central, right."""
    blocks = random_blocks(SHAPE, 3)
    found = (torch.randn(9, SHAPE.in_features), blocks.left, blocks.central, blocks.right)
    return [t.detach().to(device, dtype).requires_grad_() for t in found]


def offsets(device: torch.device) -> Tensor:
    return torch.tensor([0, 4, 4, 9], dtype=torch.int32, device=device)


def product(backend: str, x: Tensor, left: Tensor, central: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    blocks = MPOBlocks(left, central, right, SHAPE.in_features, SHAPE.out_features)
    return grouped_mpo_linear(x, blocks, ends, activation="gelu", backend=backend)


def test_opcheck(able: str, device: torch.device) -> None:
    sizes = (SHAPE.in_features, SHAPE.out_features, "gelu", "rebuild", able, True)
    torch.library.opcheck(
        torch.ops.mpoe.grouped_mpo_linear.default, (*tensors(device), offsets(device), None, None, *sizes)
    )
    index = expert_choice("zipf", 9, 3).to(device)
    torch.library.opcheck(torch.ops.mpoe.route.default, (index, 3, 2, None, able))


def test_compiled_graphs_are_whole_and_give_the_same(able: str, device: torch.device) -> None:
    inputs, ends = tensors(device), offsets(device)
    grad = torch.randn(9, SHAPE.out_features, device=device)
    compiler = "inductor" if device.type == "cuda" else "aot_eager"
    compiled = torch.compile(product, fullgraph=True, backend=compiler)

    def run(function) -> list[Tensor]:
        y = function(able, *inputs, ends)
        return [y.detach(), *torch.autograd.grad(y, inputs, grad)]

    for found, plain in zip(run(compiled), run(product), strict=True):
        torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5)


def test_two_runs_agree_bit_for_bit(able: str, device: torch.device) -> None:
    inputs, ends = tensors(device), offsets(device)

    def run() -> list[Tensor]:
        y = product(able, *inputs, ends)
        return [y.detach(), *torch.autograd.grad(y, inputs, torch.ones_like(y))]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("name", ["light", "separable"])
def test_a_decoding_step_fits_a_cuda_graph(able: str, name: str, device: torch.device) -> None:
    """In a process of its own: a capture that breaks off spoils its process."""
    if device.type != "cuda":
        pytest.skip("CUDA graphs need a CUDA device")
    if able == "eager":
        pytest.skip("plain PyTorch asks the device for sizes, so it is never captured")
    run_apart(replay_a_decoding_step, able, name, str(device))


def test_plain_pytorch_is_never_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    def captured(*_: object) -> None:
        raise AssertionError("eager was captured")

    monkeypatch.setattr(sys.modules[__name__], "run_apart", captured)
    with pytest.raises(pytest.skip.Exception, match="never captured"):
        test_a_decoding_step_fits_a_cuda_graph("eager", "light", torch.device("cuda"))
    with pytest.raises(AssertionError, match="was captured"):
        test_a_decoding_step_fits_a_cuda_graph("cuda", "light", torch.device("cuda"))


def _break_off() -> None:
    torch.set_default_dtype(torch.float64)
    raise ArithmeticError("broken off")


def test_what_breaks_off_apart_is_reported_and_leaves_nothing() -> None:
    with pytest.raises(Exception, match="ArithmeticError: broken off"):
        run_apart(_break_off)
    assert torch.get_default_dtype() == torch.float32
