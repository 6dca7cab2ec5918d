"""Bad calls of every public name, each in a forked child: it works or refuses in our words, whatever it is given.

A call starts from arguments that fit; one or two of them are then exchanged for something of another kind, size, device
or dtype, or for a path that is not what it seems. In the child all fresh memory is filled with NaN (the largest number,
of integers), so that a result that holds what nobody wrote is seen. What a child dies of is seen by its parent.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import random
import resource
import signal
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

import mpoe
import mpoe_kernels
from mpoe.cli.command import is_on_purpose
from mpoe_kernels.checks import check_memory

from .bad_arguments import exchange, make_paths, of_raw_ops, starts
from .life_cycles import WrongNumbers, live
from .processes import Child, fork

LIFE = "the life of a layer"
SECONDS = 30  # that a call may take
LIVES = 12  # for every round of the names
AT_ONCE = 4  # children
ROOM = 6 << 30  # bytes of address space that a call may take: a fair machine, not a huge one
WORKED, REFUSED, INSIDE, STRAY, WRONG = 0, 2, 3, 4, 5  # exit statuses of a child; HANGS is the parent's


@dataclass(frozen=True)
class Call:
    """A call by name, its arguments, and which of them were exchanged for what."""

    name: str
    function: Callable[..., Any]
    arguments: dict[str, Any]
    what: str
    tidy: bool  # whether all numbers among the arguments are finite, so that the result's must be


@dataclass
class Outcome:
    """Counts over many calls, by name."""

    worked: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)


def bad_call(name: str, seed: int, folder: Path) -> Call:
    """The call of ``name`` that ``seed`` makes; what exchanging an argument raises is raised when it is made."""
    draw = random.Random(seed)
    torch.manual_seed(seed % 1000)
    function, make = callable_names(folder)[name]
    arguments, what = make(), []
    if "backend" in arguments:
        arguments["backend"] = draw.choice([arguments["backend"], "eager", "native"])
    wanted = draw.sample(list(arguments), min(len(arguments), draw.choice([1, 1, 2])))
    for argument in wanted:
        said, arguments[argument] = exchange(arguments[argument], draw, folder)
        what.append(f"{argument} {said}")
    text = ", ".join(what)
    tidy = not any(word in text for word in ("NaN", "nan", "inf", "3e38", "1e300"))
    return Call(name, function, arguments, f"{name} (seed {seed}): {text}", tidy)


def callable_names(folder: Path) -> dict[str, Any]:
    """Public names and raw ops, and lives of layers, whose only argument is their seed."""
    return {**starts(folder), **of_raw_ops()}


# ------------------------------------------------------------------ what comes of them

# PyTorch's own refusals: views of a storage that is too short, layouts without a kernel, types that a schema excludes.
PYTORCHS = ("setStorage: ", "Could not run ", "ested", "parse", "kldnn", "Cast error details: ", "materialize all")


def tensors_of(value: Any, depth: int = 0) -> Iterator[torch.Tensor]:
    """Every tensor in a result."""
    if isinstance(value, torch.Tensor):
        yield value.detach()
    elif isinstance(value, torch.nn.Module):
        yield from (parameter.detach() for parameter in value.parameters())
    elif isinstance(value, dict):
        value = tuple(value.values())
    elif hasattr(value, "__dataclass_fields__"):
        value = tuple(getattr(value, name) for name in value.__dataclass_fields__)
    if isinstance(value, (list, tuple)) and depth < 3:
        for item in value:
            yield from tensors_of(item, depth + 1)


def stray(result: Any) -> str | None:
    """What a result holds that nobody wrote: NaN, or the largest integer, with which fresh memory is filled."""
    held: list[torch.Tensor] = []
    for tensor in tensors_of(result):
        if tensor.is_meta or tensor.layout != torch.strided or tensor.is_nested or not 0 < tensor.numel() <= 1 << 24:
            continue
        with contextlib.suppress(ValueError):
            check_memory("result", tensor)  # an argument without its memory that was given back is not to be read
            held.append(tensor)
    for tensor in held:
        if tensor.is_floating_point() and bool(tensor.isnan().any()):
            return f"NaN in a result {list(tensor.shape)}"
        if tensor.dtype in (torch.int32, torch.int64) and bool((tensor == torch.iinfo(tensor.dtype).max).any()):
            return f"the largest integer in a result {list(tensor.shape)}"
    return None


def answer(name: str, seed: int, folder: Path) -> int:
    """In a child: make the call and say what came of it, as an exit status; what is odd is printed."""
    with contextlib.suppress(OSError, ValueError):
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, resource.RLIM_INFINITY))
    os.chdir(folder)  # where a relative path may lead to without harm
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        if name == LIFE:
            print(live(seed))
            return WORKED
        call = bad_call(name, seed, folder)
        print(call.what, flush=True)
        result = call.function(**call.arguments)
    except WrongNumbers as error:
        print(error)
        return WRONG
    except Exception as error:
        said_by_us = is_on_purpose(error) or (isinstance(error, IndexError) and "; got " in str(error))
        said_by_pytorch = isinstance(error, RuntimeError) and any(words in str(error) for words in PYTORCHS)
        if str(error) and (said_by_us or said_by_pytorch):
            print(f"{type(error).__name__}: {error}")
            return REFUSED
        traceback.print_exc()
        return INSIDE
    found = stray(result) if call.tidy else None
    if found:
        print(found)
        return STRAY
    return WORKED


WORDS = {INSIDE: "an error from inside", STRAY: "memory that nobody wrote", WRONG: "wrong numbers"}


def judge(child: Child, name: str, seed: int, outcome: Outcome) -> None:
    """Count what became of a child."""
    try:
        status = child.wait(SECONDS)
    except TimeoutError:
        outcome.problems.append(f"{name} (seed {seed}): hangs: {child.log.read_text()[:300]}")
        return
    finally:
        said = child.log.read_text() if child.log.exists() else ""
        child.log.unlink(missing_ok=True)
    if status == WORKED:
        outcome.worked[name] += 1
    elif status == REFUSED:
        outcome.refused[name] += 1
    else:
        word = f"signal {-status}" if status < 0 else WORDS.get(status, f"exit status {status}")
        lines = [line for line in said.splitlines() if line.strip()]
        outcome.problems.append(f"{lines[0] if lines else name}: {word}: {' | '.join(lines[-2:])[-400:]}")


def run_calls(count: int, seed: int, folder: Path) -> Outcome:
    """Make ``count`` bad calls, each in a child of its own."""
    draw, outcome = random.Random(f"bad calls {seed}"), Outcome()
    folder.mkdir(parents=True, exist_ok=True)
    make_paths(folder)
    importlib.import_module("torch._dynamo")  # which transforms and modes import: seconds in every child
    names = [*callable_names(folder), *[LIFE] * LIVES]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a pool of threads cannot be forked
    going: list[tuple[Child, str, int]] = []
    try:
        for made in range(count):
            name, number = names[made % len(names)], draw.randrange(1 << 40)
            work = partial(lambda name, number: end(answer(name, number, folder)), name, number)
            going.append((fork(work, folder / f"{made}.log"), name, number))
            if len(going) == AT_ONCE:
                judge(*going.pop(0), outcome)
        for each in going:
            judge(*each, outcome)
    finally:
        torch.set_num_threads(threads)
    return outcome


def end(status: int) -> None:
    raise SystemExit(status)


def public_names() -> set[str]:
    return set(mpoe.__all__) | set(mpoe_kernels.__all__)


def main() -> None:
    """`python -m tests.faults.bad_calls NAME SEED FOLDER`: one call of a report again, in this process."""
    import sys

    folder = Path(sys.argv[3]).resolve()
    if not (folder / "model").is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        make_paths(folder)
    print(json.dumps({"status": answer(sys.argv[1], int(sys.argv[2]), folder)}))
    signal.alarm(0)


if __name__ == "__main__":
    main()
