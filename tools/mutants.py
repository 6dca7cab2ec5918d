"""Do the tests catch bugs? Makes small changes in chosen functions, one at a time, and runs the tests of their area.

    python tools/mutants.py                     # some of every area; continues where an earlier run ended
    python tools/mutants.py --areas ops mask    # only these areas
    python tools/mutants.py --slice 8           # what CI runs
    python tools/mutants.py --list              # the changes, without running anything

tools/mutants.toml lists the functions and tests; tools/mutants_equivalent.json lists survivors that are not bugs, with
reasons. The checkout is not changed: every worker has its own copy in a temporary folder.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from sysconfig import get_config_var

from forked_pytest import ForkedPytest, import_first
from mutation_rules import Mutant, mutants_of

SEED = 0
PER_AREA = 9
SHORTEST_LIMIT = 180.0  # seconds, for a busy machine; otherwise four times what the tests take without a mutant
BUILD_LIMIT = 1200.0
IMPORTED_FIRST = ["torch", "transformers.trainer"]  # imported once for all runs


@dataclass(frozen=True)
class Area:
    """Functions, and the tests that must catch a change in them.

    Attributes:
        name: heading in the table.
        functions: ``file:function`` each, see `mutation_rules.resolve`.
        tests: files given to pytest.
        only: pytest's ``-k``.
        build: command to run after every change, if any; ``{python}`` is this interpreter.
        built: the file that it makes, restored afterwards; ``{suffix}`` is that of this Python's modules.
        environment: environment variables of build and tests.
        in_slice: whether CI's slice may include its mutants.
    """

    name: str
    functions: list[str]
    tests: list[str]
    only: str = ""
    build: list[str] = field(default_factory=list)
    built: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    in_slice: bool = True

    def all(self, root: Path) -> list[Mutant]:
        """Every change that the rules make, once each."""
        return list({m.name: m for target in self.functions for m in mutants_of(root, target)}.values())

    def chosen(self, root: Path, count: int) -> list[Mutant]:
        """A sample of ``count`` changes; the same one every time, as long as the functions do not change."""
        everything = self.all(root)
        return random.Random(f"{SEED} {self.name}").sample(everything, min(count, len(everything)))


def read_areas(path: Path) -> list[Area]:
    """Read the table of areas; an unknown key is a TypeError."""
    text = path.read_text(encoding="utf-8").replace("{suffix}", get_config_var("EXT_SUFFIX"))
    return [Area(name, **values) for name, values in tomllib.loads(text).items()]


def sliced(areas: list[Area], root: Path, count: int) -> list[tuple[Area, Mutant]]:
    """The first ``count`` mutants, taken from all areas in turn."""
    able = [area for area in areas if area.in_slice]
    rounds = -(-count // len(able))
    ordered = [(area, area.chosen(root, PER_AREA)) for area in able]
    return [(area, found[k]) for k in range(rounds) for area, found in ordered if k < len(found)][:count]


# --------------------------------------------------------------------- runs


class Copy:
    """A copy of the checkout for mutants to change."""

    def __init__(self, root: Path, folder: Path, built: list[str], stopping: threading.Event) -> None:
        self.root, self.folder = root, folder
        self.running: subprocess.Popen[str] | ForkedPytest | None = None
        self.stopping = stopping
        self.lock = threading.Lock()  # nothing may start while `stop` runs
        for name in self._files(root) + [name for name in built if (root / name).is_file()]:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, folder / name)
        # The environment differs in three ways: no stale bytecode, shared data at its original place, and no pytest
        # options except the tool's own.
        inherited = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
        self.environment = inherited | {
            "PYTHONPATH": os.pathsep.join([str(folder), str(folder / "bench"), str(folder / "tools")]),
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
            "MPOE_SHARED": os.environ.get("MPOE_SHARED", str(root.parent / "shared")),
        }

    @staticmethod
    def _files(root: Path) -> list[str]:
        command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
        return [name for name in listed if name and (root / name).is_file()]

    @contextmanager
    def changed(self, mutant: Mutant) -> Iterator[None]:
        """Apply the mutant, and restore the file afterwards."""
        path = self.folder / mutant.path
        text = path.read_text(encoding="utf-8")
        path.write_text(mutant.applied(text), encoding="utf-8")
        try:
            yield
        finally:
            path.write_text(text, encoding="utf-8")

    def run(self, command: list[str], environment: dict[str, str], limit: float) -> tuple[int | None, str]:
        """Exit status (None after the time limit) and the end of the output. Nothing it started is left running."""
        with self.lock:
            if self.stopping.is_set():
                raise Stopped
            self.running = process = subprocess.Popen(
                command,
                cwd=self.folder,
                env=self.environment | environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,
            )
        try:
            output, _ = process.communicate(timeout=limit)
            if self.stopping.is_set():
                raise Stopped
            return process.returncode, output[-3000:]
        except subprocess.TimeoutExpired:
            return None, ""
        finally:
            _end(process)

    def build(self, area: Area) -> tuple[int | None, str]:
        command = [sys.executable if word == "{python}" else word for word in area.build]
        return self.run(command, area.environment, BUILD_LIMIT) if command else (0, "")

    def test(self, area: Area, limit: float) -> tuple[int | None, str]:
        arguments = ["-q", "-x", "-p", "no:xdist", "-p", "no:cacheprovider", *area.tests]
        arguments += ["-k", area.only] if area.only else []
        if area.environment:  # libraries may read it when they are imported, so not in a fork
            return self.run([sys.executable, "-m", "pytest", *arguments], area.environment, limit)
        printed = self.folder / "printed.txt"
        left_out = [str(self.root / name) for name in ("", "bench", "tools")]
        printed.unlink(missing_ok=True)
        with self.lock:
            if self.stopping.is_set():
                raise Stopped
            self.running = process = ForkedPytest(self.folder, self.environment, arguments, printed, left_out)
        try:
            status = process.wait(limit)
        finally:
            process.end()
        if self.stopping.is_set():
            raise Stopped
        if not printed.is_file():
            raise AreaError(f"{area.name}: the tests were not started")
        return status, "" if status is None else printed.read_text(encoding="utf-8", errors="replace")[-3000:]

    def stop(self) -> None:
        """End what is running; called by another thread, which has set ``stopping``."""
        with self.lock:
            if isinstance(self.running, ForkedPytest):
                self.running.end()
            elif self.running is not None and self.running.poll() is None:
                _end(self.running)

    @contextmanager
    def rebuilt(self, area: Area) -> Iterator[None]:
        """Restore afterwards the file that a build replaces."""
        kept = self.folder / f"{area.built}.kept"
        if area.built and (self.folder / area.built).is_file():
            shutil.copy2(self.folder / area.built, kept)
        try:
            yield
        finally:
            if kept.is_file():
                kept.replace(self.folder / area.built)


def _end(process: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError):  # the whole group has ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class Stopped(Exception):
    """The user has interrupted the run."""


class AreaError(RuntimeError):
    """The tests of an area, or its build, fail without a mutant."""


def run_area(copy: Copy, area: Area, mutants: list[Mutant]) -> Iterator[tuple[Mutant, str, float]]:
    """Outcome and seconds of every mutant: ``killed``, ``killed (time)``, ``survived`` or ``no build``."""
    with copy.rebuilt(area):
        built, output = copy.build(area)
        if built != 0:
            raise AreaError(f"{area.name}: the build fails without a mutant:\n{output}")
        begun = time.monotonic()
        status, output = copy.test(area, BUILD_LIMIT)
        if status != 0:
            raise AreaError(f"{area.name}: the tests fail without a mutant (status {status}):\n{output}")
        limit = max(SHORTEST_LIMIT, 4 * (time.monotonic() - begun))
        for mutant in mutants:
            begun = time.monotonic()
            with copy.changed(mutant):
                built, _ = copy.build(area)
                status = copy.test(area, limit)[0] if built == 0 else 0
            outcome = {0: "survived", None: "killed (time)"}.get(status, "killed")
            yield mutant, outcome if built == 0 else "no build", time.monotonic() - begun


@dataclass
class Results:
    """Outcomes by the mutant's name, kept in a file after each."""

    path: Path
    found: dict[str, dict[str, object]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, area: Area, mutant: Mutant, outcome: str, seconds: float) -> None:
        with self.lock:
            self.found[mutant.name] = {
                "area": area.name,
                "path": mutant.path,
                "line": mutant.line,
                "rule": mutant.rule,
                "outcome": outcome,
                "seconds": round(seconds, 1),
            }
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial = self.path.with_suffix(".partial")
            partial.write_text(json.dumps(self.found, indent=1), encoding="utf-8")
            partial.replace(self.path)
            print(
                f"{outcome:14} {seconds:6.1f} s  {area.name}: {mutant.path}:{mutant.line} {_short(mutant)}", flush=True
            )


