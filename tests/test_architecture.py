"""The order of imports, the size of files, what importing costs; assertions of the tests, each of
which can fail."""

import ast
import re
import shutil
import tokenize
import tomllib
from functools import cache

import pytest
import torch

from tests.assertions import assert_calibrated, poisoned_memory, refuses, run_python
from tests.cases import ROOT

# name -> folder that holds it
PACKAGES = {"mpoe_kernels": ".", "mpoe": ".", "mpoe_bench": "bench", "mpoe_vllm": "."}

# From the lowest on. A module may import modules of its own line's packages or of lines above.
LEVELS = """
mpoe_kernels.version mpoe_kernels.checks
mpoe_kernels.mpo mpoe_kernels.compiled mpoe_kernels.triton.architecture mpoe_kernels.op_rules
mpoe_kernels.native_library
mpoe_kernels.cuda_library mpoe_kernels.backends mpoe_kernels.contract
mpoe_kernels.triton mpoe_kernels.signatures mpoe_kernels.define
mpoe_kernels.routing
mpoe_kernels.linear
mpoe_kernels.experts mpoe_kernels.embedding mpoe_kernels.mixture
mpoe_kernels.reference
mpoe_kernels.testing
mpoe_kernels
mpoe.lazy mpoe.config mpoe.data
mpoe.layers
mpoe.models
mpoe.inspection mpoe.training
mpoe_bench
mpoe.cli
mpoe
mpoe_vllm
"""
RANKS = {
    module: rank for rank, line in enumerate(LEVELS.strip().splitlines()) for module in line.split()
}
# What still reaches up, by a string: how much shared memory the smallest tile of a kernel takes.
UPWARD = {("mpoe_kernels.backends", "mpoe_kernels.linear.triton.grouped")}
# Siblings of equal rank that do not know each other.
STRANGERS = {("mpoe.inspection", "mpoe.training")}


