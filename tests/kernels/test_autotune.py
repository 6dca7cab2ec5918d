"""The choice by one timing: what is timed, what it depends on, where nothing is timed, and the file
that keeps it."""

import errno
import json
import os
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mpoe_bench.cases import random_blocks
from torch._subclasses.fake_tensor import FakeTensorMode

from mpoe_kernels import grouped_mpo_linear
from mpoe_kernels.contract import STRATEGIES, BlockDims, autotune, kept
from mpoe_kernels.contract.autotune import adopt, choices, resolve_contraction
from mpoe_kernels.contract.ranking import Problem
from tests.assertions import in_threads, refuses, torch_threads
from tests.cases import SMALL_SHAPES, either

LINEAR = "grouped_mpo_linear"
DIMS = BlockDims(8, 8, 64, 12, 48, 64, 8, 8, 768, 3072)
pytestmark = pytest.mark.usefixtures("empty_cache")
PROBLEM = Problem(LINEAR, DIMS, 8, 64, torch.float32, "cpu")


def test_the_fastest_is_kept(seconds, empty_cache):
    chosen = resolve_contraction(PROBLEM)
    assert chosen.backend == "second"
    assert chosen.strategy == PROBLEM.plans()[0].strategy
    assert list(choices().values()) == [f"second {chosen.strategy}"]
    assert json.loads(empty_cache.read_text()) == {"version": 1, "choices": choices()}
    seconds["second"] = 3.0
    assert resolve_contraction(PROBLEM).backend == "second", "from memory"
    autotune.forget()
    assert resolve_contraction(PROBLEM).backend == "second", "from the file"
    empty_cache.unlink()
    autotune.forget()
    assert resolve_contraction(PROBLEM).backend == "first", "timed again"


def test_one_choice_for_rows_up_to_a_power_of_two(seconds):
    for slots in (33, 50, 64):
        resolve_contraction(PROBLEM._replace(slots=slots))
    assert len(choices()) == 1
    resolve_contraction(PROBLEM._replace(slots=65))
    assert len(choices()) == 2
    assert PROBLEM._replace(slots=0).rounded().slots == 0


@pytest.mark.parametrize(
    "change",
    [
        {"dims": DIMS._replace(a=32)},
        {"num_experts": 4},
        {"dtype": torch.bfloat16},
        {"op": f"{LINEAR}_backward"},
        {"need": (True, True, False, True)},
        {"strategy": "chain"},
    ],
)
def test_what_a_choice_depends_on(seconds, change):
    resolve_contraction(PROBLEM)
    resolve_contraction(PROBLEM._replace(**change))
    assert len(choices()) == 2


def test_threads_versions_and_instructions_are_part_of_the_key(seconds, monkeypatch):
    for threads in (1, 2):
        with torch_threads(threads):
            resolve_contraction(PROBLEM)
    assert len(choices()) == 2
    for name in ("__version__", "processor_name"):
        value = "another" if name == "__version__" else lambda: "another"
        monkeypatch.setattr(autotune, name, value)
        resolve_contraction(PROBLEM)
    monkeypatch.setattr(torch, "__version__", "9.9")
    resolve_contraction(PROBLEM)
    monkeypatch.setitem(autotune.NATIVE_LIBRARY.info, "build", "of another state of the sources")
    resolve_contraction(PROBLEM)
    assert len(choices()) == 6


def ranked():
    found = resolve_contraction(PROBLEM)
    return found.backend, found.strategy


def first_of():
    return "first", PROBLEM.rounded().plans()[0].strategy


def test_the_setting_turns_timing_off(seconds, monkeypatch):
    monkeypatch.setenv("MPOE_AUTOTUNE", "0")
    kept.add_choices({autotune._key(PROBLEM): f"second {first_of()[1]}"})
    assert ranked() == first_of(), "the file does not count either"
    assert list(choices().values()) == [" ".join(first_of())], "what ran is told, for a resumed run"


