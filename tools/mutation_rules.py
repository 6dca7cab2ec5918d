"""Small changes to a function, each a bug that some test should catch; made by rule from its Python or C++ source.

Every mutant replaces one piece of one file. Error messages, docstrings, annotations and assertions (``zip``'s
``strict`` counts as one) are left alone: a test that watched them would test wording.
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
# C++ tokens; the project's formatting puts spaces around operators but not inside types.
TOKENS = {
    " < ": " <= ",
    " <= ": " < ",
    " > ": " >= ",
    " >= ": " > ",
    " == ": " != ",
    " != ": " == ",
    " + ": " - ",
    " - ": " + ",
    " * ": " + ",
    " / ": " * ",
    " % ": " / ",
    " && ": " || ",
    " || ": " && ",
    " += ": " -= ",
}
CPP = (".cpp", ".h", ".cu", ".cuh")


@dataclass(frozen=True)
class Mutant:
    """One change.

    Attributes:
        target: ``file:function`` as named in the table.
        path: the file, relative to the root.
        rule: kind of change.
        line: line number, from 1.
        start, stop: the replaced range, in characters of the file.
        offset: where the range begins in the function, in characters.
        before, after: the replaced text and its replacement.
        digest: hash of the function, so that results do not outlive a change to it.
    """

    target: str
    path: str
    rule: str
    line: int
    start: int
    stop: int
    offset: int
    before: str
    after: str
    digest: str

    @property
    def name(self) -> str:
        """Identifies the change and the version of the function."""
        return f"{self.target}@{self.digest} {self.rule} {self.offset}: {self.before!r} -> {self.after!r}"

    def applied(self, text: str) -> str:
        """The file's text with the change."""
        return text[: self.start] + self.after + text[self.stop :]


def resolve(root: Path, target: str) -> tuple[Path, str]:
    """The one file whose path ends in the target's, and the function's name.

    Raises:
        ValueError: no such file, or several.
    """
    suffix, _, function = target.partition(":")
    top = suffix.split("/")[0]
    folders = [root / top] if (root / top).is_dir() else [root / name for name in ("mpoe_kernels", "mpoe", "csrc")]
    found = [p for folder in folders for p in folder.rglob(Path(suffix).name) if p.as_posix().endswith(f"/{suffix}")]
    if len(found) != 1 or not function:
        raise ValueError(f"{target!r} must name one file and a function of it; found {len(found)} files")
    return found[0], function


def mutants_of(root: Path, target: str) -> list[Mutant]:
    """Every change that the rules make in a function, in file order.

    Raises:
        ValueError: the target does not exist.
    """
    path, function = resolve(root, target)
    text = path.read_text(encoding="utf-8")
    first, last = (_cpp_span if path.suffix in CPP else _python_span)(text, function, target)
    digest = hashlib.sha256(text[first:last].encode()).hexdigest()[:8]
    changes = _cpp_changes(text, first, last) if path.suffix in CPP else _python_changes(text, first, last)
    relative = path.relative_to(root).as_posix()
    return [
        Mutant(
            *(target, relative, rule, text.count("\n", 0, start) + 1, start, stop, start - first),
            *(text[start:stop], after, digest),
        )
        for rule, start, stop, after in sorted(changes, key=lambda change: change[1:3])
    ]


Change = tuple[str, int, int, str]

# ------------------------------------------------------------------ Python


def _positions(text: str) -> list[int]:
    """Where each line begins, in characters."""
    return [0, *(match.end() for match in re.finditer("\n", text))]


def _span(lines: list[int], text: str, node: ast.AST) -> tuple[int, int]:
    """A node's range in characters; ast counts columns in bytes."""

    def offset(line: int, column: int) -> int:
        whole = text[lines[line - 1] :].split("\n", 1)[0].encode()
        return lines[line - 1] + len(whole[:column].decode())

    return offset(node.lineno, node.col_offset), offset(node.end_lineno, node.end_col_offset)  # type: ignore[attr-defined]


def _python_function(tree: ast.Module, function: str, target: str) -> ast.AST:
    node: ast.AST = tree
    for part in function.split("."):
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        inside = [n for n in ast.iter_child_nodes(node) if isinstance(n, kinds) and n.name == part]
        if not inside:
            raise ValueError(f"{target!r}: there is no {part}")
        node = inside[-1]
    return node


