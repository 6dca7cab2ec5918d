"""Random inputs: each works or is refused in our words. What public names take.

The default tests try a few of each kind, the exhaustive ones hundreds. A kind and a seed give the
same inputs again: a failure's log shows every input on a line, the last line is the one that
failed. ``SEED=3 pytest -m exhaustive tests/faults/test_fuzz.py -k files`` repeats an
exhaustive run that was started with ``SEED=3``; without it the seed is 0.
"""

import dataclasses
import json
import os
import random
import resource
import warnings
from collections import Counter
from functools import partial
from itertools import islice, product
from pathlib import Path

import pytest
import torch
from transformers.utils import logging

import mpoe
import mpoe_kernels
from mpoe import MPOEConfig, RouterConfig
from mpoe_kernels import MPOShape

from .bad_arguments import bad_calls, make_paths, starts, stray
from .fuzz import Case, data_files, odd, some, spoil_values, what_became_of
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
# A shape or a router inside a configuration may be refused in its own words.
NAMES_INSIDE = [
    field.name for kind in (RouterConfig, MPOShape) for field in dataclasses.fields(kind)
]
NAMES_INSIDE += ["MPOEConfig", "RouterConfig", "MPOShape", "left", "right"]


def configurations(draw):
    """An endless stream."""
    while True:
        kind = draw.choice((MPOEConfig, MPOEConfig, RouterConfig, MPOShape))
        names = [field.name for field in dataclasses.fields(kind)]
        if draw.random() < 0.5:
            values = {}
            for name in some(draw, names, 4):
                good = name in GOOD[kind] and draw.random() < 0.6
                values[name] = GOOD[kind][name] if good else odd(draw)
            if kind is MPOShape:
                make = partial(kind.from_dict, {**SHAPE, **values})
            else:
                make = partial(kind, **values)
        else:
            values = spoil_values(GOOD[kind], draw)
            if draw.random() < 0.5:
                values = json.loads(json.dumps(values))
            make = partial(kind.from_dict, values)
        what = f"{kind.__name__} {values!r:.300}"
        yield Case(what, partial(round_trip, make), [*names, *NAMES_INSIDE])


def round_trip(make):
    """What is accepted survives a round trip through JSON, and gives shapes or says why not."""
    made = make()
    again = type(made).from_dict(json.loads(json.dumps(made.to_dict())))
    if again != made:
        raise AssertionError(f"{made} is not what its JSON gives: {again}")
    if isinstance(made, MPOEConfig):
        made.shape_for("up", 24, 48)
        made.shape_for("down", 48, 24)


CASE_STREAMS = {
    "configurations": lambda draw, folder: configurations(draw),
    "data and configuration files": data_files,
    "bad calls": bad_calls,
}
# So many times as many as of other kinds: bad calls are of many names, and each is short.
TIMES_AS_MANY = {"bad calls": 4}


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
    outcomes = Counter()
    cases = CASE_STREAMS[kind](random.Random(f"{kind} {seed}"), folder)
    for case in islice(cases, count):
        print(case.what, flush=True)
        outcomes[what_became_of(case)] += 1
    print(f"{kind}: {dict(outcomes)}")
    assert outcomes["worked"] > 0
    assert outcomes["refused"] > 0


@pytest.mark.parametrize(
    "count, seed", [(25, 0), pytest.param(500, SEED, marks=pytest.mark.exhaustive)]
)
@pytest.mark.parametrize("kind", CASE_STREAMS)
def test_inputs(kind, count, seed, tmp_path):
    """In a forked process: what that dies of, or hangs in, is its last words."""
    folder = tmp_path / "in"
    folder.mkdir()
    many = count * TIMES_AS_MANY.get(kind, 1)
    child = fork(lambda: try_inputs(kind, many, seed, folder), tmp_path / "log")
    try:
        status = child.wait(300 + count * 5)
    finally:
        log = child.log.read_text()[-3000:]
        print(log)
    assert status == 0, log


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


def either_way(argument, axis):
    return {(argument, axis, -1), (argument, axis, 1)}


# (argument, axis, by): what may be longer (1) or shorter (-1): tokens, where no other tensor has
# them; features that come out.
ACCEPTED = {
    "MPOBlocks": {
        ("left", 1, 1),
        ("left", 2, 1),
        ("central", 1, 1),
        ("central", 2, 1),
        ("right", 2, 1),
        ("right", 3, 1),
    },
    "Routing": either_way("expert_offsets", 0),
    "combine": either_way("y_sorted", 1),
    "dispatch": either_way("x", 1),
    "grouped_mpo_linear": {("row_index", 0, 1), *either_way("slot_of_token", 1)},
    "mpo_embedding": either_way("ids", 0),
    "mpo_linear": either_way("x", 0),
    "neuron_experts": either_way("down", 2),
    "route": {*either_way("top_k_index", 0), ("top_k_index", 1, 1)},
}


def is_refused(function, arguments, change):
    """In our words; whatever else is raised names the change."""
    try:
        function(**arguments)
    except Exception as error:
        error.add_note(str(change))
        if isinstance(error, (TypeError, ValueError)) and " must " in str(error):
            return True
        raise
    return False


@pytest.mark.parametrize("name", [name for name in starts(Path()) if name in mpoe_kernels.__all__])
def test_every_size(name):
    """Of every axis of every tensor that an op takes: one more or less is refused, by name."""
    function, make = starts(Path())[name]
    function(**make())
    accepted = set()
    for argument, value in make().items():
        axes = range(value.dim()) if isinstance(value, torch.Tensor) else ()
        for axis, by in product(axes, (-1, 1)):
            change = argument, axis, by
            shape = list(value.shape)
            shape[axis] += by
            if not is_refused(function, {**make(), argument: value.new_zeros(shape)}, change):
                accepted.add(change)
    assert accepted == ACCEPTED.get(name, set())
