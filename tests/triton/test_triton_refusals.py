"""Wrong use of the Triton backend through the public ops gives its reasons, not a stack trace from
inside Triton."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from mpoe_kernels import BackendError, backend_reasons, use_backend
from mpoe_kernels.backends import BACKENDS, Request
from mpoe_kernels.signatures import ARGUMENTS
from mpoe_kernels.triton import architecture
from tests.assertions import refuses
from tests.kernels.problems import calls, run

pytestmark = pytest.mark.skipif(
    architecture.in_interpreter(), reason="the interpreter takes CPU tensors"
)
OPS = [op for op in ARGUMENTS if not op.startswith("mpo_embedding")]  # which PyTorch computes


def run_on_triton(op, dtype=torch.float32):
    """The raw op, with tensors of the CPU."""
    given = {**calls("eager", op), "backend": "triton"}
    run(
        op,
        {
            n: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v
            for n, v in given.items()
        },
    )


@pytest.mark.parametrize("op", OPS)
def test_cpu_tensors_and_float64_are_named_together(op):
    message = r"'triton' cannot run .*it runs on cuda, not on cpu"
    refuses(BackendError, message, run_on_triton, op)
    if op != "route":
        refuses(
            BackendError,
            f"{message}.* float32, bfloat16, float16, not in float64",
            run_on_triton,
            op,
            torch.float64,
        )


@pytest.fixture
def forgetful(monkeypatch):
    """Clears cached answers about the machine, before and after the test."""
    for question in (architecture.triton_installed, architecture.triton_reasons):
        question.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    for question in (architecture.triton_installed, architecture.triton_reasons):
        question.cache_clear()


def test_without_triton(forgetful):
    forgetful.setattr(architecture, "find_spec", lambda _: None)
    assert "the package triton is not installed" in backend_reasons()["triton"]
    for op in OPS:
        refuses(BackendError, "the package triton is not installed", run_on_triton, op)
    refuses(
        BackendError,
        "cannot run here: the package triton is not installed",
        use_backend("triton").__enter__,
    )


@pytest.mark.parametrize(
    "name, reasons", [("gfx942:sramecc+:xnack-", 0), ("gfx90a:sramecc+", 1), ("gfx1100", 1)]
)
def test_of_amds_cards_others_than_the_mi300_are_refused_by_name(name, reasons, monkeypatch):
    """Their matrix instructions differ, and no kernel was compiled for them."""
    card = SimpleNamespace(gcnArchName=name, name="Radeon", multi_processor_count=96)
    for where, attribute, value in (
        (torch.version, "hip", "6.4"),
        (torch.cuda, "get_device_properties", lambda _: card),
        (architecture, "gpu_available", lambda: True),
        (architecture, "triton_reasons", lambda: ()),
    ):
        monkeypatch.setattr(where, attribute, value)
    for cached in (architecture.card_reasons, architecture._gpu, architecture._gpu_architecture):
        monkeypatch.setattr(architecture, cached.__name__, cached.__wrapped__)
    request = Request("neuron_experts", "cuda:0", torch.bfloat16)
    message = f"of AMD's cards it runs on gfx942, not on {name.partition(':')[0]} (Radeon)"
    assert BACKENDS["triton"].unsupported_reasons(request) == [message] * reasons
    if not reasons:
        assert architecture.target_of(torch.device("cuda:0")).architecture == "gfx942"


@pytest.mark.parametrize("found", ["3.5.1", "2.3.0+rocm6", "3.5.0.dev20250101"])
def test_with_an_old_triton(found, forgetful):
    forgetful.setattr(architecture, "find_spec", lambda _: object())
    forgetful.setattr(architecture, "version", lambda _: found)
    refuses(
        BackendError,
        rf"it needs triton 3\.6 or newer; found {found.replace('+', '.')}",
        run_on_triton,
        "grouped_mpo_linear",
    )


@pytest.mark.parametrize("found", ["3.6.0", "3.6.0+git1234", "3.10.1", "4.0.0"])
def test_newer_tritons_are_taken(found, forgetful):
    forgetful.setattr(architecture, "find_spec", lambda _: object())
    forgetful.setattr(architecture, "version", lambda _: found)
    assert architecture.triton_reasons() == ()


def test_what_no_kernel_is_made_for():
    """The planner never asks for these; the messages come from the launcher."""
    pytest.importorskip("triton")
    from mpoe_kernels.linear.triton.fused_tiles import Sides, fused_choice
    from mpoe_kernels.testing.launches import recorded

    sides = Sides((8, 8, 8), (8, 8, 8), 10_000, 10_000)
    with (
        recorded("sm_80"),
        pytest.raises(ValueError, match=r"no tile of the fused kernels fits .*a=10000.* on sm_80"),
    ):
        fused_choice(torch.empty(1, device="meta"), sides, 1.0, "rows")


@pytest.mark.usefixtures("with_triton")
def test_what_triton_finds_out_too_late_is_said_in_our_words():
    from triton.runtime.errors import OutOfResources

    from mpoe_kernels.triton.start import start

    class TooLarge:
        __name__ = "grouped_rows_kernel"

        def __getitem__(self, grid):
            def launch(**arguments):
                raise OutOfResources(262144, 101376, "shared memory")

            return launch

    message = r"grouped_rows_kernel with {'BM': 64}: it needs 262144 of shared memory; .* 101376"
    refuses(BackendError, message, start, TooLarge(), (1,), BM=64)
