"""Shared fixtures."""

import atexit
import gc
import os
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # The workers share the cores: more threads would only wait for one another, and those of tests
    # of threads sleep while they wait. Subprocesses inherit it.
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
# By FLOPs alone: no test waits for a timing, depends on one or writes a cache.
os.environ["MPOE_AUTOTUNE"] = "0"
os.fsync = lambda _: None  # no test cuts the power; in processes of their own it is as it was
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may need a network

SHARED = Path(os.environ.get("MPOE_SHARED", Path(__file__).resolve().parents[2] / "shared"))


def pytest_configure(config):
    if config.getoption("numprocesses", default=None):
        return  # the workers run the tests; this process needs no import of theirs
    gc.disable()  # until all are collected: imports leave nothing to free
    import torch
    from hypothesis import settings

    # The same examples on every run and machine: a red test can be repeated.
    settings.register_profile("repeatable", derandomize=True, database=None, deadline=None)
    settings.load_profile("repeatable")
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)
    if torch.cuda.device_count() == 0:
        # The first backward starts autograd's threads, one a device, and children forked later can
        # make none. A fake tensor lets PyTorch count a GPU that is not there, so it counts first.
        torch.ones((), requires_grad=True).backward()
        for module in (torch.cuda, torch.xpu, torch.mtia):
            # Absent, it would keep every seed, with the traceback of who gave it.
            module.manual_seed_all = lambda seed: None
    atexit.register(gc.unfreeze)  # after pytest's own collections, which would look at everything


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes long starts first: at the end, the other workers would wait for it."""
    items.sort(key=lambda item: item.get_closest_marker("first") is None)


def pytest_collection_finish():
    """Imports stay out of garbage collections: Accelerate makes one after every training, half a
    second long. Others are rare: what a test leaves is small."""
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    gc.enable()


@pytest.fixture(autouse=True, scope="module")
def _what_a_module_leaves_stays():
    yield
    gc.collect()
    gc.freeze()


def skip_or_fail(reason):
    """Skip a test that lacks something, unless ``MPOE_REQUIRE_ALL`` is set, as CI does for its slow
    tests."""
    if os.environ.get("MPOE_REQUIRE_ALL"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture
def lacks():
    """`skip_or_fail`, for tests whose folder has a conftest of its own."""
    return skip_or_fail


@pytest.fixture(autouse=True)
def _seed():
    import torch

    torch.default_generator.manual_seed(0)
    # Before, each seed is kept for it with the traceback of who gave it.
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(0)


@pytest.fixture(scope="session")
def shared_data():
    """Folder with the real data sets that experiments use; tests that need it say so when it is
    absent."""
    folder = SHARED / "data"
    if not folder.is_dir():
        skip_or_fail(f"real data sets not found at {folder}")
    return folder