def _python_span(text: str, function: str, target: str) -> tuple[int, int]:
    return _span(_positions(text), text, _python_function(ast.parse(text), function, target))


def _nodes(node: ast.AST) -> Iterator[ast.AST]:
    """All descendants that compute something."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "type_params"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(child, ast.Raise | ast.Assert | ast.JoinedStr):
                continue
            if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
                continue
            if isinstance(child, ast.keyword) and child.arg == "strict":
                continue
            yield child
            yield from _nodes(child)


def _python_changes(text: str, first: int, last: int) -> Iterator[Change]:
    lines, tree = _positions(text), ast.parse(text)
    function = next(n for n in ast.walk(tree) if hasattr(n, "lineno") and _span(lines, text, n) == (first, last))
    for node in _nodes(function):
        change = _python_change(node)
        if change is None or not hasattr(node, "lineno"):
            continue
        start, stop = _span(lines, text, node)
        yield change[0], start, stop, change[1]


def _python_change(node: ast.AST) -> tuple[str, str] | None:
    """The rule and the replacement text, or None."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARISONS:
        flipped = ast.Compare(node.left, [COMPARISONS[type(node.ops[0])](), *node.ops[1:]], node.comparators)
        return "comparison", f"({ast.unparse(flipped)})"
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return "operator", f"({ast.unparse(ast.BinOp(node.left, OPERATORS[type(node.op)](), node.right))})"
    if isinstance(node, ast.BoolOp):
        other = ast.And() if isinstance(node.op, ast.Or) else ast.Or()
        return "operator", f"({ast.unparse(ast.BoolOp(other, node.values))})"
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.Invert | ast.USub):
        return "operator", f"({ast.unparse(node.operand)})"
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        return "constant", str(not node.value)
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return "constant", repr(node.value + 1)
    if isinstance(node, ast.IfExp):
        return "branch", f"({ast.unparse(ast.IfExp(node.test, node.orelse, node.body))})"
    if isinstance(node, ast.AugAssign):
        return "statement", "pass"
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        return "statement", "pass"
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Subscript | ast.Attribute):
        return "statement", "pass"
    return None


# --------------------------------------------------------------------- C++


def _cpp_span(text: str, function: str, target: str) -> tuple[int, int]:
    """From the name of a definition to the brace that closes its body."""
    for match in re.finditer(rf"\b{re.escape(function)}\(", text):
        close = _closing(text, match.end() - 1, "()")
        body = re.compile(r"\s*(?:const|noexcept|override|\s)*(?::[^;{]*)?\{").match(text, close + 1)
        if body:
            return match.start(), _closing(text, body.end() - 1, "{}") + 1
    raise ValueError(f"{target!r}: there is no definition of {function}")


def _closing(text: str, start: int, pair: str) -> int:
    depth = 0
    for position in range(start, len(text)):
        depth += (text[position] == pair[0]) - (text[position] == pair[1])
        if depth == 0:
            return position
    raise ValueError(f"{pair[0]} without {pair[1]}")


def _cpp_changes(text: str, first: int, last: int) -> Iterator[Change]:
    start = text.index("{", _closing(text, text.index("(", first), "()"))
    code = re.sub(r'//[^\n]*|"(?:[^"\\]|\\.)*"', lambda m: " " * len(m.group()), text[start:last])
    for token, other in TOKENS.items():
        for match in re.finditer(re.escape(token), code):
            yield "operator", start + match.start(), start + match.end(), other
    for match in re.finditer(r"(?<![\w.])\d+(?![\w.])", code):
        yield "constant", start + match.start(), start + match.end(), str(int(match.group()) + 1)
    # A call or an assignment on its own line; not a declaration, whose name would then be missing.
    for match in re.finditer(r"^ *((?:[\w.>\[\]()*+-]+ [-+]?= |[\w.:>-]+\()[^;{}]*;)$", code, re.MULTILINE):
        if not match.group(1).startswith(("return", "static_assert")):
            yield "statement", start + match.start(1), start + match.end(1), ";"
