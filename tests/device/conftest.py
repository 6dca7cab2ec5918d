"""The same tests on any device: ``MPOE_TEST_DEVICE=cuda pytest tests/device`` on a GPU, the CPU by default.

With ``MPOE_TEST_REQUIRED="triton cuda"`` a backend of these that is absent is a failure.

They are few and small: on a GPU every shape and dtype compiles kernels of its own.
"""

from __future__ import annotations

import os

import pytest
import torch

from mpoe_kernels import backend_reasons
from mpoe_kernels.backends import BACKENDS, Request

DEVICE = os.environ.get("MPOE_TEST_DEVICE", "cpu")
# Names of backends that must be able to run there: their tests fail where they are not, instead of being skipped.
REQUIRED = os.environ.get("MPOE_TEST_REQUIRED", "").split()


def check_able(backend: str, dtype: torch.dtype = torch.float32, op: str = "grouped_mpo_linear") -> None:
    """Skip a test whose backend cannot run an op on the device; fail if it has kernels for it and is required."""
    found = BACKENDS[backend].unsupported_reasons(Request(op, torch.device(DEVICE).type, dtype))
    if found:
        required = backend in REQUIRED and BACKENDS[backend].computes(op)
        stop = pytest.fail if required else pytest.skip
        stop(f"{backend}: {'; '.join(found)}")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", list(backend_reasons()))


@pytest.fixture(autouse=True)
def _seed() -> None:
    """As in tests/conftest.py, which is left out where its packages are missing."""
    (torch.manual_seed if DEVICE.startswith("cuda") else torch.default_generator.manual_seed)(0)


@pytest.fixture
def device() -> torch.device:
    if DEVICE.startswith("cuda") and not torch.cuda.is_available():
        pytest.fail(f"MPOE_TEST_DEVICE is {DEVICE}, but torch finds no such device")
    return torch.device(DEVICE)


@pytest.fixture
def able(backend: str) -> str:
    """The backend, if it runs the grouped product there."""
    check_able(backend)
    return backend
