"""Random inputs: each works or is refused in our words; exhaustive, hundreds of each kind. What
public names take."""

import dataclasses
import json
import os
import random
import resource
import warnings
from collections import Counter
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
from transformers.utils import logging

import mpoe
import mpoe_kernels
from mpoe import MPOEConfig, RouterConfig
from mpoe_kernels import MPOShape
from tests.assertions import refuses

from . import fuzz_commands
from .bad_arguments import bad_calls, make_paths, starts, stray
from .fuzz import Case, checkpoints, data_files, odd, some, spoil_values, what_became_of
from .processes import SEED, fork

SHAPE = {"in_factors": [2, 3, 4], "out_factors": [4, 3, 4], "max_bond": 5}
GOOD = {
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


def configurations(draw):
    """An endless stream."""
    while True:
        kind = draw.choice((MPOEConfig, MPOEConfig, RouterConfig, MPOShape))
        names = [field.name for field in dataclasses.fields(kind)]
        if draw.random() < 0.5:
            good = {name: value for name, value in GOOD[kind].items() if draw.random() < 0.6}
            values = {
                name: good[name] if name in good else odd(draw) for name in some(draw, names, 4)
            }
            make = (
                partial(kind, **values)
                if kind is not MPOShape
                else partial(kind.from_dict, {**SHAPE, **values})
            )
        else:
            values = spoil_values(GOOD[kind], draw)
            if draw.random() < 0.5:
                values = json.loads(json.dumps(values))
            make = partial(kind.from_dict, values)
        # A shape or a router inside may be refused in its own words.
        yield Case(f"{kind.__name__} {values!r:.300}", partial(use, make), [*names, *_INNER])


def use(make):
    """What is accepted survives a round trip through JSON, and gives shapes or says why not."""
    made = make()
    again = type(made).from_dict(json.loads(json.dumps(made.to_dict())))
    if again != made:
        raise AssertionError(f"{made} is not what its JSON gives: {again}")
    if isinstance(made, MPOEConfig):
        made.shape_for("up", 24, 48)
        made.shape_for("down", 48, 24)


KINDS = {
    "configurations": lambda draw, folder: configurations(draw),
    "command lines": fuzz_commands.cases,
    "data and configuration files": data_files,
    "checkpoints": checkpoints,
    "bad calls": bad_calls,
}


ROOM = 6 << 30  # bytes of address space that may be taken: a fair machine, not a huge one


def try_inputs(kind, count, seed, folder):
    """In a child: new memory is filled with NaN, so that a result that holds what nobody wrote is
    seen."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, resource.RLIM_INFINITY))
    os.chdir(folder)  # where a relative path may lead to without harm
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    found = Counter()
    for case, _ in zip(
        KINDS[kind](random.Random(f"{kind} {seed}"), folder), range(count), strict=False
    ):
        print(case.what, flush=True)
        found[what_became_of(case)] += 1
    print(f"{kind}: {dict(found)}")
    assert found["worked"] > 0
    assert found["refused"] > 0


@pytest.mark.parametrize(
    "count, seed", [(25, 0), pytest.param(500, SEED, marks=pytest.mark.exhaustive)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_inputs(kind, count, seed, tmp_path):
    """In a forked process: what that dies of, or hangs in, is its last words."""
    (folder := tmp_path / "in").mkdir()
    calls = kind == "bad calls"  # many names, and a call is short
    child = fork(lambda: try_inputs(kind, (1 + 3 * calls) * count, seed, folder), tmp_path / "log")
    try:
        status = child.wait(300 + count * 5)
    finally:
        print(said := child.log.read_text()[-3000:])
    assert status == 0, said


def test_the_command_lines_that_are_changed_work(tmp_path):
    inside = fuzz_commands.prepare(tmp_path)
    for command in fuzz_commands.COMMANDS:
        fuzz_commands.run([command, *fuzz_commands.start_of(command, 0)], inside)


# ------------------------------------------------------------------ calls that fit, and other sizes


# Names that are no calls, or results that nobody makes by hand: a plan, a decomposition, an error.
NOT_CALLED = {"BackendError", "ContractionPlan", "Decomposition", "DivergenceError"}
NOT_CALLED |= {"__version__", "available_backends", "backend_reasons"}


def test_every_public_name_is_called(tmp_path):
    assert set(starts(tmp_path)) | NOT_CALLED == set(mpoe.__all__) | set(mpoe_kernels.__all__)


def test_what_is_exchanged_worked(tmp_path):
    make_paths(tmp_path)
    for name, (function, make) in starts(tmp_path).items():
        # Sharding wants a process group, and these three something that only their own tests build.
        if "shard" not in name and name not in {"MPOETrainer", "import_original", "lora_on_cores"}:
            assert stray(function(**make())) is None, name


# Axes that may have another, or a larger, size: tokens, where no other tensor has them; features
# that come out.
FREE = {
    "MPOBlocks": {
        f"{block} +1"
        for block in ("left 1", "left 2", "central 1", "central 2", "right 2", "right 3")
    },
    "Routing": {"expert_offsets 0"},
    "combine": {"y_sorted 1"},
    "dispatch": {"x 1"},
    "grouped_mpo_linear": {"row_index 0 +1", "slot_of_token 1"},
    "mpo_embedding": {"ids 0"},
    "mpo_linear": {"x 0"},
    "neuron_experts": {"down 2"},
    "route": {"top_k_index 0", "top_k_index 1 +1"},
}


@pytest.mark.parametrize("name", [name for name in starts(Path()) if name in mpoe_kernels.__all__])
def test_every_size(name):
    """Of every axis of every tensor that an op takes: one more or less is refused, by name."""
    function, make = starts(Path())[name]
    function(**make())
    for argument, value in make().items():
        shape = list(value.shape) if isinstance(value, torch.Tensor) else []
        for axis, more in product(range(len(shape)), (-1, 1)):
            if {f"{argument} {axis}", f"{argument} {axis} {more:+}"} & FREE.get(name, set()):
                continue
            wrong = value.new_zeros(
                [size + more * (place == axis) for place, size in enumerate(shape)]
            )
            refuses((TypeError, ValueError), " must ", function, **{**make(), argument: wrong})
