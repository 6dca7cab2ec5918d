"""Both projections of a gated network in shared launches, against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mpoe_kernels import MPOBlocks, mpo_ffn, route
from mpoe_kernels.linear.call import GatedCall
from mpoe_kernels.linear.triton import gated
from mpoe_kernels.linear.triton.configs import Tile
from mpoe_kernels.contract import program_of
from mpoe_kernels.reference import grouped_mpo_linear_reference, mpo_ffn_reference
from mpoe_kernels.testing.assertions import assert_calibrated, poisoned_memory
from mpoe_kernels.testing.cases import SMALL_SHAPES, expert_choice, random_blocks
from mpoe_kernels.testing.linear_problem import planned_strategies
from mpoe_kernels.triton import start


class Twins:
    """Rounded inputs, and the reference's factors and product."""

    def __init__(
        self, name: str, dtype: torch.dtype = torch.float32, tokens: int = 7, kind: str = "zipf", bias: bool = True
    ) -> None:
        self.shape, self.dtype = SMALL_SHAPES[name], dtype
        self.routing = route(expert_choice(kind, tokens, 3, 2), 3, 4, backend="eager")
        self.x = torch.randn(tokens, self.shape.in_features).to(dtype)
        self.bias = torch.randn(self.shape.out_features).to(dtype) if bias else None
        found = [random_blocks(self.shape, 3) for _ in range(2)]
        self.blocks = [[t.to(dtype) for t in (each.left, each.central, each.right)] for each in found]

    def call(self, strategy: str, activation: str, save: bool = True) -> GatedCall:
        sizes = self.shape.in_features, self.shape.out_features, activation, strategy, "triton"
        where = self.routing.expert_offsets, self.bias, self.routing.token_of_slot
        return GatedCall(self.x, *self.blocks[0], *where, *sizes, *self.blocks[1], save, self.routing.slot_of_token)

    def reference(self, dtype: torch.dtype, activation: str) -> tuple[Tensor, Tensor, Tensor]:
        """y, z, value."""
        sizes = self.shape.in_features, self.shape.out_features
        up, gate = (MPOBlocks(*(t.to(dtype) for t in blocks), *sizes) for blocks in self.blocks)
        x, bias = self.x.to(dtype), None if self.bias is None else self.bias.to(dtype)
        where = {"expert_offsets": self.routing.expert_offsets, "row_index": self.routing.token_of_slot}
        z = grouped_mpo_linear_reference(x, gate, **where)
        value = grouped_mpo_linear_reference(x, up, bias=bias, **where)
        return grouped_mpo_linear_reference(x, gate, activation=activation, **where) * value, z, value

    def check(self, strategy: str, activation: str = "silu", save: bool = True) -> None:
        with poisoned_memory():
            y, *kept = gated.forward(self.call(strategy, activation, save))
        found = (y, *kept[:2]) if save else (y,)
        assert save or all(each.numel() == 0 for each in kept)
        pairs = self.reference(torch.float64, activation), self.reference(self.dtype, activation)
        for name, f, t, s in zip(("y", "z", "value"), found, *pairs, strict=False):
            assert_calibrated(f, t, s, f"{name} ({strategy})")
            assert bool((f[int(self.routing.expert_offsets[-1]) :] == 0).all()), name


PAIRS = [(name, strategy) for name in ("light", "padded", "uneven_bonds", "separable", "padded_separable")
         for strategy in planned_strategies(SMALL_SHAPES[name])]  # fmt: skip


@pytest.mark.parametrize(("name", "strategy"), PAIRS)
def test_float32(name: str, strategy: str) -> None:
    Twins(name).check(strategy)


@pytest.mark.parametrize(("name", "strategy"), PAIRS[::2])
def test_bfloat16(name: str, strategy: str) -> None:
    Twins(name, torch.bfloat16).check(strategy, "gelu")


@pytest.mark.parametrize("activation", ["none", "relu", "gelu_tanh"])
def test_activations_and_nothing_kept(activation: str) -> None:
    Twins("separable", bias=False).check("separable", activation)
    Twins("light").check("rebuild", activation, save=False)


