"""Assertions calibrated against PyTorch's own rounding, refusals, poisoned memory, threads, and
processes."""

import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from mpoe_bench.cases import relative_error
from torch import nn


def assert_calibrated(actual, truth, same_dtype, name="result", factor=2):
    """Require the error of ``actual`` against the float64 ``truth`` to stay within ``factor`` of
    PyTorch's own.

    Args:
        actual: the result under test.
        truth: float64 reference.
        same_dtype: the reference computed by plain PyTorch in the dtype under test: it sets the
            tolerance, with a floor of four units of rounding of that dtype (128 for a tensor of
            fewer than 32 elements, 32 in half precision).
        name: the tensor's name in failure messages.

    Raises:
        AssertionError: shape, dtype, non-finite values, or an error too large.
    """
    if actual.shape != truth.shape:
        raise AssertionError(
            f"{name}: expected shape {list(truth.shape)}, got {list(actual.shape)}"
        )
    if actual.dtype != same_dtype.dtype:
        raise AssertionError(f"{name}: expected dtype {same_dtype.dtype}, got {actual.dtype}")
    if not bool(torch.isfinite(actual).all()):
        raise AssertionError(f"{name}: holds NaN or Inf")
    own = relative_error(same_dtype, truth)
    few = 32 if actual.dtype.itemsize == 2 else 128
    units = 4 if actual.numel() >= 32 else few  # a few sums may cancel; many do not all cancel
    allowed = max(factor * own, units * torch.finfo(actual.dtype).eps)
    found = relative_error(actual, truth)
    if found > allowed:
        raise AssertionError(
            f"{name}: relative error {found:.3e}, allowed {allowed:.3e} (PyTorch's own: {own:.3e})"
        )


def differing(one, other):
    """Names of the tensors of ``one`` that ``other`` lacks, or has in another dtype or with other
    bits; of a module, those of its state."""
    first, second = (
        tensors.state_dict() if isinstance(tensors, nn.Module) else tensors
        for tensors in (one, other)
    )
    return [
        name
        for name, value in first.items()
        if name not in second
        or value.dtype != second[name].dtype
        or not torch.equal(value, second[name])
    ]


@contextmanager
def torch_threads(count):
    """Run with the given number of CPU threads; kernels split their work by it."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def in_threads(count, work):
    """Results of ``work(0) .. work(count - 1)``, which begin at once, each in a thread of its
    own."""
    barrier = threading.Barrier(count)

    def run(number):
        barrier.wait()
        return work(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


def run_python(*arguments, code=0, **options):
    """Run Python in a process of its own, which must end with ``code``; returns its output, or its
    errors."""
    command = [sys.executable, *map(str, arguments)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert answer.returncode == code, answer.stderr
    return str(answer.stderr if code else answer.stdout)


def read_json(file):
    """What a file of JSON holds."""
    return json.loads(file.read_text(encoding="utf-8"))


def write_json(file, value):
    file.write_text(json.dumps(value))


@contextmanager
def poisoned_memory(device="cpu"):
    """Fill everything that ``torch.empty`` and similar functions return with NaN (integers: their
    largest value).

    On a GPU nothing is filled: its libraries refuse the setting that this takes.
    """
    if torch.device(device).type != "cpu":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def refuses(error, message, call, /, *arguments, **options):
    """Require that a call raises ``error`` with a text in which the pattern ``message`` is
    found."""
    with pytest.raises(error, match=message):
        call(*arguments, **options)
