"""Disks that are full or may not be written: the run ends in our words, and what was saved stays whole."""

from __future__ import annotations

import os
import re
import resource
from pathlib import Path

import torch
from safetensors.torch import load_file

from mpoe.cli.main import main
from mpoe.training import find_last_checkpoint

from .kills import victim, what_differs, what_is_wrong
from .processes import fork, limited_files, obey_permissions


def straight_run(folder: Path) -> dict[str, torch.Tensor]:
    """Weights of a run that nobody disturbs."""
    if fork(lambda: victim(folder / "straight"), folder / "straight.log").wait():
        raise RuntimeError((folder / "straight.log").read_text())
    return load_file(folder / "straight" / "model.safetensors")


def full_disk(folder: Path, size: int, expected: dict[str, torch.Tensor]) -> list[str]:
    """Train where no file may grow beyond ``size`` bytes, then where it may; returns problems."""
    run, log = folder / f"full-{size}", folder / f"full-{size}.log"

    def starved() -> None:
        torch.set_num_threads(1)
        with limited_files(size):
            victim(run)

    problems = []
    if fork(starved, log).wait() != 1 or not re.search(
        r"^(OSError|safetensors_rust|.*SafetensorError)", log.read_text(), re.M
    ):
        problems.append(f"a full disk was not noticed as an OSError: {log.read_text()[-500:]}")
    problems += what_is_wrong(run, None)
    last = find_last_checkpoint(run)
    if fork(lambda: victim(run), log).wait():
        problems.append(f"no way on after {last}: {log.read_text()[-500:]}")
    return problems + what_differs(run, expected)


def command_says(arguments: list[str], log: Path, size: int | None = None, as_user: bool = False) -> tuple[int, str]:
    """Exit code and output of the command line on a full disk, or without root's rights."""

    def work() -> None:
        torch.set_num_threads(1)
        os.environ["HF_HUB_OFFLINE"] = "1"
        if as_user:
            obey_permissions()
        with limited_files(size or resource.RLIM_INFINITY):
            main(arguments)

    return fork(work, log).wait(), log.read_text()