def test_deterministic_programs_rank_alone(seconds):
    assert ranked()[0] == "second"
    adopt({autotune._key(PROBLEM): f"second {first_of()[1]}"})
    torch.use_deterministic_algorithms(True)
    try:
        assert ranked() == first_of()
    finally:
        torch.use_deterministic_algorithms(False)
    assert ranked()[0] == "second"


@pytest.mark.parametrize(
    "true", ["compiler.is_compiling", "cuda.is_initialized cuda.is_current_stream_capturing"]
)
def test_under_capture_and_tracing_nothing_is_timed(seconds, monkeypatch, true):
    with monkeypatch.context() as patched:
        for each in true.split():
            patched.setattr(f"torch.{each}", lambda: True)
        assert ranked() == first_of()
        assert choices() == {}
    assert ranked()[0] == "second", "and nothing of it is remembered"


def test_several_ranks_rank_alone_or_take_what_was_adopted(seconds, monkeypatch):
    assert ranked()[0] == "second"
    told = choices()
    monkeypatch.setattr(autotune, "_has_ranks", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    assert ranked() == first_of(), "what one rank timed before does not count"
    monkeypatch.setattr(autotune, "processor_name", lambda: "another rank's")
    adopt(told)
    assert ranked()[0] == "second", "ranks on unlike machines agree"
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    autotune.forget()
    seconds["second"] = 0.5
    assert ranked()[0] == "second", "one rank times"


def test_adopted_choices_come_before_timing(seconds, empty_cache):
    assert ranked()[0] == "second"
    told = choices()
    autotune.forget()
    empty_cache.unlink()
    seconds["second"] = 3.0
    adopt(told)
    assert choices() == told
    assert ranked()[0] == "second"
    autotune.forget()
    adopt(dict.fromkeys(told, "abacus chain") | {"unknown": "native chain"})
    assert ranked()[0] == "first", "one that cannot run here is timed again"
    assert set(choices()) == {*told, "unknown"}


@pytest.mark.parametrize("wrong", [None, 3, ["a"], {"a": 1}, {1: "a"}])
def test_what_cannot_be_adopted(wrong):
    refuses(TypeError, r"choices must (be a mapping of|map) strings to strings; got", adopt, wrong)


def test_what_fails_when_it_is_timed_does_not_run():
    found = autotune._seconds([partial(torch.ones(2).view, 3), lambda: None], "cpu")
    assert found[0] == float("inf")
    assert found[1] < 1


@pytest.mark.parametrize(
    "takes, calls", [((1, 2, 3), (21, 21, 1)), ((40, 41), (4, 4)), ((300, 301), (2, 2))]
)
def test_how_often_candidates_are_timed(takes, calls, monkeypatch):
    """Milliseconds: for 200 of them or 20 rounds; once if hopeless."""
    ran = []
    for threads, clock in ((1, "thread_time"), (2, "perf_counter")):
        ran.clear()
        monkeypatch.setattr(autotune, "time", SimpleNamespace(**{clock: lambda: sum(ran) / 1000}))
        with torch_threads(threads):
            found = autotune._seconds([partial(ran.append, each) for each in takes], "cpu")
        assert found == pytest.approx([each / 1000 for each in takes])
        assert tuple(map(ran.count, takes)) == calls


@pytest.mark.parametrize(
    "rows, share, sizes",
    [
        (256, 1, [(8, 64), (8, 64)]),
        (256, 0.25, [(2, 16), (4, 32)]),
        (16, 1, [(2, 16), (4, 32)]),
        (4, 1, [(1, 4), (2, 8)]),
    ],
)
def test_a_timed_call_is_short(rows, share, sizes, monkeypatch):
    """Of 8 experts and 64 slots, by one thread and by two, for so many rows and this share of the
    FLOPs of each."""
    monkeypatch.setitem(autotune.ROWS, "cpu", rows)
    monkeypatch.setitem(autotune.FLOPS, "cpu", share * PROBLEM.plans()[0].flops)
    for threads, wanted in enumerate(sizes, 1):
        with torch_threads(threads):
            assert autotune._timed_sizes(PROBLEM) == wanted


@pytest.mark.parametrize("slots, strategies", [(64, 2), (4096, 1)])
def test_what_holds_too_much_memory_is_not_timed(slots, strategies, seconds, monkeypatch):
    timed = []
    monkeypatch.setattr(
        autotune, "_seconds", lambda runs, device: timed.append(len(runs)) or [1.0] * len(runs)
    )
    problem = PROBLEM._replace(slots=slots)
    resolve_contraction(problem)
    held = [plan.temporary_bytes + plan.activation_bytes for plan in problem.plans()[:2]]
    assert timed == [2 * strategies]
    assert (held[1] > autotune.MOST_BYTES > held[0]) == (strategies == 1)


@either("training")
@pytest.mark.parametrize("name", ["light", "separable", "padded"])
def test_a_first_use_is_timed_and_leaves_no_trace(name, training):
    """Through the op: the random numbers go on, and so does the gradient."""
    shape = SMALL_SHAPES[name]
    blocks = random_blocks(shape, 3, torch.float32, requires_grad=training)
    x, offsets = torch.ones(8, shape.in_features), torch.tensor([0, 2, 2, 8], dtype=torch.int32)
    state = torch.get_rng_state()
    y = grouped_mpo_linear(x, blocks, offsets)
    if training:
        y.sum().backward()
        assert blocks.central.grad is not None
    assert torch.equal(torch.get_rng_state(), state)
    assert len(choices()) == 1 + training
    assert set(choices().values()) <= {f"{b} {s}" for b in ("native", "eager") for s in STRATEGIES}


def test_fake_tensors_are_not_timed():
    shape = SMALL_SHAPES["light"]
    with FakeTensorMode():
        blocks = random_blocks(shape, 2, torch.float32)
        y = grouped_mpo_linear(torch.ones(4, shape.in_features), blocks, torch.tensor([0, 2, 4]))
    assert y.shape == (4, shape.out_features)
    assert choices() == {}


def test_a_compiled_graph_times_when_it_runs():
    shape = SMALL_SHAPES["light"]
    blocks, offsets = random_blocks(shape, 2, torch.float32), torch.tensor([0, 2, 4])
    x = torch.ones(4, shape.in_features)
    compiled = torch.compile(
        lambda: grouped_mpo_linear(x, blocks, offsets), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(), grouped_mpo_linear(x, blocks, offsets))
    assert len(choices()) == 1


def test_two_threads_at_once(seconds, monkeypatch):
    timed = []
    timing = autotune._seconds
    monkeypatch.setattr(autotune, "_seconds", lambda *given: (timed.append(1), timing(*given))[1])
    assert in_threads(4, lambda _: resolve_contraction(PROBLEM).backend) == ["second"] * 4
    assert timed == [1]


# ------------------------------------------------------------------ the file, whatever it holds


def test_two_machines_share_a_home(seconds, monkeypatch):
    found = []
    for machine, second in (("one", 1.0), ("other", 3.0), ("one", 9.0), ("other", 9.0)):
        monkeypatch.setattr(autotune, "processor_name", lambda name=machine: name)
        seconds["second"] = second
        autotune.forget()
        found.append(resolve_contraction(PROBLEM).backend)
    assert found == ["second", "first", "second", "first"]
    assert len(kept.read_choices()) == 2


def test_what_other_processes_wrote_stays(seconds, empty_cache):
    kept.add_choices({"theirs": "native chain"})
    resolve_contraction(PROBLEM)
    assert len(kept.read_choices()) == 2
    assert list(empty_cache.parent.iterdir()) == [empty_cache], "nothing half written is left"


def test_two_processes_write_at_once(empty_cache):
    """A choice may be lost, and is measured again; the file stays whole, and a link is not written
    through."""
    empty_cache.parent.mkdir()
    victim = empty_cache.with_name("victim")
    victim.write_text("mine")
    empty_cache.symlink_to(victim)
    children = []
    for number in range(2):
        children.append(os.fork())
        if not children[-1]:
            for turn in range(20):
                kept.add_choices({f"{number} {turn}": "eager"})
            os._exit(0)
    for child in children:
        os.waitpid(child, 0)
    assert victim.read_text() == "mine"
    assert {"0 19", "1 19"} & kept.read_choices().keys()
    assert sorted(os.listdir(empty_cache.parent)) == ["choices.json", "victim"]


def test_the_oldest_choices_go(monkeypatch):
    monkeypatch.setattr(kept, "MOST_CHOICES", 2)
    for name in "abca":
        kept.add_choices({name: "native chain"})
    assert list(kept.read_choices()) == ["c", "a"]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[" * 100_000,
        "[1]",
        b"\xff\xfe",
        " " * (kept.LARGEST_FILE + 1),
        json.dumps({"version": 99, "choices": {"a": "b"}}),
        json.dumps({"version": kept.VERSION, "choices": ["a"]}),
        json.dumps({"version": kept.VERSION, "choices": {"a": 3}}),
        json.dumps({"machine": "of an older release", "devices": {}}),
        json.dumps({"version": float("nan"), "choices": {"a": "b"}}),
    ],
    ids=[
        "empty",
        "cut",
        "nested",
        "list",
        "bytes",
        "large",
        "newer",
        "no choices",
        "no strings",
        "foreign",
        "NaN",
    ],
)
def test_a_damaged_or_foreign_file_is_measured_again(seconds, empty_cache, content):
    empty_cache.parent.mkdir()
    empty_cache.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert resolve_contraction(PROBLEM).backend == "second"
    assert kept.read_choices() == choices(), "and replaced"


