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


def reasons(backend: str, dtype: torch.dtype, op: str = "grouped_mpo_linear") -> list[str]:
    """Why a backend cannot run an op on the device."""
    return BACKENDS[backend].unsupported_reasons(Request(op, torch.device(DEVICE).type, dtype))


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
def required() -> list[str]:
    """Backends whose tests must not be skipped."""
    return REQUIRED


@pytest.fixture
def able(backend: str, request: pytest.FixtureRequest) -> str:
    """The backend, if it runs there what the test is about: the grouped product, or the op of its mark ``op``."""
    mark = request.node.get_closest_marker("op")
    if found := reasons(backend, torch.float32, *(mark.args if mark else ())):
        stop = pytest.fail if backend in REQUIRED else pytest.skip
        stop(f"{backend}: {'; '.join(found)}")
    return backend
