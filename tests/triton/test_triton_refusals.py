"""Wrong use of the Triton backend through the public ops gives its reasons, not a stack trace from inside Triton."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from mpoe_kernels import BackendError, backend_reasons, route, use_backend
from mpoe_kernels.triton import architecture
from tests.assertions import refuses
from tests.kernels.problems import problems

pytestmark = pytest.mark.skipif(architecture.in_interpreter(), reason="the interpreter takes CPU tensors")
OPS = sorted(problems().keys() - {"mpo_embedding"})  # which PyTorch computes


def run(name: str, dtype: torch.dtype) -> None:
    function, inputs = problems(dtype=dtype)[name]
    with use_backend("triton"):
        function(*inputs)


@pytest.mark.parametrize("name", OPS)
def test_cpu_tensors_and_float64_are_named_together(name: str) -> None:
    with pytest.raises(BackendError, match=r"'triton' cannot run .*it runs on cuda, not on cpu"):
        run(name, torch.float32)
    with pytest.raises(BackendError, match="float32, bfloat16, float16, not in float64") as caught:
        run(name, torch.float64)
    assert "not on cpu" in str(caught.value)


def test_cpu_indices() -> None:
    with pytest.raises(BackendError, match="it runs on cuda, not on cpu"):
        route(torch.tensor([[0], [1]]), 2, backend="triton")


@pytest.fixture
def forgetful(monkeypatch: pytest.MonkeyPatch):
    """Clears cached answers about the machine, before and after the test."""
    for question in (architecture.triton_installed, architecture.triton_reasons):
        question.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    for question in (architecture.triton_installed, architecture.triton_reasons):
        question.cache_clear()


def test_without_triton(forgetful: pytest.MonkeyPatch) -> None:
    forgetful.setattr(architecture, "find_spec", lambda _: None)
    assert "the package triton is not installed" in backend_reasons()["triton"]
    for call in (lambda: route(torch.tensor([[0], [1]]), 2, backend="triton"), lambda: run("dispatch", torch.float32)):
        refuses(BackendError, "the package triton is not installed", call)


@pytest.mark.parametrize("found", ["3.5.1", "2.3.0+rocm6", "3.5.0.dev20250101"])
def test_with_an_old_triton(found: str, forgetful: pytest.MonkeyPatch) -> None:
    forgetful.setattr(architecture, "find_spec", lambda _: object())
    forgetful.setattr(architecture, "version", lambda _: found)
    with pytest.raises(BackendError, match=rf"it needs triton 3\.6 or newer; found {found.replace('+', '.')}"):
        run("grouped_mpo_linear", torch.float32)


@pytest.mark.parametrize("found", ["3.6.0", "3.6.0+git1234", "3.10.1", "4.0.0"])
def test_newer_tritons_are_taken(found: str, forgetful: pytest.MonkeyPatch) -> None:
    forgetful.setattr(architecture, "find_spec", lambda _: object())
    forgetful.setattr(architecture, "version", lambda _: found)
    assert architecture.triton_reasons() == ()


def test_what_no_kernel_is_made_for() -> None:
    """The planner never asks for these; the messages come from the launcher."""
    pytest.importorskip("triton")
    from mpoe_kernels.linear.triton.fused_tiles import Sides, fused_choice
    from mpoe_kernels.testing.launches import recorded

    sides = Sides((8, 8, 8), (8, 8, 8), 10_000, 10_000)
    with recorded("sm_80"), pytest.raises(ValueError, match=r"no tile of the fused kernels fits .*a=10000.* on sm_80"):
        fused_choice(torch.empty(1, device="meta"), sides, 1.0, "rows")


@pytest.mark.usefixtures("with_triton")
def test_what_triton_finds_out_too_late_is_said_in_our_words() -> None:
    from triton.runtime.errors import OutOfResources

    from mpoe_kernels.triton.start import start

    class TooLarge:
        __name__ = "grouped_rows_kernel"

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def launch(**arguments: object) -> None:
                raise OutOfResources(262144, 101376, "shared memory")

            return launch

    message = r"grouped_rows_kernel with {'BM': 64}: it needs 262144 of shared memory; .* 101376"
    with pytest.raises(BackendError, match=message):
        start(TooLarge(), (1,), BM=64)
