"""Random inputs: each works or is refused in our words.

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
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers.utils import logging

from mpoe import MPOEConfig, RouterConfig
from mpoe_kernels import MPOShape

from .bad_arguments import bad_calls
from .fuzz import Case, data_files, sample_of, spoil_values, unusual, what_became_of
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
    """Endless random configurations: some fields drawn at random, or a good one spoilt."""
    while True:
        kind = draw.choice((MPOEConfig, MPOEConfig, RouterConfig, MPOShape))
        names = [field.name for field in dataclasses.fields(kind)]
        if draw.random() < 0.5:
            values = {}
            for name in sample_of(draw, names, 4):
                good = name in GOOD[kind] and draw.random() < 0.6
                values[name] = GOOD[kind][name] if good else unusual(draw)
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
# Bytes of address space that inputs may take, so that sizes for which only a huge machine has the
# memory fail on every machine.
ROOM = 6 << 30


def try_inputs(kind, count, seed, folder):
    """Try ``count`` inputs, in a child process. It fails at the first one that is neither accepted
    nor refused in our words, and in the end if none of all was accepted, or none refused.

    New memory is filled with NaN, so that a result that holds what nobody wrote is seen.
    """
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, resource.RLIM_INFINITY))
    os.chdir(folder)  # a relative path does no harm there
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
    """In a forked process, so that one that dies or hangs leaves a log whose last line says in
    what."""
    folder = tmp_path / "in"
    folder.mkdir()
    count *= TIMES_AS_MANY.get(kind, 1)
    child = fork(lambda: try_inputs(kind, count, seed, folder), tmp_path / "log")
    try:
        status = child.wait(300 + count * 5)
    finally:
        log = child.log.read_text()[-3000:]
        print(log)
    assert status == 0, log