@cache
def modules():
    found = {}
    for package, folder in PACKAGES.items():
        for path in sorted((ROOT / folder / package).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def group_of(module):
    """Longest prefix that has a rank."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        prefix = ".".join(parts[:length])
        if prefix in RANKS and (length > 1 or len(parts) == 1):
            return prefix
    return parts[0]


@cache
def parsed(path):
    return ast.parse(path.read_text())


@cache
def imports_of(path, top_level_only):
    """Our own modules that a file imports; if not at the top alone, also in functions and by a
    string, which `import_module` may get."""
    tree = parsed(path)
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the order; write the full name"
            names.add(node.module or "")
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Constant) and "." in str(node.value):
            names.add(str(node.value))
    known = modules()
    return {name for name in names if name in known}


@pytest.mark.parametrize("module", modules())
def test_imports_run_downward(module):
    own = group_of(module)
    for imported in imports_of(modules()[module], top_level_only=False):
        other = group_of(imported)
        if other == own or (module, imported) in UPWARD:
            continue
        assert RANKS[other] <= RANKS[own], (
            f"{module} (rank {RANKS[own]}) imports {imported} (rank {RANKS[other]})"
        )
        assert (own, other) not in STRANGERS, f"{module} must not know {imported}"
        assert (other, own) not in STRANGERS, f"{module} must not know {imported}"
        if own.startswith("mpoe.") and other.startswith("mpoe_kernels."):
            # Native calls without an op around them are called as their modules.
            plain = {"mpoe_kernels.experts", "mpoe_kernels.routing", "mpoe_kernels.mixture"}
            public = {
                "mpoe_kernels.version",
                "mpoe_kernels.checks",
                "mpoe_kernels.contract",
                *plain,
            }
            assert other in public, (
                f"{module} reaches into {imported}; use the public names of mpoe_kernels"
            )


def test_what_reaches_up_is_still_there():
    for module, imported in UPWARD:
        assert imported in imports_of(modules()[module], top_level_only=False), module


def test_imports_in_functions_and_by_strings_are_seen(tmp_path):
    file = tmp_path / "lazy.py"
    file.write_text(
        'import_module("mpoe.models.find")\n\n\ndef lazy():\n    from mpoe.cli import train\n'
    )
    assert imports_of(file, top_level_only=False) == {
        "mpoe.models.find",
        "mpoe.cli",
        "mpoe.cli.train",
    }
    assert imports_of(file, top_level_only=True) == set()


def test_no_circles():
    """Among what is imported first; what is lazy in a package runs between files of one level."""
    graph = {
        name: imports_of(path, top_level_only=True) - {name} for name, path in modules().items()
    }
    done = set()

    def visit(name, trail):
        assert name not in trail, f"circular import: {' -> '.join((*trail, name))}"
        if name not in done:
            for following in graph[name]:
                # A package's __init__ collects what lies below it; its modules are visited on their
                # own.
                if not name.startswith(following + "."):
                    visit(following, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_files_of_tests_import_one_another_by_their_whole_names():
    """``from .tiny import`` or ``from tests.training.tiny import``: a bare name means another file
    to every folder."""
    bare = []
    for path in (ROOT / "tests").rglob("*.py"):
        own = {each.stem for each in path.parent.glob("*.py")}
        names = re.findall(r"^ *(?:from|import) (\w+)(?=[ ,\n])", path.read_text(), re.MULTILINE)
        bare += [f"{path.relative_to(ROOT)}: {name}" for name in names if name in own]
    assert not bare


LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}


def tokens_of_code(path):
    """What a reader must take in: lines, comments and docstrings are free."""
    with path.open("rb") as file:
        count = sum(token.type not in LAYOUT for token in tokenize.tokenize(file.readline))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = [
        node
        for node in ast.walk(parsed(path))
        if isinstance(node, documented) and ast.get_docstring(node)
    ]
    return count - len(docstrings)


def test_a_file_is_read_at_once():
    folders = (*PACKAGES, "tests", "examples", "tools", "bench")
    paths = {path for folder in folders for path in (ROOT / folder).rglob("*.py")}
    # At least as many words and signs as tokens: most files need not be taken apart.
    candidates = [
        path for path in paths if len(re.findall(r"\w+|[^\w\s]", path.read_text("utf-8"))) > 4_400
    ]
    long = {
        str(path.relative_to(ROOT)): count
        for path in candidates
        if (count := tokens_of_code(path)) > 4_500
    }
    assert candidates
    assert not long, f"more than 4,500 tokens: {long}"


def test_the_table_of_mutants_names_files_and_tests():
    for area in tomllib.loads((ROOT / "tools/mutants.toml").read_text()).values():
        assert all(list(ROOT.glob(each)) for each in area["files"]), area
        tests = [each.removeprefix("--deselect=").partition("::")[0] for each in area["tests"]]
        assert all((ROOT / each).exists() for each in tests), area


def test_kernels_import_neither_transformers_nor_mpoe_and_info_no_transformers(tmp_path):
    """A copy of the package without compiled kernels, which says why it has none."""
    package = tmp_path / "mpoe_kernels"
    shutil.copytree(
        ROOT / package.name, package, ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    (package / "_native_missing.txt").write_text("no compiler was found\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import runpy, mpoe_kernels\n"
    code += "print([m for m in ('transformers', 'mpoe', 'triton') if m in sys.modules])\n"
    code += "runpy.run_module('mpoe_kernels.info', run_name='__main__')\n"
    code += f"sys.path.append({str(ROOT)!r}); from mpoe.cli.info import command; command([])\n"
    done = run_python("-I", "-c", code + "print('transformers' in sys.modules)")
    kernels, *shown, info = done.splitlines()
    assert (kernels, info) == ("[]", "False")
    native = "  native          no\n                  it was not built: no compiler was found"
    assert "\n".join(shown).count(native) == 2


def test_calibrated_assertion_catches_what_it_should():
    truth = torch.randn(100, dtype=torch.float64)
    single = truth.float()
    assert_calibrated(single, truth, single)
    refuses(AssertionError, "relative error", assert_calibrated, single * (1 + 1e-5), truth, single)
    refuses(
        AssertionError,
        "holds NaN",
        assert_calibrated,
        torch.full_like(single, float("nan")),
        truth,
        single,
    )
    refuses(AssertionError, "expected shape", assert_calibrated, single[:3], truth, single)
    refuses(AssertionError, "expected dtype", assert_calibrated, single.double(), truth, single)


def test_poisoned_memory_fills_and_restores():
    with poisoned_memory():
        assert bool(torch.empty(64).isnan().all())
        assert bool(torch.ones(3).new_empty(64).isnan().all())
    assert not torch.are_deterministic_algorithms_enabled()