@pytest.mark.parametrize(("tokens", "kind"), [(0, "uniform"), (1, "uniform"), (9, "all_to_one"), (9, "some_idle")])
def test_loads(tokens: int, kind: str) -> None:
    for name, strategy in (("light", "half_left"), ("separable", "separable")):
        Twins(name, tokens=tokens, kind=kind).check(strategy)


def test_small_tiles_cover_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gated, "tile_for", lambda *_: Tile(16, 32, 16, 1, 1))
    monkeypatch.setattr(gated, "persistent_programs", lambda *_: 3)
    Twins("paper", tokens=11).check("chain")


def test_blocks_of_any_strides() -> None:
    twins = Twins("padded")
    twins.blocks[0][0] = twins.blocks[0][0].transpose(1, 2).contiguous().transpose(1, 2)
    twins.check("chain")


def test_a_planted_mistake_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second projection gets the first one's operands, as it would with a forgotten argument."""
    launched = gated.start

    def wrong(kernel: object, grid: tuple[int, ...], **arguments: object) -> None:
        launched(kernel, grid, **(arguments | {"b_second": arguments["b"]}))

    monkeypatch.setattr(gated, "start", wrong)
    with pytest.raises(AssertionError, match="relative error"):
        Twins("separable").check("separable")


def test_rows_are_gathered_once_and_launches_halved() -> None:
    twins = Twins("separable", torch.bfloat16)
    with start.recorded("sm_90") as together:
        gated.forward(twins.call("separable", "silu"))
    assert [one.kernel.fn.__name__ for one in together] == ["pairs_kernel"] * 3
    assert [one.arguments["SHARED"] for one in together] == [True, False, False]
    assert [one.arguments["HAS_INDEX"] for one in together] == [True, False, False]
    assert [one.arguments["FINAL"] for one in together] == [False, False, True]


def test_a_network_with_its_gradients() -> None:
    """The public function; for both projections it chooses the same strategy."""
    shape = SMALL_SHAPES["separable"]
    routing = route(expert_choice("zipf", 7, 3, 2), 3, capacity=3, backend="eager")
    blocks = [random_blocks(s, 3) for s in (shape, shape.mirrored(), shape)]
    sizes = [(each.in_features, each.out_features) for each in blocks]
    plain = [torch.randn(7, 12), torch.rand(7, 2), torch.randn(10), torch.randn(12)]
    leaves = [*plain, *(t for each in blocks for t in (each.left, each.central, each.right))]

    def results(dtype: torch.dtype, function: object, **options: object) -> list[Tensor]:
        tensors = [t.detach().to(dtype).requires_grad_() for t in leaves]
        x, weights, up_bias, down_bias, *rest = tensors
        up, down, gate = (MPOBlocks(*rest[3 * k : 3 * k + 3], *sizes[k]) for k in range(3))
        biases = {"up_bias": up_bias, "down_bias": down_bias}
        y = function(x, routing, weights, up, down, gate_proj=gate, **biases, activation="silu", **options)
        return [y, *torch.autograd.grad(y.square().sum(), tensors)]

    found = results(torch.float32, mpo_ffn, backend="triton")
    truth, same = results(torch.float64, mpo_ffn_reference), results(torch.float32, mpo_ffn_reference)
    for number, (f, t, s) in enumerate(zip(found, truth, same, strict=True)):
        assert_calibrated(f, t, s, f"result {number}", 4)


def test_gradients_are_those_of_two_products() -> None:
    """A program for both would ask for a gradient of both at once, which is refused."""
    case = Twins("light")
    call = case.call("chain", "silu")
    product = next(p for p in program_of(call.up.dims, "chain", "backward").products if p.kind == "gradient")
    nothing = (None, None)
    with pytest.raises(TypeError, match=f"no gradient {product.result} together"):
        gated._Twins(*nothing).gradient(product, nothing, nothing)  # type: ignore[arg-type]
