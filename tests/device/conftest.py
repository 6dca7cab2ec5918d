"""The same tests on any device: ``MPOE_TEST_DEVICE=cuda pytest tests/device`` on a GPU, the CPU by
default.

With ``MPOE_TEST_REQUIRED="triton cuda"`` a backend of these that is absent is a failure.
``MPOE_TEST_WRONG`` names a file that keeps which backend gave a wrong result for which op: later
tests of that pair, also in later runs, are skipped.

They are few and small: on a GPU every shape and dtype compiles kernels of its own.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mpoe_kernels import backend_reasons
from mpoe_kernels.backends import BACKENDS, Request

DEVICE = os.environ.get("MPOE_TEST_DEVICE", "cpu")
# Names of backends that must be able to run there: their tests fail where they are not, instead of
# being skipped.
REQUIRED = os.environ.get("MPOE_TEST_REQUIRED", "").split()


def wrong_file():
    name = os.environ.get("MPOE_TEST_WRONG")
    return Path(name) if name else None


def is_wrong(kernel):
    """Whether a backend's kernel, ``backend op``, gave a wrong result earlier."""
    path = wrong_file()
    return path is not None and path.exists() and kernel in path.read_text().splitlines()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Keep what gave a wrong result: the last kernel that the test asked for."""
    kernels = [value for name, value in item.user_properties if name == "kernel"]
    path = wrong_file()
    if (
        path is not None
        and kernels
        and call.excinfo is not None
        and call.excinfo.errisinstance(AssertionError)
    ):
        with open(path, "a") as file:
            file.write(f"{kernels[-1]}\n")
    return (yield)


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", list(backend_reasons()))


@pytest.fixture(autouse=True)
def _seed():
    """As in tests/conftest.py, which is left out where its packages are missing."""
    (torch.manual_seed if DEVICE.startswith("cuda") else torch.default_generator.manual_seed)(0)


@pytest.fixture
def device():
    if DEVICE.startswith("cuda") and not torch.cuda.is_available():
        pytest.fail(f"MPOE_TEST_DEVICE is {DEVICE}, but torch finds no such device")
    return torch.device(DEVICE)


@pytest.fixture
def check_able(request):
    """Skips a test whose backend cannot run an op on the device, or was wrong; fails if it should
    be able to."""

    def check(backend, op="grouped_mpo_linear", dtype=torch.float32):
        kernel = f"{backend} {op}"
        request.node.user_properties.append(("kernel", kernel))
        if is_wrong(kernel):
            pytest.skip(f"{kernel} gave a wrong result earlier")
        found = BACKENDS[backend].unsupported_reasons(Request(op, torch.device(DEVICE).type, dtype))
        if found:
            required = backend in REQUIRED and BACKENDS[backend].computes(op)
            stop = pytest.fail if required else pytest.skip
            stop(f"{backend}: {'; '.join(found)}")

    return check


@pytest.fixture
def able(backend, check_able):
    """The backend, if it runs the grouped product there."""
    check_able(backend)
    return backend
