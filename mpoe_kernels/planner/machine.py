"""Constants of the cost model for this processor, measured once at first use.

The relative speed of PyTorch's products and the compiled kernels differs between processors and decides between them.
Before the first real choice on a CPU a few products of both are timed, in about half a second. The result is saved in
``machine.json`` next to the calibrations of `planner.measured`, with an entry for each processor, instruction set and
version.

One thread is measured: the result per thread or core is used for any number of them, and a measurement with several
threads would be worthless on a busy machine, where they wait for one another.

`using` supplies a record instead, and nothing is measured. ``MPOE_MEASURE=0``, set before the first choice, turns
measuring off, and so does ``torch.use_deterministic_algorithms(True)``, because plans must then not depend on a
measurement: without a record the constants of the hardware table apply.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from mpoe_kernels.native_library import NATIVE_LIBRARY
from mpoe_kernels.planner.hardware import Hardware
from mpoe_kernels.planner.measured import LARGEST, SMALLEST, cache_file, processor_name, read_json, write_json
from mpoe_kernels.version import __version__

try:
    import fcntl
except ImportError:  # not POSIX
    fcntl = None  # type: ignore[assignment]

SETTING, FILE, VERSION = "MPOE_MEASURE", "machine.json", 2
MOST_ENTRIES = 256  # of the file; the oldest go first
# Other settings that affect the speed of PyTorch's products.
LIBRARY_SETTINGS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR")
BUDGET_SECONDS, LEAST_ROUNDS, MOST_ROUNDS = 0.25, 3, 20
SAMPLE_SECONDS = 5e-4
WARM_BYTES = 24 << 20
logger = logging.getLogger("mpoe_kernels")


class Pair(NamedTuple):
    """A value for each dtype that is measured."""

    float32: float
    bfloat16: float


DTYPES = (torch.float32, torch.bfloat16)


class Constants(NamedTuple):
    """Measured constants of one processor.

    Attributes:
        flops: FLOP/s of PyTorch's large GEMMs on one thread.
        half_size: number of rows at which they reach half of that, see `Hardware.half_size`.
        tile_rate: FLOP/s of the compiled kernels' register tiles, divided by ``flops``.
        store_seconds: seconds in which a core stores a register tile.
    """

    flops: Pair
    half_size: Pair
    tile_rate: Pair
    store_seconds: Pair


@dataclass(frozen=True, eq=False)
class Source:
    """Where plans take their constants from; None: the hardware table. Compared by identity, which is quick."""

    constants: Constants | None


@dataclass
class _Process:
    """State of this process; ``is_settled``: it will not measure (again)."""

    given: list[Source] = field(default_factory=list)  # by `using`, the innermost last
    is_allowed: bool = True
    known: Source | None = None
    is_settled: bool = False
    lock: threading.RLock = field(default_factory=threading.RLock)  # a measurement checks again whether it is wanted


_FROM_TABLE = Source(None)
_process = _Process()
# Called whenever the `source` may have changed, to clear caches that depend on it.
on_change: list[Callable[[], object]] = []


def _changed() -> None:
    for forget_what_followed in on_change:
        forget_what_followed()


def is_on() -> bool:
    """Whether this process may measure, and plan with measured constants."""
    if _process.known is None:
        _begin()
    return _process.is_allowed and not torch.are_deterministic_algorithms_enabled()


def _begin() -> None:
    """Read the setting and the file."""
    with _process.lock:
        if _process.known is not None:  # another thread was faster
            return
        _process.is_allowed = os.environ.get(SETTING) != "0"
        found = _entries(cache_file(FILE)).get(_key()) if _process.is_allowed else None
        _process.is_settled = found is not None or not _process.is_allowed
        _process.known = Source(found)
        _changed()


def source() -> Source:
    """Source of the constants for this machine's CPU: a record, a measurement (new or on file), or the hardware
    table."""
    if _process.given:
        return _process.given[-1]
    return (_process.known or _FROM_TABLE) if is_on() else _FROM_TABLE


def constants() -> Constants | None:
    """Those of the `source`."""
    return source().constants


def is_settled() -> bool:
    """Whether no further measurement is expected."""
    return _process.is_settled or bool(_process.given) or not is_on()


def is_wanted() -> bool:
    """Whether `measure_once` should run before a choice."""
    if _process.is_settled or _process.given or not is_on() or _process.is_settled:
        return False
    # Not while a graph is traced, and not with fake tensors.
    return not torch.compiler.is_compiling() and type(torch.empty(0, device="cpu")) is torch.Tensor


def measure_once(measure: Callable[[], Constants]) -> None:
    """Call ``measure`` if needed and keep the result, in this process and on file."""
    with _process.lock:
        if not is_wanted():
            return
        start = time.perf_counter()
        _process.known, _process.is_settled = Source(_kept(measure())), True
        _changed()
    logger.info("measured %s in %.2f s", processor_name(), time.perf_counter() - start)


def forget() -> None:
    """Read the setting and the file again, or measure again, when it is next needed."""
    _process.known, _process.is_settled = None, False
    _changed()


# --------------------------------------------------------------- records

# The record of a process that plans with the constants of the hardware table.
TABLE: Mapping[str, Any] = MappingProxyType({"processor": "", "constants": None})


def record() -> dict[str, Any]:
    """The constants that plans use now, JSON-able; `using` takes this record.

    Returns:
        ``processor``: its name. ``constants``: the fields of `Constants`, each a mapping by dtype; None if the hardware
            table is used.
    """
    found = constants()
    return {"processor": processor_name(), "constants": None if found is None else _as_json(found)}


@contextmanager
def using(given: Mapping[str, Any]) -> Iterator[None]:
    """Plan with a record, whatever this processor is, without measuring; applies to all threads of the process.

    Args:
        given: as `record` returns it.

    Raises:
        ValueError: it is not a record.
    """
    try:
        found = given["constants"]
        _process.given.append(Source(None if found is None else _from_json(found)))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"given must be the record of a machine; got {given!r} ({error!r})") from error
    _changed()
    try:
        yield
    finally:
        _process.given.pop()
        _changed()


def _as_json(found: Constants) -> dict[str, dict[str, float]]:
    return {name: pair._asdict() for name, pair in found._asdict().items()}


def _from_json(entry: Any) -> Constants:
    """Raises KeyError, TypeError or ValueError for anything that `_as_json` does not produce."""
    pairs = {name: Pair(*(float(entry[name][dtype]) for dtype in Pair._fields)) for name in Constants._fields}
    for name, pair in pairs.items():
        if not all(SMALLEST < value < LARGEST for value in pair):
            raise ValueError(f"{name} must hold positive numbers; got {pair}")
    return Constants(**pairs)


# --------------------------------------------------------------- the file


def _key() -> str:
    """Everything that a measurement depends on."""
    parts = [processor_name(), f"native {NATIVE_LIBRARY.info.get('isa_used', 'none')}", f"mpoe {__version__}"]
    parts += [f"torch {torch.__version__} {torch.backends.cpu.get_cpu_capability()}"]
    parts += [f"{name}={os.environ[name]}" for name in LIBRARY_SETTINGS if name in os.environ]
    return " / ".join([*parts, " ".join(Pair._fields)])


@lru_cache(maxsize=64)
def _say(message: str) -> None:
    """Log once per process."""
    logger.warning(message)


def _entries(path: Path) -> dict[str, Constants]:
    """All entries of the file, including other processors'; none if the file cannot be used."""
    try:
        content = read_json(path)
        if content is None:
            return {}
        if content["version"] != VERSION:
            raise ValueError(f"it is not version {VERSION} of the format")
        return {key: _from_json(entry) for key, entry in content["entries"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _say(f"{path} is ignored, the processor is measured again: {error!r}")
        return {}


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold an exclusive lock between processes; after waiting a second, continue without it."""
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        for _ in range(100):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:  # another has it, or this file system has no locks
                time.sleep(0.01)
        yield
    finally:
        os.close(handle)


def _kept(found: Constants) -> Constants:
    """``found``, or what another process has saved meanwhile, so that both make the same plans."""
    path = cache_file(FILE)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.parent):
            entries = _entries(path)
            if _key() in entries:
                return entries[_key()]
            entries[_key()] = found
            newest = list(entries.items())[-MOST_ENTRIES:]
            write_json(path, {"version": VERSION, "entries": {key: _as_json(entry) for key, entry in newest}})
    except OSError as error:
        _say(f"{path} cannot be written, every process measures the processor: {error}")
    return found


# --------------------------------------------------------------- measuring


def with_constants(hardware: Hardware, found: Constants | None) -> Hardware:
    """``hardware``, a CPU with ``threads`` cores, with measured constants in place of the table's numbers."""
    if found is None:
        return hardware

    def replaced(name: str, values: Sequence[float]) -> dict[str, Any]:
        return {name: getattr(hardware, name)._replace(**dict(zip(Pair._fields, values, strict=True)))}

    return replace(
        hardware,
        **replaced("peak_flops", [rate * hardware.units for rate in found.flops]),
        **replaced("gemm_fraction", (1.0, 1.0)),
        **replaced("half_size", found.half_size),
        **replaced("tile_rate", found.tile_rate),
        **replaced("store_seconds", found.store_seconds),
    )


def seconds_of(functions: Sequence[Callable[[], object]], budget: float = BUDGET_SECONDS) -> list[float]:
    """Seconds of one call of each function on one thread, measured in turns, so that disturbances affect all equally.

    The clock is the calling thread's CPU time, so other processes' time on its core does not count; the remaining
    disturbances only add time, so the lower quartile of the samples is taken.

    Args:
        functions: the functions to time; each is first called twice.
        budget: seconds after which no further round starts, once there were `LEAST_ROUNDS`.
    """
    threads, clock = torch.get_num_threads(), time.thread_time
    torch.set_num_threads(1)
    try:
        # As in a process that has run for a while: the C library's heap then keeps the memory that such a block used.
        torch.empty(WARM_BYTES, dtype=torch.uint8, device="cpu")
        repeats = []
        for function in functions:
            function()  # libraries prepare a product when they first see its sizes
            start = clock()
            function()
            repeats.append(max(1, math.ceil(SAMPLE_SECONDS / max(clock() - start, 1e-6))))
        rounds: list[list[float]] = []
        began = time.perf_counter()
        while len(rounds) < LEAST_ROUNDS or (len(rounds) < MOST_ROUNDS and time.perf_counter() - began < budget):
            rounds.append([])
            for function, times in zip(functions, repeats, strict=True):
                start = clock()
                for _ in range(times):
                    function()
                rounds[-1].append((clock() - start) / times)
    finally:
        torch.set_num_threads(threads)
    return [sorted(samples)[len(rounds) // 4] for samples in zip(*rounds, strict=True)]