def _short(mutant: Mutant) -> str:
    before, after = (" ".join(text.split())[:60] for text in (mutant.before, mutant.after))
    return f"{before}  ->  {after}"


def run_all(root: Path, jobs: int, work: list[tuple[Area, list[Mutant]]], results: Results) -> list[str]:
    """Run every area on one of ``jobs`` workers. Returns the errors."""
    waiting: queue.SimpleQueue[tuple[Area, list[Mutant]]] = queue.SimpleQueue()
    for item in sorted(work, key=lambda item: not item[0].build):  # areas with a build take longest: first
        waiting.put(item)
    errors: list[str] = []
    built = [area.built for area, _ in work if area.built]
    copies: list[Copy] = []
    stopping = threading.Event()

    def worker() -> None:
        with suppress(Stopped), tempfile.TemporaryDirectory(prefix="mutants-") as folder:
            copy = Copy(root, Path(folder), built, stopping)
            copies.append(copy)
            while True:
                try:
                    area, mutants = waiting.get_nowait()
                except queue.Empty:
                    return
                try:
                    for mutant, outcome, seconds in run_area(copy, area, mutants):
                        results.add(area, mutant, outcome, seconds)
                except AreaError as error:
                    errors.append(str(error))

    # A pool instead of plain threads: an interrupted join mistakes a running thread for one that has ended.
    with ThreadPoolExecutor(min(jobs, len(work)) or 1) as pool:
        done = [pool.submit(worker) for _ in range(min(jobs, len(work)))]
        try:
            for future in done:
                future.result()
        except KeyboardInterrupt:
            stopping.set()
            for copy in copies:
                copy.stop()
            raise
    return errors


