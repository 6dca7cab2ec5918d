"""Do the tests see bugs? Plants cosmic-ray's mutations in Python code, one at a time, and runs the
tests they reach.

    python tools/mutants.py                       # 600 of all areas; continues an earlier run
    python tools/mutants.py --areas router export --count 40
    python tools/mutants.py --areas router checkpoints --count 8 --least .75  # what CI runs

`tools/mutants.toml` lists the areas: files, and the tests that must see a change in them; and the
survivors that are known, with the reasons. The checkout is not changed: mutations are made in a
copy. An area's tests run once to record which of them reach which lines, and how long each takes; a
mutant then costs the import of our packages and its tests, the short ones first, up to the first
failure.
"""

import argparse
import ast
import importlib
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import coverage
import pytest
from cosmic_ray.commands.init import init
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator
from cosmic_ray.work_db import use_db
from cosmic_ray.work_item import MutationSpec

ROOT = Path(__file__).resolve().parents[1]
OPTIONS = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
# Operators: of short strings, numbers, classes and None.
SAME = ("_Eq_Is", "_NotEq_IsNot", "_Is_Eq", "_IsNot_NotEq")
ORDER_OF_TEXTS = r'[<>]=? "'  # in place of == "...": no slip of a writer
# Arguments: of `zip`, where it holds; of warnings; of caches.
IGNORED = ("strict", "stacklevel", "maxsize")
SHORTEST_LIMIT = 60.0  # seconds, and `TIMES` what the tests take without a mutation
TIMES = 3.0
DURATIONS = "durations.json"


@dataclass(frozen=True, eq=False)
class Area:
    """``files``: globs of what is changed; ``tests``: arguments of pytest that must see it;
    ``survivors``: how the names of known ones begin, with the reasons."""

    name: str
    files: list[str]
    tests: list[str]
    survivors: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Mutant:
    """One change: ``name`` tells file, definition and the line before and after; ``text`` is the
    whole changed file, ``lines`` those of the changed statement."""

    area: Area
    file: str
    name: str
    text: str
    lines: range


def read_areas(path: Path) -> list[Area]:
    """The table of areas; an unknown or missing key is a TypeError."""
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    return [Area(name, **values) for name, values in table.items()]


def mutants_of(area: Area) -> Iterator[Mutant]:
    """What cosmic-ray's operators can change in the area's files, known survivors aside, in an
    order that looks random and that other files' changes keep."""
    paths = sorted(path for glob in area.files for path in ROOT.glob(glob))
    with use_db(":memory:") as database:
        init(paths, database, {})
        changes = [change for item in database.work_items for change in item.mutations]
    for change in sorted(changes, key=_place_in_order):
        mutant = mutant_at(area, change)
        if mutant is not None and not mutant.name.startswith(tuple(area.survivors)):
            yield mutant


def _place_in_order(change: MutationSpec) -> float:
    file = change.module_path.relative_to(ROOT)
    return random.Random(f"{file} {change.operator_name} {change.occurrence}").random()


def mutant_at(area: Area, change: MutationSpec) -> Mutant | None:
    """The mutant; None if the change does nothing at run time, as in annotations."""
    if change.operator_name.endswith(SAME):
        return None
    before = change.module_path.read_text(encoding="utf-8")
    operator = get_operator(change.operator_name)(**change.operator_args)
    after = mutate_code(before, operator, change.occurrence)
    if after is None or _meaning(after) in (None, _meaning(before)):
        return None
    pairs = zip(before.splitlines(), after.splitlines(), strict=False)
    differing = ((old.strip(), new.strip()) for old, new in pairs if old != new)
    old, new = next(differing, ("", ""))
    if re.search(ORDER_OF_TEXTS, new) and not re.search(ORDER_OF_TEXTS, old):
        return None
    file = str(change.module_path.relative_to(ROOT))
    lines = _statement(ast.parse(before), change.start_pos[0])
    return Mutant(area, file, f"{file}:{change.definition_name}: {old} -> {new}", after, lines)


def _meaning(text: str) -> str | None:
    """What a file does, without annotations and what `IGNORED` names; None if it is no Python."""
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node.returns = None
        elif isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(value=None)
        elif isinstance(node, ast.keyword) and node.arg in IGNORED:
            node.value = ast.Constant(value=None)
    return ast.dump(tree)


def _statement(tree: ast.Module, line: int) -> range:
    """Lines of the innermost statement at a line; of one with a body, those of its head."""
    lines = range(line, line + 1)
    for node in ast.walk(tree):  # the outer ones first
        if isinstance(node, ast.stmt) and node.lineno <= line <= node.end_lineno:
            body = getattr(node, "body", None)
            lines = range(node.lineno, body[0].lineno if body else node.end_lineno + 1)
    return lines


def sample(areas: list[Area], count: int) -> list[Mutant]:
    """``count`` mutants, as many of every area as of the others while they last; the same ones
    every time."""
    turns = itertools.zip_longest(*(mutants_of(area) for area in areas))
    chosen: dict[str, Mutant] = {}
    for mutant in filter(None, itertools.chain.from_iterable(turns)):
        chosen.setdefault(mutant.name, mutant)
        if len(chosen) == count:
            break
    return list(chosen.values())


def copy_of_tree(folder: Path) -> None:
    """What git knows, and the built kernels."""
    tracked = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()
    for path in {*map(ROOT.joinpath, tracked), *ROOT.glob("mpoe_kernels/_*")}:
        if path.is_file():
            target = folder / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target)


