"""What happens to a layer between two of its calls; after each, it computes what its parameters say, or refuses."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
import random
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler

import torch
from torch import Tensor, func, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import mpoe
from mpoe.layers.expert_cache import ExpertCache
from mpoe_kernels import use_backend

Layer = mpoe.MPOEFeedForward
WIDTH = 12


class WrongNumbers(AssertionError):
    """A layer's output is not that of its parameters."""


def fused_step(layer: Layer) -> None:
    for parameter in layer.parameters():
        parameter.grad = torch.randn_like(parameter)
    torch.optim.AdamW(layer.parameters(), lr=0.05, fused=True).step()


def swap_data(layer: Layer) -> None:
    for parameter in layer.parameters():
        parameter.data = parameter.data * 1.25


def negate(layer: Layer) -> None:
    for parameter in layer.parameters():
        parameter.data = torch._neg_view(parameter.data)


def move_storage(layer: Layer) -> None:
    """Other memory under the same tensors, as FSDP gives it before a pass."""
    for parameter in layer.parameters():
        if parameter.is_shared():  # PyTorch itself must not resize it
            continue
        storage, values = parameter.untyped_storage(), parameter.detach().clone()
        size = storage.nbytes()
        storage.resize_(0)
        storage.resize_(size)
        parameter.data.copy_(values)


def empty_storage(layer: Layer) -> None:
    for parameter in layer.experts.parameters():
        if not parameter.is_shared():
            parameter.untyped_storage().resize_(0)


def train(layer: Layer) -> None:
    layer.train()
    layer(torch.randn(5, WIDTH)).sum().backward()
    layer.zero_grad()
    layer.eval()


def in_half_and_back(layer: Layer) -> None:
    layer.to(torch.bfloat16).to(torch.float32)


def others_threads(layer: Layer) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(not torch.are_deterministic_algorithms_enabled(), warn_only=True)


def replace(layer: Layer) -> None:
    layer.router.weight = nn.Parameter(torch.randn_like(layer.router.weight))


def copy_while_kept(layer: Layer) -> Layer:
    """A copy made where a cache holds the layer's weights."""
    with torch.no_grad(), ExpertCache(1 << 30, [layer.experts]).in_use():
        layer(torch.randn(4, WIDTH))
        return copy.deepcopy(layer)


EVENTS: dict[str, Callable[[Layer], object]] = {
    "a deep copy": copy.deepcopy,
    "a deep copy in a cache": copy_while_kept,
    "pickled": lambda layer: pickle.loads(pickle.dumps(layer)),
    "sent to another process": ForkingPickler.dumps,
    "shared": lambda layer: layer.share_memory() and None,
    "a fused step": fused_step,
    "other data": swap_data,
    "negative bits": negate,
    "other memory": move_storage,
    "no memory": empty_storage,
    "trained": train,
    "in half precision and back": in_half_and_back,
    "other settings": others_threads,
    "another router": replace,
}


class Seen(TorchDispatchMode):
    """A mode that changes nothing."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Heard(TorchFunctionMode):
    """Another one."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def plainly(layer: Layer, x: Tensor) -> Tensor:
    with torch.no_grad():
        return layer(x)


def kept(layer: Layer, x: Tensor) -> Tensor:
    with torch.no_grad(), ExpertCache(1 << 30, [layer.experts]).in_use():
        layer(x)
        return layer(x)


def by_vjp(layer: Layer, x: Tensor) -> Tensor:
    y, pull = func.vjp(lambda rows: func.functional_call(layer, dict(layer.named_parameters()), rows), x)
    pull(torch.ones_like(y))
    return y


def by_grad(layer: Layer, x: Tensor) -> Tensor:
    def of_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
        y = layer(rows)
        return y.sum(), y

    return func.grad(of_rows, has_aux=True)(x)[1]


def in_modes(layer: Layer, x: Tensor) -> Tensor:
    with torch.no_grad(), Seen(), Heard():
        return layer(x)


def in_inference(layer: Layer, x: Tensor) -> Tensor:
    with torch.inference_mode():
        return layer(x).clone()


def in_a_fork(layer: Layer, x: Tensor) -> Tensor:
    """In a child, which inherits memory, caches and locks."""
    y = torch.full((len(x) + 1, WIDTH), torch.nan).share_memory_()[1:]
    child = multiprocessing.get_context("fork").Process(target=lambda: y.copy_(plainly(layer, x)))
    child.start()
    child.join()
    if child.exitcode and child.exitcode < 0:
        raise WrongNumbers(f"signal {-child.exitcode} in a fork")
    return plainly(layer, x) if child.exitcode else y  # which refuses here too


WAYS: dict[str, Callable[[Layer, Tensor], Tensor]] = {
    "plainly": plainly,
    "in a cache": kept,
    "with gradients": lambda layer, x: layer(x).detach(),
    "checkpointed": lambda layer, x: checkpoint(layer, x, use_reentrant=False).detach(),
    "by vjp": by_vjp,
    "by grad": by_grad,
    "by jvp": lambda layer, x: func.jvp(layer, (x,), (x,))[0],  # refused
    "by vmap": lambda layer, x: func.vmap(layer)(x[None])[0],  # refused
    "in modes": in_modes,
    "in inference mode": in_inference,
    "in a fork": in_a_fork,
}


def by_eager(layer: Layer, x: Tensor) -> Tensor:
    """What a new layer of the same numbers computes in PyTorch's own products."""
    fresh = copy.deepcopy(layer)
    fresh.load_state_dict({name: value.clone() for name, value in layer.state_dict().items()})
    fresh.to(x.dtype)
    for child in fresh.modules():
        if isinstance(child, nn.Module) and hasattr(child, "backend"):
            child.backend = "eager"
    with torch.no_grad(), use_backend("eager"):
        return fresh(x)


def live(seed: int) -> str:
    """One layer's life: some events, each followed by a call; returns it in words.

    Raises:
        WrongNumbers: see the class.
    """
    draw = random.Random(seed)
    torch.manual_seed(seed % 1000)
    shape, top_k = draw.choice(["separable", "light", "paper", "hidden"]), draw.choice([1, 2])
    config = mpoe.MPOEConfig(num_experts=4, shape=shape, router=mpoe.RouterConfig(top_k=top_k))
    layer = Layer(WIDTH, 24, config, activation="gelu", gated=draw.random() < 0.5, bias=draw.random() < 0.5).eval()
    words = [f"{shape} top-{top_k}"]
    events, ways = ([name for name in names if shape != "hidden" or "cache" not in name] for names in (EVENTS, WAYS))
    for _ in range(draw.choice([1, 2, 3])):
        plainly(layer, torch.randn(draw.choice([1, 4]), WIDTH))
        event, way = draw.choice(events), draw.choice(ways)
        words.append(f"{event}, {way}")
        print(": ".join((words[0], "; ".join(words[1:]))), flush=True)
        made = EVENTS[event](layer)
        layer = made if isinstance(made, Layer) else layer
        filler = [torch.full((size,), torch.nan) for size in range(1, 400)]  # takes memory that was freed
        x = torch.randn(draw.choice([0, 1, 5]), WIDTH)
        y = WAYS[way](layer, x)
        # Rounding may decide between two experts nowhere here: the router computes the same in every backend.
        if not torch.allclose(y, by_eager(layer, x), rtol=1e-3, atol=1e-4):
            raise WrongNumbers(f"{words} at {len(filler)}")
    return "; ".join(words)
