"""What public names take: calls that fit, and tensors of other sizes."""

from itertools import product
from pathlib import Path

import pytest
import torch

import mpoe
import mpoe_kernels

from .bad_arguments import make_paths, starts, stray

# Errors, the version, results that nobody makes by hand, and functions without arguments.
NOT_CALLED = {"BackendError", "DivergenceError", "__version__", "ContractionPlan", "Decomposition"}
NOT_CALLED |= {"available_backends", "backend_reasons"}


def test_every_public_name_has_a_call_that_fits(tmp_path):
    assert set(starts(tmp_path)) | NOT_CALLED == set(mpoe.__all__) | set(mpoe_kernels.__all__)


def test_the_unchanged_calls_work(tmp_path):
    make_paths(tmp_path)
    for name, (function, make) in starts(tmp_path).items():
        # Sharding wants a process group, and these three something that only their own tests build.
        if "shard" not in name and name not in {"MPOETrainer", "import_original", "lora_on_cores"}:
            assert stray(function(**make())) is None, name


# ------------------------------------------------------------------ other sizes

ACCEPTED = "accepted"


def either_way(argument, axis, outcome=ACCEPTED):
    return {(argument, axis, -1): outcome, (argument, axis, 1): outcome}


def factor(argument, axis, features):
    """A factor of a weight's features: a longer one is padding, a shorter one leaves too few."""
    return {(argument, axis, 1): ACCEPTED, (argument, axis, -1): features}


# By op: the changes (argument, axis, by) that are not refused by the argument's own name. A change
# is accepted, for the reason above it, or a check names another argument that has the same size.
OUTCOMES = {
    "MPOBlocks": {
        **factor("left", 1, "in_features"),
        **factor("left", 2, "out_features"),
        **factor("central", 1, "in_features"),
        **factor("central", 2, "out_features"),
        **factor("right", 2, "in_features"),
        **factor("right", 3, "out_features"),
    },
    # No other tensor has an axis of experts.
    "Routing": either_way("expert_offsets", 0),
    "decompose": {},
    "decompose_with_errors": {},
    # Rows of any width.
    "dispatch": either_way("x", 1),
    "combine": either_way("y_sorted", 1),
    # Any number of tokens or ids.
    "mpo_linear": either_way("x", 0),
    "mpo_embedding": either_way("ids", 0),
    # Any number of tokens, and of choices but none.
    "route": {**either_way("top_k_index", 0), ("top_k_index", 1, 1): ACCEPTED},
    "grouped_mpo_linear": {
        **either_way("x", 0, "slot_of_token"),
        # Slots beyond the last offset are no expert's; with fewer slots it lies beyond them.
        ("row_index", 0, 1): ACCEPTED,
        ("row_index", 0, -1): "expert_offsets",
        # Any number of choices of a token.
        **either_way("slot_of_token", 1),
    },
    "mpo_ffn": either_way("x", 0, "slot_of_token"),
    "hidden_experts": {
        **either_way("u", 0, "gates"),
        **either_way("u", 1, "right"),
        **either_way("gates", 1, "top_k_index"),
        **either_way("right", 0, "left"),
        **either_way("right", 1, "left"),
    },
    "neuron_experts": {
        **either_way("x", 0, "gates"),
        **either_way("x", 1, "up"),
        **either_way("gates", 1, "top_k_index"),
        **either_way("up", 0, "down"),
        **either_way("up", 1, "down"),
        # Results of any width.
        **either_way("down", 2),
    },
}


def tensors(make):
    """The arguments that are tensors. What is inside blocks and routings is refused by `MPOBlocks`
    and `Routing`; tests/kernels/test_refusals.py has chains of cores."""
    return {name: value for name, value in make().items() if isinstance(value, torch.Tensor)}


def outcome_of(function, arguments):
    """What a refusal says must be otherwise, or that there is none."""
    try:
        function(**arguments)
    except (TypeError, ValueError) as error:
        subject, must, _ = str(error).partition(" must ")
        if must:
            return subject
        raise
    return ACCEPTED


def test_every_op_with_tensors_has_outcomes():
    makers = {name: make for name, (_, make) in starts(Path()).items()}
    assert set(OUTCOMES) == {
        name for name in mpoe_kernels.__all__ if name in makers and tensors(makers[name])
    }


@pytest.mark.parametrize("name", OUTCOMES)
def test_every_size(name):
    """One more or less of every axis is refused by the argument's name, except for `OUTCOMES`."""
    function, make = starts(Path())[name]
    function(**make())
    outcomes = {}
    for argument, tensor in tensors(make).items():
        for axis, by in product(range(tensor.dim()), (-1, 1)):
            shape = list(tensor.shape)
            shape[axis] += by
            outcome = outcome_of(function, {**make(), argument: tensor.new_zeros(shape)})
            if argument not in outcome.split():
                outcomes[argument, axis, by] = outcome
    assert outcomes == OUTCOMES[name]
