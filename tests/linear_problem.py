"""One grouped MPO product, a network of them or an embedding, with its gradients: inputs, and the
comparison with the reference."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from mpoe_bench.cases import expert_choice, random_blocks, relative_error
from torch import Tensor

from mpoe_kernels import grouped_mpo_linear, mpo_embedding, mpo_ffn, use_backend
from mpoe_kernels.contract import STRATEGIES
from mpoe_kernels.linear.grouped import ON_CHIP
from mpoe_kernels.linear.op import BackwardCall, ForwardCall
from mpoe_kernels.mpo.fold import MPOBlocks
from mpoe_kernels.mpo.shape import MPOShape
from mpoe_kernels.reference import (
    grouped_mpo_linear_reference,
    mpo_embedding_reference,
    mpo_ffn_reference,
)
from mpoe_kernels.routing.op import route

from .assertions import assert_calibrated, poisoned_memory

NAMES = "y dx dleft dcentral dright dbias".split()
ALL_NEEDED = (True,) * 5


def planned_strategies(shape):
    """What the planner may ask for: ``separable`` is the chain of its shapes."""
    return [s for s in STRATEGIES if s != ("chain" if shape.is_separable else "separable")]


@dataclass
class LinearProblem:
    """Rounded inputs of one product.

    Attributes:
        shape, dtype, experts, activation: of the layer.
        tokens, top_k, kind, capacity, mask: of the routing, see `expert_choice`.
        with_bias, gathered: whether there is a bias; whether slots read rows of x through
            ``row_index``.
        device: of the tensors.
    """

    shape: MPOShape
    dtype: torch.dtype = torch.float32
    tokens: int = 7
    experts: int = 3
    top_k: int = 2
    kind: str = "zipf"
    capacity: int | None = 4
    activation: str = "gelu"
    with_bias: bool = True
    gathered: bool = True
    mask: Tensor | None = None
    device: torch.device | str = "cpu"
    x: Tensor = field(init=False)

    def __post_init__(self):
        index = expert_choice(
            self.kind, self.tokens, self.experts, min(self.top_k, self.experts)
        ).to(self.device)
        self.routing = route(index, self.experts, self.capacity, self.mask, backend="eager")
        slots = self.routing.token_of_slot.shape[0]
        blocks = random_blocks(self.shape, self.experts)
        self.blocks = [
            t.to(self.device, self.dtype) for t in (blocks.left, blocks.central, blocks.right)
        ]
        self.x = self._random(self.tokens if self.gathered else slots, self.shape.in_features)
        self.bias = self._random(self.shape.out_features) if self.with_bias else None
        self.grad = self._random(slots, self.shape.out_features)
        if (
            self.activation == "relu"
        ):  # its gradient jumps at zero: rounding must not decide the side
            z = self.reference(torch.float64, activation="none")[0]
            self.grad = self.grad * (z.detach().abs() > 0.1)

    def _random(self, *sizes):
        return torch.randn(sizes).to(self.device, self.dtype)

    @property
    def sizes(self) -> tuple[int, int]:
        """I and F."""
        return self.shape.in_features, self.shape.out_features

    @property
    def row_index(self) -> Tensor | None:
        """Row of x that each slot reads."""
        return self.routing.token_of_slot if self.gathered else None

    @property
    def slot_of_token(self) -> Tensor | None:
        """Its inverse."""
        return self.routing.slot_of_token if self.gathered else None

    @property
    def filled(self) -> int:
        """Slots that an expert owns."""
        return int(self.routing.expert_offsets[-1])

    def run(self, strategy, backward_strategy=None):
        """``y`` and every gradient by the kernels under test; that of the bias, the last one, may
        be left out."""
        raise NotImplementedError

    def reference(self, dtype, activation=None):
        """The same by `mpoe_kernels.reference`; with another activation only ``y``, the gradients
        are zero.

        Without a bias the gradient is that of a bias of zeros.
        """
        leaves = [t.to(dtype).requires_grad_() for t in (self.x, *self.blocks)]
        bias = (
            (self.x.new_zeros(self.sizes[1]) if self.bias is None else self.bias)
            .to(dtype)
            .requires_grad_()
        )
        x, left, central, right = leaves
        y = grouped_mpo_linear_reference(
            x,
            MPOBlocks(left, central, right, *self.sizes),
            self.routing.expert_offsets,
            bias,
            row_index=self.row_index,
            activation=self.activation if activation is None else activation,
        )
        inputs = [*leaves, bias]
        if not y.requires_grad or activation is not None:
            return [y, *(torch.zeros_like(t) for t in inputs)]
        grad = self.grad.to(dtype).nan_to_num(0)
        found = torch.autograd.grad(y, inputs, grad, allow_unused=True)
        return [
            y,
            *(torch.zeros_like(t) if g is None else g for t, g in zip(inputs, found, strict=True)),
        ]

    def check(self, strategy, backward_strategy=None, factor=2):
        """Compare everything with the float64 reference, calibrated by the reference in the same
        dtype."""
        actual = self.run(strategy, backward_strategy)
        truth, same = self.reference(torch.float64), self.reference(self.dtype)
        assert len(actual) >= len(truth) - 1
        for name, a, t, s in zip(NAMES, actual, truth, same, strict=False):
            if self.dtype == torch.float64:  # the truth has the same rounding
                assert relative_error(a, t) < 1e-13, f"{name} ({strategy})"
            else:
                assert_calibrated(a, t, s, f"{name} ({strategy})", factor)
        assert bool((actual[0][self.filled :] == 0).all())


@dataclass
class KernelProblem(LinearProblem):
    """One product by a backend's kernels, without the op around them; a strategy may be `ON_CHIP`,
    a way to rebuild.

    Attributes:
        KERNELS: strategy -> what has its ``forward`` and ``backward`` of a call.
        BACKEND: that the calls name.
        inverse: whether the backward is told which slots read a token.
    """

    KERNELS: ClassVar[Callable[[str], Any]]
    BACKEND: ClassVar[str]
    inverse: bool = True

    def _common(self, strategy):
        tensors = (self.x, *self.blocks, self.routing.expert_offsets, self.bias, self.row_index)
        named = "rebuild" if strategy == ON_CHIP else strategy, type(self).BACKEND
        return *tensors, *self.sizes, self.activation, *named

    def forward(self, strategy, save=True, **placed):
        """``(y, h, z)``; ``placed``: out_index and gates of `ForwardCall`."""
        with poisoned_memory():
            call = ForwardCall(
                *self._common(strategy), save, self.slot_of_token if placed else None, **placed
            )
            return type(self).KERNELS(strategy).forward(call)

    def backward(self, strategy, saved, need=ALL_NEEDED):
        """Gradients of x, the blocks and the bias, from what the forward returned; those not needed
        are empty."""
        y, h, z = saved
        kept = self.grad, h, y if self.activation == "relu" else z
        slots, kernels = self.slot_of_token if self.inverse else None, type(self).KERNELS(strategy)
        with poisoned_memory():
            return kernels.backward(BackwardCall(*self._common(strategy), *kept, list(need), slots))

    def run(self, strategy, backward_strategy=None):
        saved = self.forward(strategy)
        grads = self.backward(
            backward_strategy or strategy, saved, (*ALL_NEEDED[:4], self.with_bias)
        )
        return [saved[0], *grads[: 4 + self.with_bias]]


# ------------------------------------------------------------------ blocks and memory layouts


def leaves(blocks):
    return [blocks.left, blocks.central, blocks.right]


def cast(blocks, dtype, place=lambda t: t):
    left, central, right = (
        place(t.detach().to(dtype)).detach().requires_grad_() for t in leaves(blocks)
    )
    return MPOBlocks(left, central, right, blocks.in_features, blocks.out_features)


def unaligned(tensor):
    """The same values one element further in memory: aligned only to the element size."""
    storage = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
    moved = storage[1:].view(tensor.shape)
    moved.copy_(tensor.detach())
    return moved.requires_grad_(tensor.requires_grad)


def strided(tensor):
    """The same values in a tensor that is not contiguous along any axis."""
    wide = torch.empty(*tensor.shape, 2, dtype=tensor.dtype)
    moved = wide[..., 0]
    moved.copy_(tensor.detach())
    return moved.requires_grad_(tensor.requires_grad)


def transposed(tensor):
    """The same values with the first axis innermost in memory."""
    moved = tensor.detach().transpose(0, -1).contiguous().transpose(0, -1)
    return moved.requires_grad_(tensor.requires_grad)


LAYOUTS = {
    "dense": lambda t: t,
    "unaligned": unaligned,
    "strided": strided,
    "transposed": transposed,
}


@dataclass
class Product(LinearProblem):
    """One product by the public op; every strategy is compared with one reference.

    Attributes:
        backend: that computes it.
        layout: of its tensors in memory, see `LAYOUTS`.
        inverse: whether the op is told which slots read a token.
    """

    capacity: int | None = None
    backend: str = "eager"
    layout: str = "dense"
    inverse: bool = False
    known: dict[tuple[torch.dtype, str | None], list[Tensor]] = field(default_factory=dict)

    @property
    def inputs(self) -> list[Tensor]:
        """x, left, central, right and, if there is one, the bias."""
        return [self.x, *self.blocks, *([] if self.bias is None else [self.bias])]

    def call(self, inputs, strategy):
        x, left, central, right, *bias = inputs
        return grouped_mpo_linear(
            x,
            MPOBlocks(left, central, right, *self.sizes),
            self.routing.expert_offsets,
            *bias,
            row_index=self.row_index,
            slot_of_token=self.slot_of_token if self.inverse else None,
            activation=self.activation,
            strategy=strategy,
            backend=self.backend,
        )

    def run(self, strategy, backward_strategy=None):
        place = LAYOUTS[self.layout]
        inputs = [place(t).detach().requires_grad_() for t in self.inputs]
        with poisoned_memory(self.device):
            y = self.call(inputs, strategy)
            grads = torch.autograd.grad(
                y, inputs, place(self.grad).detach(), allow_unused=True, materialize_grads=True
            )
        return [y, *grads]

    def reference(self, dtype, activation=None):
        if (dtype, activation) not in self.known:
            self.known[dtype, activation] = super().reference(dtype, activation)
        return self.known[dtype, activation]


# ------------------------------------------------------------------ networks


def check_ffn(backend, shape, dtype, gated, tokens=11, experts=4, device="cpu"):
    """`mpo_ffn` and its gradients with dropped and masked tokens and idle experts, calibrated in
    the same dtype."""
    index, mask = expert_choice("some_idle", tokens, experts, 2), torch.arange(tokens) % 4 != 1
    routing = route(index.to(device), experts, capacity=tokens // 2, token_mask=mask.to(device))
    shapes = (shape, shape.mirrored(), *([shape] if gated else []))
    blocks = [random_blocks(each, experts, dtype) for each in shapes]
    sizes = ((tokens, shape.in_features), (shape.out_features,), (shape.in_features,))
    others = [torch.rand(tokens, 2), *(torch.randn(size) for size in sizes)]

    def run(function, run_dtype):
        up, down, *gate = (cast(block, run_dtype, lambda t: t.to(device)) for block in blocks)
        inputs = [t.to(dtype).to(device, run_dtype).requires_grad_() for t in others]
        options = {
            "gate_proj": gate[0] if gated else None,
            "up_bias": inputs[2],
            "down_bias": inputs[3],
        }
        y = function(inputs[1], routing, inputs[0], up, down, activation="silu", **options)
        of_blocks = [leaf for block in (up, down, *gate) for leaf in leaves(block)]
        return [y, *torch.autograd.grad(y.square().sum(), [*inputs, *of_blocks])]

    with use_backend(backend), poisoned_memory(device):
        actual = run(mpo_ffn, dtype)
    truth, same = run(mpo_ffn_reference, torch.float64), run(mpo_ffn_reference, dtype)
    names = ["y", "dweights", "dx", "dup_bias", "ddown_bias"]
    names += [f"d{kind}.{k}" for kind in ("up", "down", "gate")[: len(blocks)] for k in range(3)]
    for name, a, t, s in zip(names, actual, truth, same, strict=True):
        if dtype == torch.float64:  # the truth has the same rounding
            assert relative_error(a, t) < 1e-13, name
        else:
            assert_calibrated(a, t, s, name, factor=3)


# ------------------------------------------------------------------ embeddings


def check_embedding(shape, rows, dtype=torch.float32, layout="dense", device="cpu"):
    """`mpo_embedding` and its gradients, calibrated in the same dtype."""
    table = random_blocks(shape, 1)
    ids = torch.randint(0, shape.in_features, (rows,)).to(device)
    grad = torch.randn(rows, shape.out_features).to(device)

    def run(function, run_dtype, place):
        blocks = cast(table, run_dtype, lambda t: place(t.to(device)))
        y = function(ids, blocks)
        return [y, *torch.autograd.grad(y, leaves(blocks), grad.to(run_dtype))]

    with poisoned_memory(device):
        actual = run(mpo_embedding, dtype, LAYOUTS[layout])
    truth, same = (
        run(mpo_embedding_reference, each, LAYOUTS["dense"]) for each in (torch.float64, dtype)
    )
    names = ("y", "dleft", "dcentral", "dright")
    for name, a, t, s in zip(names, actual, truth, same, strict=True):
        assert a.is_contiguous(), name  # compiled graphs count on it
        if dtype == torch.float64:  # the truth has the same rounding
            assert relative_error(a, t) < 1e-13, name
        else:
            what = f"{name} {dtype} {layout}"
            assert_calibrated(a, t, s, what, factor=3 if name == "y" else 4)
