"""Which form of a contraction the CUDA backend launches, predicted from shapes and device tables alone."""

from __future__ import annotations

import pytest
import torch

from mpoe_kernels.backends.cuda import CUDA as CUDA_BACKEND
from mpoe_kernels.backends.triton import TRITON
from mpoe_kernels.contract import BlockDims, Contraction, contraction
from mpoe_kernels.linear.cuda.cost import Way, ways
from mpoe_kernels.linear.cuda.few import Few
from mpoe_kernels.linear.cuda.panels import Panel
from mpoe_kernels.linear.gpu.cost import CUDA, gpu_seconds
from mpoe_kernels.registry import Request, registered_backends
from mpoe_kernels.testing.cases import workload_shape
from mpoe_kernels.triton.hardware import HARDWARE, Hardware

H100 = HARDWARE["h100"]


def way_of(plan: Contraction, hardware: Hardware) -> Way:
    """What the registry would choose if CUDA were the only backend."""
    return min(ways(plan, hardware), key=lambda way: way.seconds)


ALL, WITHOUT_X = (True, True, True, True), (False, True, True, True)


def plan(
    name: str,
    experts: int,
    slots: int,
    phase: str = "forward",
    up: bool = True,
    need: tuple[bool, bool, bool, bool] = ALL,
    strategy: str = "rebuild",
    keeps: bool = False,
) -> Contraction:
    shape = workload_shape(name, 768, 3072)
    shape = shape if up else shape.mirrored()
    dims = BlockDims.of_shape(shape)
    return contraction(strategy, dims, experts, slots, torch.bfloat16, phase, need, keeps=keeps)


def test_few_rows_of_many_experts_go_in_panels() -> None:
    for name in ("paper_64", "light_64"):
        assert isinstance(way_of(plan(name, 64, 64), H100).cut, Panel)


def test_many_rows_of_a_deep_product_go_through_scratch() -> None:
    """The panels of a weight with 3072 rows are narrow, so every row would be read many times."""
    few_experts = plan("paper_full", 8, 32768, up=False)
    assert way_of(few_experts, H100).cut is None


@pytest.mark.parametrize("gpu", ["a100", "h100", "b200"])
@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_the_faster_form_is_launched(gpu: str, phase: str) -> None:
    hardware = HARDWARE[gpu]
    cuts = set()
    for up in (True, False):
        for experts, slots in ((8, 64), (64, 64), (8, 32768)):
            asked = plan("light_64", experts, slots, phase, up)
            way = way_of(asked, hardware)
            assert 0 < way.seconds <= gpu_seconds(asked, hardware, CUDA)
            cuts.add(type(way.cut))
    assert cuts == {Panel, type(None)}


def test_without_a_gradient_of_x_nothing_is_rebuilt_in_panels() -> None:
    asked = plan("paper_64", 64, 64, "backward", need=WITHOUT_X)
    assert way_of(asked, H100).cut is None


def test_few_rows_of_small_bonds_take_one_launch() -> None:
    small = plan("paper_16", 64, 4, strategy="chain")
    assert isinstance(way_of(small, H100).cut, Few)
    assert way_of(plan("paper_16", 64, 4096, strategy="chain"), H100).cut is None
    assert way_of(plan("paper_16", 64, 4, "backward", strategy="chain"), H100).cut is None


def test_central_rows_kept_for_backward_take_several_launches() -> None:
    asked, keeping = (plan("separable", 64, 1, strategy="separable", keeps=keeps) for keeps in (False, True))
    assert way_of(keeping, H100).cut is None
    assert way_of(asked, H100).seconds <= way_of(keeping, H100).seconds


def test_nothing_to_do() -> None:
    asked = plan("paper_64", 8, 0)
    assert way_of(asked, H100).cut is None


def test_hidden_experts_cost_what_tritons_do() -> None:
    """A tie, so that Triton's kernels, registered first, run if they can; routing takes fewer launches here."""
    names = [backend.name for backend in registered_backends()]
    assert names.index("triton") < names.index("cuda")
    for op in ("hidden_experts", "hidden_experts_backward"):
        request = Request(op, "cuda", torch.bfloat16, {"block": 64})
        assert CUDA_BACKEND.predicted_cost(request) == TRITON.predicted_cost(request)
    assert CUDA_BACKEND.predicted_cost(Request("route", "cuda", torch.int64)) < TRITON.predicted_cost(request)