@pytest.mark.parametrize("value", ["native unheard-of", "abacus chain", "", "second"])
def test_an_entry_that_cannot_run_is_measured_again(seconds, value):
    resolve_contraction(PROBLEM)
    (key,) = choices()
    kept.add_choices({key: value})
    autotune.forget()
    assert resolve_contraction(PROBLEM).backend == "second"


@pytest.mark.parametrize(
    "kind", ["pipe", "folder", "link to itself", "read-only home", "home is a file"]
)
def test_an_unwritable_place_is_no_error(seconds, empty_cache, kind, monkeypatch):
    if kind == "home is a file":
        empty_cache.parent.write_text("")
    else:
        empty_cache.parent.mkdir()
    if kind == "pipe":
        os.mkfifo(empty_cache)
    elif kind == "folder":
        empty_cache.mkdir()
    elif kind == "link to itself":
        empty_cache.symlink_to(empty_cache)
    elif kind == "read-only home":

        def refuse(**_):
            raise OSError(errno.EROFS, "Read-only file system")

        monkeypatch.setattr(tempfile, "mkstemp", refuse)
    assert resolve_contraction(PROBLEM).backend == "second"
    seconds["second"] = 3.0
    assert resolve_contraction(PROBLEM).backend == "second", "in memory"


@pytest.mark.parametrize(
    "home, expected", [("relative", "/home/of/user/.cache"), ("", "/home/of/user/.cache")]
)
def test_the_place_of_the_file(home, expected, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", home)
    monkeypatch.setenv("HOME", "/home/of/user")
    assert kept.choices_file() == Path(expected) / "mpoe/choices.json"


def test_without_a_home_and_a_user_choices_lie_in_the_temporary_folder(tmp_path, monkeypatch):
    """As in a container."""

    def nobody(number):
        raise KeyError(number)

    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", nobody)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert kept.choices_file() == tmp_path / "mpoe/choices.json"
