"""Where a launch plan places its tensors in memory."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from mpoe_kernels.linear.gpu.plan import ALIGNMENT, SCRATCH, Memory


def meta(size: int) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8, device="meta")


@given(st.lists(st.tuples(st.integers(0, 600), st.integers(0, 8), st.integers(0, 8)), max_size=12))
def test_what_is_used_at_the_same_time_does_not_overlap(wanted: list[tuple[int, int, int]]) -> None:
    """Each tensor has a size in bytes, and a first and a last step."""
    memory = Memory()
    tensors = [(meta(size), min(ends), max(ends)) for size, *ends in wanted]
    pieces = {}
    for step in range(9):
        for k, (tensor, first, last) in enumerate(tensors):
            if step in (first, last):
                pieces[k] = memory.use(tensor, step)
    size = memory.lay_out()
    spans = [(pieces[k].place, tensor.numel(), first, last) for k, (tensor, first, last) in enumerate(tensors)]
    for k, (place, bytes_, first, last) in enumerate(spans):
        assert place % ALIGNMENT == 0
        assert place + bytes_ <= size
        for other, others, begin, end in spans[:k]:
            assert last < begin or end < first or place + bytes_ <= other or other + others <= place


def test_memory_is_used_again_once_nobody_reads_it() -> None:
    memory = Memory()
    first, second, third = (memory.use(meta(256), step) for step in range(3))
    assert memory.lay_out() == 256
    assert first.place == second.place == third.place == 0
    assert {first.number, second.number, third.number} == {SCRATCH}


def test_a_gap_that_just_suffices_is_filled() -> None:
    memory, lasting = Memory(), meta(256)
    memory.use(meta(256), 0)
    kept = memory.use(lasting, 0)
    filling = memory.use(meta(256), 1)
    memory.use(lasting, 2)
    assert memory.lay_out() == 512
    assert (filling.place, kept.place) == (0, 256)


def test_what_a_call_brings_takes_no_scratch_memory() -> None:
    memory, given_ = Memory(), [meta(256), meta(256)]
    for tensor in given_:
        memory.give(tensor)
    assert [memory.use(tensor[3:], 0).number for tensor in given_] == [0, 1], "views lie where their tensor does"
    assert memory.lay_out() == 0


def test_two_of_no_elements_are_two_all_the_same() -> None:
    memory = Memory()
    first, second = memory.use(meta(0), 0), memory.use(meta(0), 0)
    memory.lay_out()
    assert first.place != second.place
