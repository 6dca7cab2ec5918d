"""Multi-task sampling: probabilities, agreement of ranks, resumption, and what is visited."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from mpoe.data.sampler import MultiTaskBatchSampler, TemperatureSampler

SIZES = {"large": 1600, "small": 100}


@pytest.mark.parametrize(
    ("temperature", "share"),
    [(1.0, 16 / 17), (2.0, 4 / 5), (4.0, 2 / 3), (float("inf"), 1 / 2)],
)
def test_probabilities_by_hand_and_in_the_draws(temperature, share):
    sampler = TemperatureSampler(SIZES, temperature, seed=1)
    assert sampler.probabilities["large"] == pytest.approx(share)
    assert sum(sampler.probabilities.values()) == pytest.approx(1.0)
    assert np.mean(sampler.indices(0, 20_000) == 0) == pytest.approx(share, abs=0.015)


def test_a_step_number_is_the_whole_state():
    sampler = TemperatureSampler(SIZES, 3.0, seed=7)
    whole = sampler.indices(0, 200)
    for start in range(30):
        np.testing.assert_array_equal(TemperatureSampler(SIZES, 3.0, seed=7).indices(start, 200), whole[start:])
    assert [sampler.task_at(step) for step in range(50)] == [sampler.names[i] for i in whole[:50]]
    assert not np.array_equal(TemperatureSampler(SIZES, 3.0, seed=8).indices(0, 200), whole)
    assert TemperatureSampler({"a": 10**300, "b": 1}, 0.001).probabilities["a"] == 1.0


@pytest.mark.parametrize(
    ("sizes", "temperature", "message"),
    [
        ({}, 1.0, "at least one task"),
        ({"a": 0}, 1.0, r"sizes\['a'\] must be at least 1; got 0"),
        ({"a": 1}, 0.0, "temperature must be > 0; got 0"),
        ({"a": 1}, float("nan"), "temperature must be > 0"),
    ],
)
def test_sampler_refuses(sizes, temperature, message):
    with pytest.raises(ValueError, match=message):
        TemperatureSampler(sizes, temperature)


def batches(**changes) -> list[list[int]]:
    fields = {"sizes": {"a": 10, "b": 7}, "batch_size": 3, "num_steps": 40, "temperature": 2.0, "seed": 5, **changes}
    return list(MultiTaskBatchSampler(**fields))


def task_of(batch: list[int]) -> str:
    tasks = {"a" if index < 10 else "b" for index in batch}
    assert len(tasks) == 1, f"batch {batch} mixes tasks"
    return tasks.pop()


def test_one_task_per_step_on_all_ranks_and_micro_batches():
    ranks = [batches(rank=r, world_size=2, accumulation=2) for r in range(2)]
    assert len(ranks[0]) == len(ranks[1]) == 80
    for step in range(40):
        micro = [ranks[r][2 * step + m] for r in range(2) for m in range(2)]
        assert len({task_of(batch) for batch in micro}) == 1
    expected = TemperatureSampler({"a": 10, "b": 7}, 2.0, 5).indices(0, 40)
    assert ["ab".index(task_of(batch)) for batch in ranks[0][::2]] == expected.tolist()


def test_every_item_once_per_pass():
    for world in (1, 2):
        ranks = [batches(rank=r, world_size=world) for r in range(world)]
        for name, first, size in (("a", 0, 10), ("b", 10, 7)):
            visited = [
                i for step in zip(*ranks, strict=True) for batch in step if task_of(batch) == name for i in batch
            ]
            for turn in range(len(visited) // size):
                assert sorted(visited[turn * size : (turn + 1) * size]) == list(range(first, first + size))
            assert visited[:size] != visited[size : 2 * size]


def test_resuming_continues_exactly():
    whole = batches(accumulation=2)
    for step in (0, 1, 17, 40):
        assert batches(accumulation=2, start_step=step) == whole[2 * step :]
    sampler = MultiTaskBatchSampler({"a": 10}, 3, 10)
    assert len(sampler) == 10
    sampler.set_step(4)
    assert len(sampler) == len(list(sampler)) == 6


def test_batches_larger_than_the_data_are_full():
    assert Counter(i for batch in batches(sizes={"a": 2}, batch_size=5, num_steps=2) for i in batch) == {0: 5, 1: 5}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1; got 0"),
        ({"accumulation": 0}, "accumulation must be at least 1"),
        ({"rank": 2, "world_size": 2}, r"rank must be in \[0, world_size=2\); got 2"),
        ({"num_steps": -1}, "num_steps must be at least 0"),
        ({"start_step": 41}, r"step must be in \[0, num_steps=40\]; got 41"),
    ],
)
def test_batch_sampler_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        batches(**changes)
