"""Launch plans: what an op starts for one problem, recorded once and started again and again from then on.

The kernel itself is the recorder: it computes once with tensors that have no memory, while launches are noted instead
of made. A problem is everything that what is launched depends on: sizes, strides, dtypes, which arguments are there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import lru_cache
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mpoe_kernels.linear.gpu import steps
from mpoe_kernels.linear.gpu.plan import Memory
from mpoe_kernels.planner import may_round_to_tf32
from mpoe_kernels.triton import tuning
from mpoe_kernels.triton.start import Step, recorded_for, recording, start_steps

MOST_PLANS = 2048  # of a few tens of kilobytes each


class _Layout(NamedTuple):
    """Of a tensor, what a plan depends on. Triton compiles for addresses that are multiples of 16 apart."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    beyond_16: int  # what remains of the address divided by 16

    def stand_in(self) -> Tensor:
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device="meta")


@dataclass(frozen=True)
class LaunchPlan:
    """What is launched.

    Attributes:
        steps: the launches; they name the call's tensors, then the results, then the scratch memory.
        scratch: bytes of the temporaries.
        results: shape and dtype of the tensors that a call gets.
    """

    steps: tuple[Step, ...]
    scratch: int
    results: tuple[tuple[torch.Size, torch.dtype], ...]

    def run(self, tensors: list[Tensor], addresses: list[int]) -> tuple[Tensor, ...]:
        """Compute with these tensors, which lie there."""
        device = tensors[0].device
        results = tuple([torch.empty(shape, dtype=dtype, device=device) for shape, dtype in self.results])
        made = [*results]
        if self.scratch:
            made.append(torch.empty(self.scratch, dtype=torch.uint8, device=device))
        start_steps(self.steps, [*tensors, *made], [*addresses, *[tensor.data_ptr() for tensor in made]])
        return results


class _OnlyLaunches(TorchDispatchMode):
    """Refuses what a plan would not repeat: all operations but views and new memory."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and "empty" not in func.overloadpacket.__name__:
            raise RuntimeError(f"a launch plan holds launches only; its recording met {func}")
        return func(*args, **(kwargs or {}))


@lru_cache(maxsize=MOST_PLANS)
def launch_plan(
    kernel: Callable[..., tuple[Tensor, ...]],
    signature: Any,
    problem: tuple[Any, ...],
    device: torch.device,
    conditions: tuple[Any, ...],
) -> LaunchPlan:
    """What a kernel launches.

    Args:
        kernel: computes, with nothing but launches between views and new memory.
        signature: dataclass of its first argument.
        problem: fields of that and the further arguments; tensors by their layouts.
        device: where tensors are.
        conditions: whatever else the launches depend on.
    """
    arguments = [value.stand_in() if isinstance(value, _Layout) else value for value in problem]
    memory = Memory()
    for value in arguments:
        if isinstance(value, Tensor):
            memory.give(value)
    count = len(signature.__dataclass_fields__)
    with recorded_for(device) as launches, _OnlyLaunches():
        results = kernel(signature(*arguments[:count]), *arguments[count:])
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
    return LaunchPlan(tuple(started), scratch, tuple((result.shape, result.dtype) for result in results))


# The plans by all that a call is, so that one alike finds its own in one step, before anybody asks how its tensors lie.
_FOUND: dict[tuple[Any, ...], LaunchPlan] = {}


def forget_plans() -> None:
    """Record every problem anew."""
    _FOUND.clear()
    launch_plan.cache_clear()


def _signature(call: Any) -> Any:
    return type(call)


@lru_cache(maxsize=16)
def _fields_of(signature: Any) -> Callable[[Any], tuple[Any, ...]]:
    return attrgetter(*signature.__dataclass_fields__)


def planned(kernel: Callable[..., Any], call: Any, *more: Any, dense: Collection[str] = steps.DENSE) -> Any:
    """``kernel(call, *more)`` of a call that is `steps.prepared`, by its launch plan.

    Tensors among the arguments are read as they lie; other arguments belong to the problem. Launches that are recorded
    for a tool, or that must be measured first (see `tuning`), are made by the kernel itself.

    Args:
        kernel: what is to be planned.
        call: its first argument, a dataclass.
        more: its further ones.
        dense: see `steps.prepared`.
    """
    if recording.get() is not None:
        return kernel(steps.prepared(call, dense), *more)
    x, signature = call.x, _signature(call)
    tensors: list[Tensor] = []
    addresses: list[int] = []
    key: list[Any] = [kernel, signature, x.device, may_round_to_tf32(x.dtype), tuning.active]
    for value in (*_fields_of(signature)(call), *more):
        if isinstance(value, Tensor):
            tensors.append(value)
            addresses.append(address := value.data_ptr())
            key += value.shape, value.stride(), value.dtype, address % 16
        else:
            key.append(tuple(value) if isinstance(value, list) else value)
    plan = _FOUND.get(found := tuple(key))
    if plan is not None:
        return plan.run(tensors, addresses)
    ready = steps.prepared(call, dense)
    if ready is not call:  # plans are those of prepared calls
        return planned(kernel, ready, *more, dense=dense)
    try:
        plan = _plan_of(kernel, call, more)
    except tuning.UnmeasuredError:
        return kernel(call, *more)
    if len(_FOUND) >= MOST_PLANS:
        _FOUND.clear()
    _FOUND[found] = plan
    return plan.run(tensors, addresses)


def _plan_of(kernel: Callable[..., Any], call: Any, more: tuple[Any, ...]) -> LaunchPlan:
    """The plan of a prepared call."""
    signature = _signature(call)
    problem: list[Any] = []
    for value in (*_fields_of(signature)(call), *more):
        if isinstance(value, Tensor):
            problem.append(_Layout(value.shape, value.stride(), value.dtype, value.data_ptr() % 16))
        else:
            problem.append(tuple(value) if isinstance(value, list) else value)
    conditions = may_round_to_tf32(call.x.dtype), tuning.active
    return launch_plan(kernel, signature, tuple(problem), call.x.device, conditions)
