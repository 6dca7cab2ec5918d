"""Calls of every public name: the arguments that fit work, and any other size is refused by name."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch

import mpoe
import mpoe_kernels

from .bad_arguments import make_paths, starts, stray

# Names that are no calls, or results that nobody makes by hand: a plan, a decomposition, an error.
NOT_CALLED = {
    "BackendError",
    "ContractionPlan",
    "Decomposition",
    "DivergenceError",
    "SharedDecomposition",
    "__version__",
    "available_backends",
    "backend_reasons",
}


def test_every_public_name_is_called(tmp_path: Path) -> None:
    assert set(starts(tmp_path)) | NOT_CALLED == set(mpoe.__all__) | set(mpoe_kernels.__all__)


def test_what_is_exchanged_worked(tmp_path: Path) -> None:
    make_paths(tmp_path)
    for name, (function, make) in starts(tmp_path).items():
        # Sharding wants a process group, and these three something that only their own tests build.
        if "shard" not in name and name not in {"MPOETrainer", "import_original", "lora_on_cores"}:
            assert stray(function(**make())) is None, name


# Axes that may have another, or a larger, size: tokens, where no other tensor has them; features that come out.
FREE = {
    "MPOBlocks": {f"{block} +1" for block in ("left 1", "left 2", "central 1", "central 2", "right 2", "right 3")},
    "Routing": {"expert_offsets 0"},
    "combine": {"y_sorted 1"},
    "decompose_shared": {"weights 0"},
    "dispatch": {"x 1"},
    "grouped_mpo_linear": {"row_index 0 +1", "slot_of_token 1"},
    "mpo_embedding": {"ids 0"},
    "mpo_linear": {"x 0"},
    "neuron_experts": {"down 2"},
    "route": {"top_k_index 0", "top_k_index 1 +1"},
}


@pytest.mark.parametrize("name", [name for name in starts(Path()) if name in mpoe_kernels.__all__])
def test_every_size(name: str) -> None:
    """Of every axis of every tensor that an op takes: one more or less is refused, by name."""
    function, make = starts(Path())[name]
    function(**make())
    for argument, value in make().items():
        shape = list(value.shape) if isinstance(value, torch.Tensor) else []
        for axis, more in product(range(len(shape)), (-1, 1)):
            if {f"{argument} {axis}", f"{argument} {axis} {more:+}"} & FREE.get(name, set()):
                continue
            wrong = value.new_zeros([size + more * (place == axis) for place, size in enumerate(shape)])
            with pytest.raises((TypeError, ValueError), match=" must "):
                function(**{**make(), argument: wrong})
