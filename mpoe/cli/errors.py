"""Errors of the command line that the user can fix: raising them, and telling them from bugs."""

import difflib
import dis
import errno
import importlib.util
from collections.abc import Iterable
from pathlib import Path

_ON_PURPOSE = (ValueError, TypeError, OSError, RuntimeError)
_RAISE = dis.opmap["RAISE_VARARGS"]
_FOR_TRAINING = ("train", ("sklearn", "datasets", "matplotlib", "scipy"))
# command -> the extra of pyproject.toml that it cannot do without, and its packages
NEEDED = {
    "train": _FOR_TRAINING,
    "evaluate": ("train", ("sklearn", "datasets")),
    "compare": ("report", ("matplotlib", "scipy")),
    "inspect": _FOR_TRAINING,  # it reads data as training does
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
    permission; not for an absent file), and for errors that a ``raise`` in our packages began. It
    is also true for every other ValueError out of ``mpoe_kernels``, as those of its compiled
    library begin in no ``raise`` of Python. An exception from inside Python, torch or transformers
    is a bug, there or here, and keeps its traceback.
    """
    of_the_system = isinstance(error, OSError) and error.errno not in (None, errno.ENOENT)
    if of_the_system or isinstance(error, CommandError):
        return True
    entry = error.__traceback__
    # NotImplementedError, a RuntimeError, is never meant for the user
    if entry is None or not isinstance(error, _ON_PURPOSE) or type(error) is NotImplementedError:
        return False
    while entry.tb_next is not None:
        entry = entry.tb_next
    package = entry.tb_frame.f_globals.get("__name__", "").partition(".")[0]
    if entry.tb_frame.f_code.co_code[entry.tb_lasti] == _RAISE:
        return package in ("mpoe", "mpoe_kernels")
    return package == "mpoe_kernels" and isinstance(error, ValueError)
