"""Launch plans: the launches of an op for one problem, recorded once and then replayed.

The kernel itself is run for recording: it computes once with tensors that have no memory, while launches are recorded
instead of made. A problem is everything that the launches depend on: sizes, strides, dtypes, which arguments are given.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import lru_cache
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mpoe_kernels.linear.gpu import steps
from mpoe_kernels.linear.gpu.plan import Memory
from mpoe_kernels.triton import tuning
from mpoe_kernels.triton.start import Step, recorded_for, recording, start_steps

MOST_PLANS = 2048  # of a few tens of kilobytes each


@dataclass(frozen=True)
class LaunchPlan:
    """The recorded launches.

    Attributes: steps: the launches; they index the call's tensors, then the results, then the scratch buffer. scratch:
        bytes of the temporaries. results: shape, strides and dtype of the call's results.
    """

    steps: tuple[Step, ...]
    scratch: int
    results: tuple[tuple[torch.Size, tuple[int, ...], torch.dtype], ...]

    def run(self, tensors: list[Tensor], addresses: list[int]) -> tuple[Tensor, ...]:
        """Compute with these tensors, which lie there; both lists grow by what is made."""
        device, empty = tensors[0].device, torch.empty_strided  # which PyTorch reads in half the time of `empty`
        results = tuple([empty(shape, strides, dtype=dtype, device=device) for shape, strides, dtype in self.results])
        tensors += results
        if self.scratch:
            tensors.append(empty((self.scratch,), (1,), dtype=torch.uint8, device=device))
        addresses += [tensor.data_ptr() for tensor in tensors[len(addresses) :]]
        start_steps(self.steps, tensors, addresses)
        return results


class _OnlyLaunches(TorchDispatchMode):
    """Refuses operations that a plan would not repeat: everything except views and new memory."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and "empty" not in func.overloadpacket.__name__:
            raise RuntimeError(f"a launch plan holds launches only; its recording met {func}")
        return func(*args, **(kwargs or {}))


def record(kernel: Callable[..., tuple[Tensor, ...]], call: Any, more: tuple[Any, ...]) -> LaunchPlan:
    """Record the launches of ``kernel(call, *more)``, which may otherwise only make views and new memory.

    Args: kernel: the kernel. call: a dataclass, `steps.prepared`. more: further arguments.
    """
    memory = Memory()

    def stand_in(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        found = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        memory.give(found)
        return found

    signature = type(call)
    arguments = [stand_in(getattr(call, name)) for name in signature.__dataclass_fields__]
    further = [stand_in(value) for value in more]
    with recorded_for(call.x.device) as launches, _OnlyLaunches():
        results = kernel(signature(*arguments), *further)
    for result in results:
        memory.give(result)
    tensors = [{name: v for name, v in launch.arguments.items() if isinstance(v, Tensor)} for launch in launches]
    pieces = [{name: memory.use(v, step) for name, v in named.items()} for step, named in enumerate(tensors)]
    scratch = memory.lay_out()
    started = []
    for launch, named, where in zip(launches, tensors, pieces, strict=True):
        places = {
            name: (where[name].number, where[name].place + int(tensor.storage_offset()) * tensor.itemsize, tensor.dtype)
            for name, tensor in named.items()
        }
        started.append(Step(launch.kernel, launch.grid, {**launch.arguments, **dict.fromkeys(places)}, places))
    made = tuple((result.shape, result.stride(), result.dtype) for result in results)
    return LaunchPlan(tuple(started), scratch, made)


_CONSTANTS = frozenset((type(None), bool, int, str))  # types of arguments other than tensors and lists
_PLANS: dict[tuple[Any, ...], LaunchPlan] = {}  # by their problems


def forget_plans() -> None:
    """Record every problem again."""
    _PLANS.clear()


@lru_cache(maxsize=16)
def _fields_of(signature: Any) -> Callable[[Any], tuple[Any, ...]]:
    return attrgetter(*signature.__dataclass_fields__)


def planned(kernel: Callable[..., Any], call: Any, *more: Any, dense: Collection[str] = steps.DENSE) -> Any:
    """``kernel(call, *more)`` of a call that is `steps.prepared`, by its launch plan.

    Tensors among the arguments are read in place; other arguments are part of the problem. If launches are recorded for
    a tool, or must be measured first (see `tuning`), the kernel runs directly.

    Args:
        kernel: the kernel to plan.
        call: its first argument, a dataclass.
        more: its other arguments.
        dense: see `steps.prepared`.
    """
    if recording.get() is not None:
        return kernel(steps.prepared(call, dense), *more)
    x = call.x
    signature: Any = type(call)
    tensors: list[Tensor] = []
    addresses: list[int] = []
    precision = torch.backends.cuda.matmul.fp32_precision
    problem: list[Any] = [kernel, signature, x.device, precision, tuning.active]
    for value in (*_fields_of(signature)(call), *more):
        kind = type(value)
        if kind in _CONSTANTS:
            problem.append(value)
        elif kind is list:
            problem.append(tuple(value))
        else:
            tensors.append(value)
            addresses.append(address := value.data_ptr())
            # For contiguous tensors strides are redundant. Triton specialises on addresses that are multiples of 16.
            problem += value.shape, value.is_contiguous() or value.stride(), value.dtype, address % 16
    plan = _PLANS.get(key := tuple(problem))
    if plan is None:
        ready = steps.prepared(call, dense)
        if ready is not call:  # plans are those of prepared calls
            return planned(kernel, ready, *more, dense=dense)
        try:
            plan = record(kernel, call, more)
        except tuning.UnmeasuredError:
            return kernel(call, *more)
        if len(_PLANS) >= MOST_PLANS:
            _PLANS.clear()
        _PLANS[key] = plan
    return plan.run(tensors, addresses)