def run_tests(
    tests: list[str], folder: Path, seconds: float | None, record: coverage.Coverage | None = None
) -> int | None:
    """Exit status of pytest in a fork of this process; None if it takes longer than ``seconds``.
    ``record`` keeps which tests reach a line; that of none is an import. ``folder / DURATIONS``
    tells how long each took, with it."""
    durations = {}

    class Contexts:
        @pytest.hookimpl(wrapper=True)
        def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
            if record is not None:
                record.switch_context(item.nodeid)
            start = time.monotonic()
            result = yield
            durations[item.nodeid] = time.monotonic() - start
            return result

    def run() -> None:
        os.setsid()
        log = os.open(folder / "mutants.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(folder)
        others = [path for path in sys.path if path and Path(path).resolve() != ROOT]
        sys.path[:] = [str(folder)] + others
        os.environ["PYTHONPATH"] = str(folder)
        sys.dont_write_bytecode = record is None  # what is recorded is not changed
        # Around all of pytest: conftest files import what is recorded.
        with record.collect() if record is not None else nullcontext():
            status = pytest.main([*OPTIONS, *tests], plugins=[Contexts()])
        if record is not None:
            record.save()
            (folder / DURATIONS).write_text(json.dumps(durations))
        sys.exit(status)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(seconds)
    status = process.exitcode
    with suppress(ProcessLookupError):  # whatever it started
        os.killpg(process.pid, signal.SIGKILL)
    process.join()
    return status


class Reach:
    """What an area's tests reach, and how many seconds each takes, by running them without a
    mutation."""

    def __init__(self, area: Area, folder: Path) -> None:
        paths = [str(path) for glob in area.files for path in folder.glob(glob)]
        record = coverage.Coverage(
            data_file=str(folder / f"reach-{area.name}"), include=paths, messages=False
        )
        if run_tests(area.tests, folder, None, record) != 0:
            print((folder / "mutants.log").read_text()[-3000:])
            raise SystemExit(
                f"the tests of area {area.name} must pass without a mutation; they do not"
            )
        self.seconds = json.loads((folder / DURATIONS).read_text())
        record.load()
        self.lines = {path: record.get_data().contexts_by_lineno(path) for path in paths}
        print(f"{area.name}: {sum(self.seconds.values()):.0f} s")

    def tests(self, path: Path, lines: range) -> list[str]:
        """Those that may see a change of lines, short ones first; all of the file's if an import
        reaches them."""
        by_line = self.lines[str(path)]
        reaching = {test for line, tests in by_line.items() if line in lines for test in tests}
        if "" in reaching:
            reaching = {test for tests in by_line.values() for test in tests}
        return sorted(reaching - {""}, key=lambda test: (int(self.seconds[test]), test))


def outcome(mutant: Mutant, reach: Reach, folder: Path) -> str:
    """``passed``, ``failed``, ``timeout``, or ``unreached`` by any test."""
    path = folder / mutant.file
    tests = reach.tests(path, mutant.lines)
    if not tests:
        return "unreached"
    path.write_text(mutant.text, encoding="utf-8")
    status = run_tests(
        tests, folder, SHORTEST_LIMIT + TIMES * sum(reach.seconds[test] for test in tests)
    )
    shutil.copy2(ROOT / mutant.file, path)
    if status is None:
        return "timeout"
    return "failed" if status else "passed"


def main(arguments: list[str] | None = None) -> int:
    """Exit status 1 if fewer than ``--least`` of the mutants are seen."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    areas = read_areas(ROOT / "tools/mutants.toml")
    names = [area.name for area in areas]
    parser.add_argument("--areas", nargs="*", choices=names, default=names, help="only these")
    parser.add_argument("--count", type=int, default=600)
    parser.add_argument(
        "--least", type=float, default=0.95, help="share of them that must be seen; default: .95"
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=ROOT / "build/mutants.json",
        help="JSON: what became of every mutant; default: build",
    )
    options = parser.parse_args(arguments)
    chosen = sample([area for area in areas if area.name in options.areas], options.count)
    results = options.results
    outcomes: dict[str, str] = {}
    if results.is_file():
        outcomes = json.loads(results.read_text())
    results.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="mutants-") as name:
        folder = Path(name).resolve()
        copy_of_tree(folder)
        reach_of = cache(lambda area: Reach(area, folder))
        for mutant in sorted(chosen, key=lambda mutant: mutant.area.name):
            if mutant.name in outcomes:
                continue
            outcomes[mutant.name] = outcome(mutant, reach_of(mutant.area), folder)
            print(f"{outcomes[mutant.name]:9} {mutant.name}", flush=True)
            results.with_suffix(".new").write_text(json.dumps(outcomes, indent=1))
            os.replace(results.with_suffix(".new"), results)
    survived = [m for m in chosen if outcomes[m.name] in ("passed", "unreached")]
    missed = Counter(m.area.name for m in survived)
    for name, count in Counter(m.area.name for m in chosen).items():
        print(f"{name:20} {count - missed[name]:4} of {count:4} seen")
    for mutant in survived:
        print(f"survived: {mutant.name}")
    return 1 if len(survived) > (1 - options.least) * len(chosen) else 0


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"  # threads do not survive a fork
    for large in ("torch", "transformers.trainer", "hypothesis"):
        importlib.import_module(large)
    sys.exit(main())
