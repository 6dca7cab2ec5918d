"""What the layers' constructors and forwards refuse, naming the argument."""

from __future__ import annotations

import pytest
import torch

from mpoe import MPOEConfig, MPOEFeedForward, MPOEmbedding, MPOLinear, RouterConfig, TopKRouter
from mpoe.layers import load_balancing_loss, router_z_loss
from mpoe_kernels import MPOShape

SHAPE = MPOShape((2, 4), (3, 4))


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda: TopKRouter(1.5, 4), TypeError, "in_features must be an integer; got float 1.5"),
        (lambda: TopKRouter(0, 4), ValueError, "in_features must be at least 1; got 0"),
        (lambda: TopKRouter(8, 0), ValueError, "num_experts must be at least 1; got 0"),
        (lambda: TopKRouter(8, 4, {"top_k": 1}), TypeError, "config must be a RouterConfig; got dict"),
        (lambda: TopKRouter(8, 4, device=3), TypeError, "device must be a torch.device or its name; got int 3"),
        (lambda: TopKRouter(8, 4, device="moon"), ValueError, "device must be one that this machine has; got 'moon'"),
        (lambda: TopKRouter(8, 4, dtype="x"), TypeError, "dtype must be a torch.dtype; got str 'x'"),
        (lambda: MPOLinear(SHAPE, dtype=torch.int64), ValueError, "dtype must be of floating-point numbers; got"),
        (lambda: MPOLinear((2, 4)), TypeError, "shape must be an MPOShape; got tuple"),
        (lambda: MPOLinear(SHAPE, init_std="x"), TypeError, "init_std must be a number; got str"),
        (lambda: MPOEmbedding(None, 1), TypeError, "shape must be an MPOShape; got NoneType"),
        (lambda: MPOEmbedding(SHAPE, 1.5), TypeError, "padding_idx must be an integer; got float 1.5"),
        (lambda: MPOEFeedForward(8, 16, "x"), TypeError, "config must be an MPOEConfig; got str 'x'"),
        (lambda: MPOEFeedForward(8, None), TypeError, "hidden_features must be an integer; got NoneType"),
        (lambda: TopKRouter(8, 4)([1.0]), TypeError, r"x must be a tensor \[T, I\]; got list"),
        (lambda: TopKRouter(8, 4)(torch.ones(8)), ValueError, r"x must be \[T, I\] with I = 8; got \[8\]"),
        (lambda: TopKRouter(8, 4)(torch.ones(2, 7)), ValueError, r"x must be \[T, I\] with I = 8; got \[2, 7\]"),
        (lambda: TopKRouter(8, 4)(torch.ones(2, 9)), ValueError, r"x must be \[T, I\] with I = 8; got \[2, 9\]"),
        (lambda: MPOEFeedForward(8, 16)([1.0]), TypeError, r"hidden_states must be a tensor \[..., I\]; got list"),
        (lambda: MPOEFeedForward(8, 16)(torch.ones(2, 8).long()), TypeError, "must hold floating-point numbers; got"),
        (lambda: MPOEFeedForward(8, 16)(torch.ones(())), ValueError, r"hidden_states must be \[..., 8\]; got \[\]"),
    ],
)
def test_refusals(call, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        call()


def test_what_fits_still_does() -> None:
    assert (
        TopKRouter(8, 4, RouterConfig(), device=torch.device("cpu"), dtype=torch.bfloat16).weight.dtype
        is torch.bfloat16
    )
    assert MPOEmbedding(SHAPE, -1, device="meta").padding_idx == 7
    assert MPOEFeedForward(8, 16, MPOEConfig(num_experts=2, shape="separable"))(torch.randn(3, 8)).shape == (3, 8)


@pytest.mark.parametrize("shape", ["separable", "hidden"])
@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.tensor([0.0, -torch.inf, 0.0]), "token_mask must be bool .* not additive; got torch.float32"),
        (torch.ones(3).bool().to_sparse(), "token_mask must be a dense tensor"),
        ([True, True, False], "token_mask must be a bool tensor .3.; got list"),
    ],
    ids=["additive", "sparse", "list"],
)
def test_masks_that_are_none(shape: str, mask: object, message: str) -> None:
    layer = MPOEFeedForward(12, 24, MPOEConfig(num_experts=2, shape=shape))
    with pytest.raises((TypeError, ValueError), match=message):
        layer(torch.randn(3, 12), mask)
    for loss in (
        lambda: router_z_loss(torch.randn(3, 2), mask),
        lambda: load_balancing_loss(torch.randn(3, 2), torch.zeros(3, 1).long(), mask),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            loss()


def test_sparse_rows() -> None:
    with pytest.raises(ValueError, match="hidden_states must be a dense tensor; got one of the layout"):
        MPOEFeedForward(12, 24, MPOEConfig(num_experts=2))(torch.eye(12).to_sparse())
