"""The output of `mpoe train` while it runs and when it is interrupted."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def show_progress(trainer: Any) -> None:
    """Print a line for each log call instead of a dictionary; progress bars only on a terminal."""
    from tqdm.auto import tqdm
    from transformers import PrinterCallback, ProgressCallback

    from mpoe.training.callbacks import LogLineCallback

    class Bars(ProgressCallback):
        def on_log(self, *arguments: Any, **keywords: Any) -> None:
            """Do nothing: `LogLineCallback` writes the line."""

    bars = not trainer.args.disable_tqdm and sys.stderr.isatty()
    for shown in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(shown)
    if bars:
        trainer.add_callback(Bars)
    trainer.add_callback(LogLineCallback(tqdm.write if bars else _print_now))


def _print_now(line: str) -> None:
    print(line, flush=True)


@contextlib.contextmanager
def going_on(folder: Path, command: str) -> Iterator[None]:
    """Inside this context, an interrupted run prints how to continue."""
    from mpoe.training import find_last_checkpoint

    try:
        yield
    except KeyboardInterrupt:
        checkpoint = find_last_checkpoint(folder)
        where = f"at {checkpoint.name}" if checkpoint else "at step 0, as there is no checkpoint yet"
        words = [word for word in shlex.split(command) if word not in ("--overwrite", "--resume")]
        raise KeyboardInterrupt(f"go on {where} with {shlex.join([*words, '--resume'])}") from None