# ------------------------------------------------------------------- report


def report(chosen: list[tuple[Area, Mutant]], results: Results, equivalent: dict[str, str]) -> list[str]:
    """Print the table; returns the survivors that have no reason given."""
    rows: dict[str, Counter[str]] = {}
    unexplained = []
    for area, mutant in chosen:
        outcome = str(results.found.get(mutant.name, {"outcome": "not run"})["outcome"])
        rows.setdefault(area.name, Counter())[outcome] += 1
        if outcome == "survived":
            reason = equivalent.get(mutant.name)
            print(f"survived: {mutant.path}:{mutant.line} {_short(mutant)}\n  {reason or mutant.name}")
            unexplained += [] if reason else [mutant.name]
    columns = ["killed", "killed (time)", "survived", "no build", "not run"]
    print(f"\n{'area':18}" + "".join(f"{name:>15}" for name in columns))
    for name, counts in [*rows.items(), ("all", sum(rows.values(), Counter()))]:
        print(f"{name:18}" + "".join(f"{counts[column]:15}" for column in columns))
    return unexplained


def main(arguments: list[str] | None = None) -> int:
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=here.parent, help="checkout")
    parser.add_argument("--table", type=Path, default=here / "mutants.toml")
    parser.add_argument("--equivalent", type=Path, default=here / "mutants_equivalent.json")
    parser.add_argument("--results", type=Path, help="default: build/mutants.json of the checkout")
    parser.add_argument("--areas", nargs="+", help="only these")
    parser.add_argument("--count", type=int, default=PER_AREA, help="mutants per area")
    parser.add_argument("--slice", type=int, help="this many in total, from all areas in turn")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--again", action="store_true", help="also run what already has a result")
    parser.add_argument("--import_first", nargs="*", default=IMPORTED_FIRST, help="modules to import once for all runs")
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args(arguments)
    root = options.root.resolve()
    areas = read_areas(options.table)
    known = [area.name for area in areas]
    if options.areas and not set(options.areas) <= set(known):
        parser.error(f"--areas must be some of {', '.join(known)}; got {', '.join(options.areas)}")
    areas = [area for area in areas if not options.areas or area.name in options.areas]
    if options.slice:
        chosen = sliced(areas, root, options.slice)
    else:
        chosen = [(area, mutant) for area in areas for mutant in area.chosen(root, options.count)]
    if options.list:
        for area, mutant in chosen:
            print(f"{area.name}: {mutant.path}:{mutant.line} {mutant.rule}: {_short(mutant)}")
        return 0
    results = Results(options.results or root / "build" / "mutants.json")
    if results.path.is_file() and not options.again:
        results.found = json.loads(results.path.read_text(encoding="utf-8"))
    equivalent = json.loads(options.equivalent.read_text(encoding="utf-8"))
    work = []
    for area in areas:
        left = [mutant for other, mutant in chosen if other is area and mutant.name not in results.found]
        work += [(area, left)] if left else []
    import_first(options.import_first)
    errors = run_all(root, options.jobs, work, results)
    unexplained = report(chosen, results, equivalent)
    for error in errors:
        print(error, file=sys.stderr)
    return 1 if errors or unexplained else 0


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"  # so that importing torch once starts no threads
    sys.exit(main())
