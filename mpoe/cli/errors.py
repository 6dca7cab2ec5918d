"""Errors of the command line: those that the user can fix, and which those are."""

import difflib
import dis
import errno
import importlib.util
from collections.abc import Iterable
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
_KERNELS = _PACKAGE.parent / "mpoe_kernels"
_ON_PURPOSE = (ValueError, TypeError, OSError, RuntimeError)
_RAISE = dis.opmap["RAISE_VARARGS"]
# The extra of pyproject.toml that a command cannot do without, and its packages.
_FOR_TRAINING = ("train", ("sklearn", "datasets", "matplotlib", "scipy"))
_FOR_REPORTS = ("report", ("matplotlib", "scipy"))
NEEDED = {
    "train": _FOR_TRAINING,
    "evaluate": ("train", ("sklearn", "datasets")),
    "compare": _FOR_REPORTS,
    "inspect": _FOR_TRAINING,  # of data it reads as training does
}


class CommandError(ValueError):
    """A request of the user that cannot be fulfilled; only its message is shown."""


def check_files(option_name: str, files: Iterable[str | Path]) -> None:
    """Refuse files that are not there (CommandError)."""
    for file in files:
        if not Path(file).is_file():
            raise CommandError(f"{option_name}: no such file: {file}")


def check_installed(command: str) -> None:
    """Refuse a command whose extra is not installed (CommandError), without importing it."""
    extra, packages = NEEDED.get(command, ("", ()))
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise CommandError(
            f"mpoe {command} needs what is not installed here, {', '.join(missing)}: "
            f'pip install "mpoe[{extra}]"'
        )


def close_matches(word: str, known: Iterable[str]) -> str:
    """``"; did you mean 'a' or 'b'?"`` for the nearest of ``known``, or an empty string."""
    matches = difflib.get_close_matches(word, list(known), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(repr(m) for m in matches)}?" if matches else ""


def is_on_purpose(error: BaseException) -> bool:
    """Whether the package raised ``error`` deliberately, as a message to the user.

    This is true for a `CommandError`, for errors of the system wherever they occur (a full disk, no
    permission; not for an absent file), for errors that a ``raise`` in this package began, and for
    a ValueError of the compiled library: an exception from inside Python, torch or transformers is
    a bug, there or here, and keeps its traceback.
    """
    of_the_system = isinstance(error, OSError) and error.errno not in (None, errno.ENOENT)
    if of_the_system or isinstance(error, CommandError):
        return True
    entry = error.__traceback__
    if entry is None or not isinstance(error, _ON_PURPOSE):
        return False
    while entry.tb_next is not None:
        entry = entry.tb_next
    code = entry.tb_frame.f_code
    file = Path(code.co_filename)
    if code.co_code[entry.tb_lasti] == _RAISE:
        return any(file.is_relative_to(folder) for folder in (_PACKAGE, _KERNELS))
    return isinstance(error, ValueError) and file.is_relative_to(_KERNELS)
