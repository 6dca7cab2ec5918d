"""How the command line shows errors: one line for errors that the user can fix, a traceback for bugs."""

from __future__ import annotations

import difflib
import errno
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path

USER_ERROR = 2
_PACKAGE_FOLDERS = tuple(str(Path(__file__).resolve().parents[2] / name) for name in ("mpoe", "mpoe_kernels"))
_ON_PURPOSE = (ValueError, TypeError, OSError, RuntimeError)
# Errors of the system, wherever they occur: no space, no permission, a failing disk, an impossible path.
_OF_THE_MACHINE = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.EMFILE}
    | {errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR}
)


class CommandError(ValueError):
    """A request of the user that cannot be fulfilled; only its message is shown."""


def close_matches(word: str, known: Iterable[str]) -> str:
    """``"; did you mean 'a' or 'b'?"`` for the nearest of ``known``, or an empty string."""
    matches = difflib.get_close_matches(word, list(known), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(repr(m) for m in matches)}?" if matches else ""


def is_on_purpose(error: BaseException) -> bool:
    """Whether the package raised ``error`` deliberately, as a message to the user.

    This is true for a `CommandError`, for errors of the system (a full disk, no permission), and for errors whose
    innermost frame is in this package: an exception from inside torch or transformers is a bug, there or here, and
    keeps its traceback.
    """
    if isinstance(error, CommandError):
        return True
    if isinstance(error, OSError) and error.errno in _OF_THE_MACHINE:
        return True
    files = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
    return isinstance(error, _ON_PURPOSE) and bool(files) and files[-1].startswith(_PACKAGE_FOLDERS)


def show(error: BaseException, debug: bool = False) -> int:
    """Print ``error`` on stderr and return the exit code: 2 for the user's errors, 1 for bugs."""
    if debug or not is_on_purpose(error):
        traceback.print_exception(error)
    if not is_on_purpose(error):
        return 1
    message = " ".join(str(error).split()) or type(error).__name__
    print(f"mpoe: error: {message}", file=sys.stderr)
    return USER_ERROR
