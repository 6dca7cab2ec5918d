"""Work in forked processes that have torch imported already: runs to be killed, disks that are full
or read-only.

What was saved must stay whole. ``SEED`` is that of the exhaustive tests, ``SEED=1`` in the
environment tries others.
"""

import contextlib
import ctypes
import multiprocessing.context
import os
import random
import re
import resource
import signal
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from tqdm import tqdm

from mpoe.cli.main import main
from mpoe.models import load_mpoe
from mpoe.training import checkpoints, find_last_checkpoint, prepare_output_dir, read_metrics
from mpoe.training.output_dir import RUN_FILE
from mpoe.training.published import publish, staging_folder
from tests.training.tiny import make_trainer, resume_options

# Its thread may hold tqdm's lock at a fork, and the child would wait for ever.
tqdm.monitor_interval = 0
SEED = int(os.environ.get("SEED", "0"))
_VERSION_3, _DAC_OVERRIDE, _DAC_READ_SEARCH = 0x20080522, 1, 2  # linux/capability.h


class Child(multiprocessing.context.ForkProcess):
    """A forked process; what it prints goes to ``log``."""

    def __init__(self, work, log):
        super().__init__(target=work)
        self.log = log

    def run(self):
        descriptor = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        super().run()

    def wait(self, seconds=600.0):
        """Exit status, negative for a signal; a child that takes longer is killed."""
        self.join(seconds)
        if self.exitcode is None:
            self.kill()
            raise TimeoutError(f"process {self.pid} did not end in {seconds} s; see {self.log}")
        return self.exitcode

    def kill(self):
        """Kill -9; it may have ended before."""
        super().kill()
        self.join()


def fork(work, log):
    """Run ``work`` in a child process: exit status 0, 1 with a traceback in ``log``, or that of a
    SystemExit."""
    child = Child(work, log)
    child.start()
    return child


@contextlib.contextmanager
def limited_files(size):
    """Let no file of this process grow beyond ``size`` bytes: a write then fails, as on a full
    disk."""
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    sys.dont_write_bytecode = True  # half a module's would be read by everybody after us
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


def obey_permissions():
    """Make root obey the permissions of files, as everybody else does, for the rest of this
    process."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, words = (ctypes.c_uint32 * 2)(_VERSION_3, 0), (ctypes.c_uint32 * 6)()
    if libc.capget(header, words) != 0:
        raise OSError(ctypes.get_errno(), "capget")
    keep = ~(1 << _DAC_OVERRIDE | 1 << _DAC_READ_SEARCH) & 0xFFFFFFFF
    words[0] &= keep  # effective; the two others are permitted and inheritable
    if libc.capset(header, words) != 0:
        raise OSError(ctypes.get_errno(), "capset")


def resident_bytes():
    """Memory of this process that is in RAM now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


# ------------------------------------------------------------------ runs to be killed

STEPS = 12
RUN = {"steps": STEPS, "family": "t5"}


def victim(folder):
    """One process of a run: from the beginning, or from the last checkpoint."""
    torch.set_num_threads(1)
    resume = (folder / RUN_FILE).is_file()
    checkpoint = prepare_output_dir(folder, resume=resume, run_config=RUN)
    trainer = make_trainer(folder, **resume_options("t5", STEPS))
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    trainer.model.save_pretrained(staging_folder(folder))
    publish(folder)


def kill_runs(kills, seed, folder):
    """Kill ``kills`` processes, spread over as many runs as that takes; every run is then let
    through to its end."""
    draw, tally = random.Random(seed), Counter[str]()
    folder.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    expected = straight_run(folder)
    length = time.monotonic() - start
    while tally["killed"] < kills:
        run = folder / f"run-{tally['runs']}"
        for _ in range(min(draw.randint(1, 8), kills - tally["killed"])):
            last = find_last_checkpoint(run)
            child = fork(partial(victim, run), folder / f"{run.name}.log")
            was_saving = kill_sometime(child, run, draw, length)
            check_saved(run, last)
            if child.exitcode != -9:
                break  # it was faster
            tally.update(killed=1, while_saving=was_saving)
        # Undisturbed to its end; where a killed one had reached it, only its leftovers are cleared
        # away.
        finish(run, expected, folder / f"{run.name}.log")
        tally["runs"] += 1
    return tally


def kill_sometime(child, run, draw, length):
    """Kill a child at a random moment of its run, or within a save; returns whether a save was in
    progress."""
    staging = [checkpoints.staging_root(run), run / ".incomplete-model"]
    if draw.random() < 0.5:
        end = time.monotonic() + draw.uniform(0.0, length)
        while child.is_alive() and time.monotonic() < end:
            time.sleep(0.001)
    else:
        skip, seen = draw.randint(0, 4), False  # so many saves go by
        while child.is_alive() and skip >= 0:
            saving = any(path.exists() for path in staging)
            skip -= saving and not seen
            seen = saving
            time.sleep(0.0005)
        time.sleep(draw.uniform(0.0, 0.05))
    was_saving = any(path.exists() for path in staging)
    child.kill()
    return was_saving


def check_saved(run, last):
    """Right after a kill; ``last`` is the newest checkpoint there was before."""
    if not run.is_dir():
        return  # killed before it began
    for path in run.glob("checkpoint-*"):
        assert checkpoints.is_complete(path), path
        assert not checkpoints.damaged_files(path), path
    now = find_last_checkpoint(run)
    assert last is None or (now and checkpoints.step_of(now) >= checkpoints.step_of(last)), (
        f"{last} is lost"
    )
    if (run / "config.json").exists():
        load_mpoe(run)  # what looks like a model is one


def finish(run, expected, log):
    """Let a run through to its end: it must equal one that nobody disturbed."""
    assert fork(partial(victim, run), log).wait() == 0, log.read_text()[-500:]
    got = load_file(run / "model.safetensors")
    assert [
        name for name in expected if not torch.equal(got.get(name, torch.zeros(0)), expected[name])
    ] == [], run
    assert [record["step"] for record in read_metrics(run) if "loss" in record] == list(
        range(1, STEPS + 1)
    ), run
    assert [path.name for path in run.iterdir() if path.name.startswith(".")] == [], "left behind"


def straight_run(folder):
    """Weights of a run that nobody disturbs."""
    if fork(lambda: victim(folder / "straight"), folder / "straight.log").wait():
        raise RuntimeError((folder / "straight.log").read_text())
    return load_file(folder / "straight/model.safetensors")


def full_disk(folder, size, expected):
    """Train where no file may grow beyond ``size`` bytes, which ends in an OSError, then where it
    may."""
    run, log = folder / f"full-{size}", folder / f"full-{size}.log"

    def starved():
        torch.set_num_threads(1)
        with limited_files(size):
            victim(run)

    assert fork(starved, log).wait() == 1
    assert re.search(r"^(OSError|safetensors_rust|.*SafetensorError)", log.read_text(), re.M), (
        log.read_text()[-500:]
    )
    check_saved(run, None)
    finish(run, expected, log)


def command_says(arguments, log, size=None, as_user=False):
    """Exit code and output of the command line on a full disk, or without root's rights."""

    def work():
        torch.set_num_threads(1)
        os.environ["HF_HUB_OFFLINE"] = "1"
        if as_user:
            obey_permissions()
        with limited_files(size or resource.RLIM_INFINITY):
            main(arguments)

    return fork(work, log).wait(), log.read_text()
