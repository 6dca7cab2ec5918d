"""Only one process at a time writes to a run's folder: an operating-system lock, and a file that
names the holder.

The lock is `flock` on a file in the folder. The kernel releases it when the process ends, however
it ends, so a killed run never blocks the next one; the leftover file locks nothing.
`docs/reliability.md` covers network file systems.
"""

import contextlib
import datetime
import errno
import json
import os
import random
import socket
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

try:
    import fcntl
except ImportError:  # Windows has no flock: folders are not locked there
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = "_run.lock"  # the Trainer does not upload names with this prefix to a hub
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
# seconds; we wait only for processes that check whether a folder is free, which takes microseconds
_PATIENCE = 5.0


class FolderInUseError(ValueError):
    """Another process writes this folder; the message says which, on which host, and since when."""

    def __init__(self, folder: Path, holder: str) -> None:
        super().__init__(
            f"output_dir {folder} is in use by {holder}; wait until it has ended, or choose "
            "another folder"
        )


_held: dict[
    Path, list[int]
] = {}  # this process's locks: the folder's real path -> descriptor, how often it is held
_guard = threading.RLock()


@contextlib.contextmanager
def hold(folder: str | Path) -> Iterator[None]:
    """Lock ``folder`` for this process, creating it if needed; a process may lock a folder more
    than once.

    Raises:
        FolderInUseError: another process holds it.
        OSError: the folder cannot be created or written. Such errors from inside the block, for
            example on a full disk, also name it.
    """
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    real = path.resolve()
    with _guard:
        if real in _held:
            _held[real][1] += 1
        elif (acquired := _acquire(path, real / LOCK_FILE)) is not None:
            _held[real] = [acquired, 1]
    try:
        yield
    except (OSError, SafetensorError) as error:
        # Errors on writing to an open file do not name it: add the folder.
        if str(path) in str(error) or (
            isinstance(error, OSError) and error.errno not in _OF_THE_DISK
        ):
            raise
        said = f"output_dir {path} could not be written: {error}"
        raise (
            OSError(error.errno, said) if isinstance(error, OSError) else OSError(said)
        ) from error
    finally:
        with _guard:
            if real in _held:  # not in a forked child, and not where there are no locks
                _held[real][1] -= 1
                if not _held[real][1]:
                    descriptor, _ = _held.pop(real)
                    with contextlib.suppress(
                        OSError
                    ):  # somebody may have deleted the folder, or made it read-only
                        if _is_at(descriptor, real / LOCK_FILE):
                            (real / LOCK_FILE).unlink()
                    os.close(descriptor)


def check_free(folder: str | Path) -> None:
    """Refuse a folder that another process holds (`FolderInUseError`), without writing."""
    path = Path(folder)
    file = path.resolve() / LOCK_FILE
    if fcntl is None or path.resolve() in _held or not file.is_file():
        return
    with contextlib.suppress(FileNotFoundError), file.open("rb") as opened:
        if not _try(opened.fileno(), fcntl.LOCK_SH):
            raise FolderInUseError(path, _holder(file))


def _acquire(folder: Path, file: Path) -> int | None:
    if fcntl is None:
        return None
    end = time.monotonic() + _PATIENCE
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            # A holder deletes the file when it ends: a lock on a deleted file locks nothing.
            if _try(descriptor, fcntl.LOCK_EX):
                if _is_at(descriptor, file):
                    since = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
                    record = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, json.dumps(record).encode(), 0)
                    return descriptor
            elif not _try(descriptor, fcntl.LOCK_SH) or time.monotonic() > end:
                raise FolderInUseError(folder, _holder(file))
            os.close(descriptor)
        except OSError as error:
            os.close(descriptor)
            if error.errno in _NO_LOCKS:
                warnings.warn(
                    f"the file system of output_dir {folder} has no locks ({error.strerror}): "
                    "nothing keeps a second process out of it",
                    stacklevel=4,
                )
                return None
            raise OSError(
                error.errno, f"output_dir {folder} cannot be locked: {error.strerror}"
            ) from error
        except BaseException:
            os.close(descriptor)
            raise
        time.sleep(random.uniform(0.001, 0.01))


def _try(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False


def _holder(file: Path) -> str:
    """A description of the lock's holder."""
    for _ in range(5):
        try:
            record = json.loads(file.read_text())
            return f"process {record['pid']} on {record['host']}, since {record['since']}"
        except (OSError, ValueError, KeyError, TypeError):
            time.sleep(0.01)  # it has the lock, but has not written its name yet
    return "another process"


def _forget() -> None:
    """Called in a forked child: the locks belong to the parent and end only with it."""
    global _guard
    _guard = threading.RLock()
    for descriptor, _ in _held.values():
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
