"""What happens to a layer between two of its calls; after each, it computes what its parameters
say, or refuses."""

import copy
import multiprocessing
import pickle
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from torch import func, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from mpoe.layers.expert_cache import ExpertCache
from mpoe_kernels import available_backends, use_backend
from tests.assertions import in_threads, refuses, torch_threads

from .test_native_calls import I, made


def fused_step(layer):
    for parameter in layer.parameters():
        parameter.grad = torch.randn_like(parameter)
    torch.optim.AdamW(layer.parameters(), lr=0.05, fused=True).step()


def data_of(change):
    """Other memory and values in the same parameters."""

    def event(layer):
        for parameter in layer.parameters():
            parameter.data = change(parameter.data)

    return event


def move_storage(layer):
    """Other memory under the same tensors, as a sharded layer's parameters get it before a pass."""
    for parameter in layer.parameters():
        storage, values = parameter.untyped_storage(), parameter.detach().clone()
        size = storage.nbytes()
        storage.resize_(0)
        storage.resize_(size)
        parameter.data.copy_(values)


def empty_storage(layer):
    """As a sharded layer's between its passes."""
    for parameter in layer.experts.parameters():
        parameter.untyped_storage().resize_(0)


def train(layer):
    layer.train()(torch.randn(5, I)).sum().backward()
    layer.eval().zero_grad()


def others_threads(layer):
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)


def replace(layer):
    layer.router.weight = nn.Parameter(torch.randn(I, len(layer.router.weight)).t())
    for _, parent in list(layer.experts.named_modules()):
        for name, parameter in list(parent.named_parameters(recurse=False)):
            setattr(parent, name, nn.Parameter(torch.randn_like(parameter)))


def copy_while_kept(layer):
    """A copy made where a cache holds the layer's weights."""
    with torch.no_grad(), ExpertCache(1 << 30, [layer.experts]).in_use():
        layer(torch.randn(4, I))
        return copy.deepcopy(layer)


EVENTS = {
    "a deep copy": copy.deepcopy,
    "a deep copy in a cache": copy_while_kept,
    "pickled": lambda layer: pickle.loads(pickle.dumps(layer)),
    "sent to another process": ForkingPickler.dumps,
    "shared": lambda layer: layer.share_memory() and None,
    "a fused step": fused_step,
    "other data": data_of(lambda data: data * 1.25),
    "data with gaps": data_of(lambda data: torch.stack([data, data], -1)[..., 0]),
    "negative bits": data_of(lambda data: torch._neg_view(data)),
    "other memory": move_storage,
    "no memory": empty_storage,
    "trained": train,
    "in half precision and back": lambda layer: layer.bfloat16().float() and None,
    "other settings": others_threads,
    "other parameters": replace,
    "another activation": lambda layer: setattr(layer.experts, "activation", "relu"),
}


class Seen(TorchDispatchMode):
    """A mode that changes nothing."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Heard(TorchFunctionMode):
    """Another one."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def plainly(layer, x):
    return layer(x)


@torch.no_grad()
def kept(layer, x):
    with ExpertCache(1 << 30, [layer.experts]).in_use():
        layer(x)
        return layer(x)


def by_vjp(layer, x):
    y, pull = func.vjp(
        lambda rows: func.functional_call(layer, dict(layer.named_parameters()), rows), x
    )
    pull(torch.ones_like(y))
    return y


def by_grad(layer, x):
    def of_rows(rows):
        y = layer(rows)
        return y.sum(), y

    return func.grad(of_rows, has_aux=True)(x)[1]


@torch.no_grad()
def in_modes(layer, x):
    with Seen(), Heard():
        return layer(x)


@torch.inference_mode()
def in_inference(layer, x):
    return layer(x).clone()


def in_a_fork(layer, x):
    """In a child, which inherits memory, caches and locks."""
    y = torch.full((len(x) + 1, I), torch.nan).share_memory_()[1:]
    with torch_threads(1):  # a pool of threads cannot be forked
        child = multiprocessing.get_context("fork").Process(
            target=lambda: y.copy_(plainly(layer, x))
        )
        child.start()
        child.join()
    assert child.exitcode >= 0, f"signal {-child.exitcode} in a fork"
    return plainly(layer, x) if child.exitcode else y  # which refuses here too


def by_threads(layer, x):
    """They share the layer, each with its own order of the rows, again and again."""
    found = in_threads(4, lambda n: [plainly(layer, x.roll(n, 0)).roll(-n, 0) for _ in range(3)])
    for own in found:
        torch.testing.assert_close(own, [found[0][0]] * 3)
    return found[0][0]


WAYS = {
    "plainly": plainly,
    "in a cache": kept,
    "with gradients": lambda layer, x: layer(x).detach(),
    "checkpointed": lambda layer, x: checkpoint(layer, x, use_reentrant=False).detach(),
    "by vjp": by_vjp,
    "by grad": by_grad,
    "in modes": in_modes,
    "in inference mode": in_inference,
    "in a fork": in_a_fork,
    "in threads": by_threads,
}


def by_eager(layer):
    """A new layer of the same numbers, computed by PyTorch's own products."""
    fresh = copy.deepcopy(layer)
    fresh.load_state_dict({name: value.clone() for name, value in layer.state_dict().items()})
    for child in fresh.modules():
        if hasattr(child, "backend"):
            child.backend = "eager"
    return lambda x: use_backend("eager")(plainly)(fresh, x)


@pytest.fixture(autouse=True)
def _settings():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


KINDS = ("separable", "light", "paper", "hidden", "neurons")


@pytest.mark.skipif("native" not in available_backends(), reason="the native kernels are not built")
@pytest.mark.parametrize("every_way", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_is_its_parameters(kind, event, every_way):
    """After every event, in every way of a call: with no token, with one and with several.

    By default in every fifth way, others of the next kind and of the next event: the ways take
    turns.
    """
    ways = {
        name: way
        for name, way in WAYS.items()
        if kind not in ("hidden", "neurons") or "cache" not in name
    }
    if "cache" in event and ways.keys() != WAYS.keys():
        pytest.skip("there is nothing to cache")
    turn = KINDS.index(kind) + list(EVENTS).index(event)
    for place, take in enumerate(ways.values()):
        if not every_way and (place + turn) % 5:
            continue
        layer = made(kind, gated=place % 2 == 0, bias=place % 3 == 0)
        for tokens in (4, 1, 4):
            plainly(layer, torch.randn(tokens, I))
        other = EVENTS[event](layer)
        layer = other if isinstance(other, nn.Module) else layer
        filler = [
            torch.full((size,), torch.nan) for size in range(1, 400)
        ]  # takes memory that was freed
        if event == "no memory":
            refuses(
                (ValueError, RuntimeError),
                r"must hold its values|setStorage: .* out of bounds",
                take,
                layer,
                torch.randn(5, I),
            )
            continue
        wanted = by_eager(layer)
        for tokens in (5,) if take is in_a_fork else (0, 1, 5):
            x = torch.randn(tokens, I)
            torch.testing.assert_close(take(layer, x), wanted(x), rtol=1e-3, atol=1e-4)
        assert len(filler) == 399
