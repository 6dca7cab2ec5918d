"""Random inputs: each works or is refused in our words; exhaustive, hundreds of each kind."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import resource
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils import logging

from mpoe import MPOEConfig, RouterConfig
from mpoe_kernels import MPOShape

from . import fuzz_commands
from .bad_arguments import bad_calls
from .fuzz import Case, checkpoints, data_files, odd, some, spoil_values, what_became_of
from .processes import SEED, fork

SHAPE = {"in_factors": [2, 3, 4], "out_factors": [4, 3, 4], "max_bond": 5}
GOOD: dict[type, dict[str, Any]] = {
    MPOEConfig: {
        "moe_type": "switch",
        "num_experts": 3,
        "expert_type": "mpo",
        "max_bond": 6,
        "separable_left": 4,
        "shape": {"up": SHAPE, "down": SHAPE},
        "shape_pattern": {".*wo": 4, "shared": "paper"},
        "light_p": 8,
        "gauge": "orthogonal",
        "auxiliary_noise": 0.1,
        "router": {"top_k": 2},
        "target_modules": ["ffn", "pooler"],
        "exclude_modules": ["encoder"],
        "layers_to_transform": [0, 2],
        "attention_max_bond": 3,
        "backend": "eager",
        "rate_ratios": {"up": [1.0, 0.5]},
        "tied_head": False,
    },
    RouterConfig: dataclasses.asdict(RouterConfig.gshard()),
    MPOShape: {**SHAPE, "central": 1, "in_features": 23, "out_features": 47},
}
_INNER = [field.name for kind in (RouterConfig, MPOShape) for field in dataclasses.fields(kind)]
_INNER += ["MPOEConfig", "RouterConfig", "MPOShape", "left", "right"]


def configurations(draw: random.Random) -> Iterator[Case]:
    """An endless stream."""
    while True:
        kind = draw.choice((MPOEConfig, MPOEConfig, RouterConfig, MPOShape))
        names = [field.name for field in dataclasses.fields(kind)]
        if draw.random() < 0.5:
            values = {name: good_or_odd(kind, name, draw) for name in some(draw, names, 4)}
            call = (
                partial(construct, kind, values) if kind is not MPOShape else partial(read, kind, {**SHAPE, **values})
            )
        else:
            values = spoil_values(GOOD[kind], draw)
            if draw.random() < 0.5:
                values = json.loads(json.dumps(values))
            call = partial(read, kind, values)
        # A shape or a router inside may be refused in its own words.
        yield Case(f"{kind.__name__} {values!r:.300}", call, [*names, *_INNER])


def good_or_odd(kind: type, name: str, draw: random.Random) -> Any:
    return GOOD[kind][name] if name in GOOD[kind] and draw.random() < 0.6 else odd(draw)


def construct(kind: type, values: dict[str, Any]) -> None:
    use(kind(**values))


def read(kind: Any, values: dict[str, Any]) -> None:
    use(kind.from_dict(values))


def use(made: Any) -> None:
    """What was accepted survives a round trip through JSON, and gives shapes or says why not."""
    again = type(made).from_dict(json.loads(json.dumps(made.to_dict())))
    if again != made:
        raise AssertionError(f"{made} is not what its JSON gives: {again}")
    if isinstance(made, MPOEConfig):
        made.shape_for("up", 24, 48)
        made.shape_for("down", 48, 24)


KINDS: dict[str, Callable[[random.Random, Path], Iterator[Case]]] = {
    "configurations": lambda draw, folder: configurations(draw),
    "command lines": fuzz_commands.cases,
    "data and configuration files": data_files,
    "checkpoints": checkpoints,
    "bad calls": bad_calls,
}


ROOM = 6 << 30  # bytes of address space that may be taken: a fair machine, not a huge one


def try_inputs(kind: str, count: int, seed: int, folder: Path) -> None:
    """In a child: new memory is filled with NaN, so that a result that holds what nobody wrote is seen."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, resource.RLIM_INFINITY))
    os.chdir(folder)  # where a relative path may lead to without harm
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    found: Counter[str] = Counter()
    for case, _ in zip(KINDS[kind](random.Random(f"{kind} {seed}"), folder), range(count), strict=False):
        print(case.what, flush=True)
        found[what_became_of(case)] += 1
    print(f"{kind}: {dict(found)}")
    assert found["worked"] > 0
    assert found["refused"] > 0


@pytest.mark.parametrize(("count", "seed"), [(50, 0), pytest.param(500, SEED, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("kind", KINDS)
def test_inputs(kind: str, count: int, seed: int, tmp_path: Path) -> None:
    """In a forked process: what that dies of, or hangs in, is its last words."""
    (folder := tmp_path / "in").mkdir()
    calls = kind == "bad calls"  # many names, and a call is short
    child = fork(lambda: try_inputs(kind, (1 + 3 * calls) * count, seed, folder), tmp_path / "log")
    try:
        status = child.wait(300 + count * 5)
    finally:
        print(said := child.log.read_text()[-3000:])
    assert status == 0, said


def test_the_command_lines_that_are_changed_work(tmp_path: Path) -> None:
    inside = fuzz_commands.prepare(tmp_path)
    for command in fuzz_commands.COMMANDS:
        fuzz_commands.run([command, *fuzz_commands.start_of(command, 0)], inside)
