"""Do the tests see bugs? Plants cosmic-ray's mutations in Python code, one at a time, and runs the tests of its area.

    python tools/mutants.py                       # 600 of all areas; continues where an earlier run ended
    python tools/mutants.py --areas router export --count 40
    python tools/mutants.py --count 12 --least .75  # what CI runs: the first of the same sample

`tools/mutants.toml` lists the areas: files, and the tests that must see a change in them; and the survivors that are
known, with the reasons. The checkout is not changed: mutations are made in a copy.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from cosmic_ray.commands.init import init
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator
from cosmic_ray.work_db import use_db
from cosmic_ray.work_item import MutationSpec
from forked_pytest import ForkedPytest, import_first

ROOT = Path(__file__).resolve().parents[1]
SHORTEST_LIMIT = 120.0  # seconds, for a busy machine; otherwise four times what the tests take without a mutation


@dataclass(frozen=True)
class Area:
    """``files``: globs of what is changed; ``tests``: arguments of pytest that must see it; ``survivors``: known ones,
    by `Mutant.name`, with the reasons."""

    name: str
    files: list[str]
    tests: list[str]
    survivors: dict[str, str]


@dataclass(frozen=True)
class Mutant:
    """One change: ``name`` tells file, definition and the line before and after; ``text`` is the whole changed file."""

    area: Area
    file: str
    name: str
    text: str


def read_areas(path: Path) -> list[Area]:
    """The table of areas; an unknown or missing key is a TypeError."""
    with path.open("rb") as file:
        return [Area(name, **{"survivors": {}, **values}) for name, values in tomllib.load(file).items()]


def places(area: Area, root: Path) -> list[MutationSpec]:
    """Every place in the area's files that one of cosmic-ray's operators can change, in an order that looks random."""
    paths = sorted(path for glob in area.files for path in root.glob(glob))
    with use_db(":memory:") as database:
        init(paths, database, {})
        found = [change for item in database.work_items for change in item.mutations]
    found.sort(key=lambda change: (str(change.module_path), change.operator_name, change.occurrence))
    return random.Random(area.name).sample(found, len(found))


def mutant_at(area: Area, change: MutationSpec, root: Path) -> Mutant | None:
    """The mutant; None if the change does nothing at run time, as in annotations."""
    before = change.module_path.read_text(encoding="utf-8")
    operator = get_operator(change.operator_name)(**change.operator_args)
    after = mutate_code(before, operator, change.occurrence)
    if after is None or _meaning(after) in (None, _meaning(before)):
        return None
    pairs = zip(before.splitlines(), after.splitlines(), strict=False)
    old, new = next(((a.strip(), b.strip()) for a, b in pairs if a != b), ("", ""))
    file = str(change.module_path.relative_to(root))
    return Mutant(area, file, f"{file}:{change.definition_name}: {old} -> {new}", after)


def _meaning(text: str) -> str | None:
    """What a file does, without annotations; None if it is no Python."""
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
    return ast.dump(tree)


def sample(areas: list[Area], root: Path, count: int) -> list[Mutant]:
    """``count`` mutants, as many of every area as of the others while they last; the same ones every time."""
    found: dict[str, Mutant] = {}
    pools = [[(area, change) for change in places(area, root)] for area in areas]
    for turn in itertools.zip_longest(*pools):
        for area, change in filter(None, turn):
            mutant = mutant_at(area, change, root)
            if mutant is not None and len(found) < count:
                found.setdefault(mutant.name, mutant)
        if len(found) >= count:
            break
    return list(found.values())


def copy_of_tree(root: Path, folder: Path) -> None:
    """What git knows, and the built kernels."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, check=True, capture_output=True, text=True).stdout
    built = [str(path.relative_to(root)) for path in root.glob("mpoe_kernels/_*") if path.is_file()]
    for name in {*filter(None, listed.split("\0")), *built}:
        if (root / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, folder / name)


def run_tests(area: Area, folder: Path, limit: float) -> str:
    """``passed``, ``failed``, or ``timeout`` after ``limit`` seconds."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    arguments = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", *area.tests]
    run = ForkedPytest(folder, environment, arguments, folder / "mutant.log", [str(ROOT), ""])
    status = run.wait(limit)
    run.end()
    return "timeout" if status is None else "passed" if status == 0 else "failed"


def main(arguments: list[str] | None = None) -> int:
    """Exit status 1 if fewer than ``--least`` of the mutants are seen, known survivors aside."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--areas", nargs="*", help="only these")
    parser.add_argument("--count", type=int, default=600)
    parser.add_argument("--least", type=float, default=0.95, help="share of them that must be seen; default: .95")
    parser.add_argument("--root", type=Path, default=ROOT)
    parser.add_argument("--results", type=Path, help="JSON: what became of every mutant; default: build/mutants.json")
    asked = parser.parse_args(arguments)
    areas = read_areas(asked.root / "tools" / "mutants.toml")
    if unknown := {*(asked.areas or ())} - {area.name for area in areas}:
        parser.error(f"--areas must be among {', '.join(a.name for a in areas)}; got {', '.join(sorted(unknown))}")
    results = asked.results or asked.root / "build" / "mutants.json"
    outcomes: dict[str, str] = json.loads(results.read_text()) if results.is_file() else {}
    chosen = sample([a for a in areas if not asked.areas or a.name in asked.areas], asked.root, asked.count)
    os.environ["OMP_NUM_THREADS"] = "1"
    import_first(["torch", "transformers.trainer"])
    limits: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="mutants-") as name:
        folder = Path(name)
        copy_of_tree(asked.root, folder)
        for mutant in chosen:
            if mutant.name in outcomes or mutant.name in mutant.area.survivors:
                continue
            if mutant.area.name not in limits:
                start = time.monotonic()
                if run_tests(mutant.area, folder, 1800.0) != "passed":
                    print((folder / "mutant.log").read_text()[-3000:])
                    raise SystemExit(f"the tests of area {mutant.area.name} must pass without a mutation; they do not")
                limits[mutant.area.name] = max(SHORTEST_LIMIT, 4 * (time.monotonic() - start))
            (folder / mutant.file).write_text(mutant.text, encoding="utf-8")
            outcomes[mutant.name] = run_tests(mutant.area, folder, limits[mutant.area.name])
            shutil.copy2(asked.root / mutant.file, folder / mutant.file)
            print(f"{outcomes[mutant.name]:8} {mutant.name}", flush=True)
            results.parent.mkdir(parents=True, exist_ok=True)
            results.with_suffix(".new").write_text(json.dumps(outcomes, indent=1))
            os.replace(results.with_suffix(".new"), results)
    return report(chosen, outcomes, asked.least)


def report(chosen: list[Mutant], outcomes: dict[str, str], least: float) -> int:
    """Print how many of every area were seen; 1 if fewer than ``least`` of those that are not known to survive."""
    survived = [m for m in chosen if m.name not in m.area.survivors and outcomes[m.name] == "passed"]
    known = [m for m in chosen if m.name in m.area.survivors]
    total, missed = Counter(m.area.name for m in chosen), Counter(m.area.name for m in (*survived, *known))
    for area, count in total.items():
        print(f"{area:20} {count - missed[area]:4} of {count:4} seen")
    print(f"{len(chosen) - len(survived) - len(known)} of {len(chosen)} seen, {len(known)} known survivors")
    for mutant in survived:
        print(f"survived: {mutant.name}")
    return 1 if len(survived) > (1 - least) * (len(chosen) - len(known)) else 0


if __name__ == "__main__":
    sys.exit(main())
