"""The backends: which of them run here, why the others do not, and which one a call uses.

A backend is a table of kernels, one per op; each takes a call of that op, whose ``op.py`` describes
the call and lists its kernels by backend. For a contraction, which can be computed in several ways,
a backend offers candidates (see `mpoe_kernels.contract.autotune`). It returns *reasons* when it
cannot run a request; the error for a named backend lists them all, and nothing falls back
silently.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from importlib import import_module
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

import mpoe_kernels.triton.architecture as architecture
from mpoe_kernels.contract.plan import Contraction
from mpoe_kernels.cuda_library import card_reasons as cuda_card_reasons
from mpoe_kernels.cuda_library import unavailable_reasons as cuda_unavailable
from mpoe_kernels.native_library import NATIVE_LIBRARY

AUTO = "auto"
# Ops that are contractions: backends offer candidates for them instead of a kernel.
CONTRACTIONS = {"grouped_mpo_linear": "forward", "grouped_mpo_linear_backward": "backward"}
# Which backends run where none is named, the preferred one first. On the CPU Triton means its
# interpreter, for tests.
PREFERRED = {"cpu": ("native", "eager"), "cuda": ("triton", "cuda", "eager")}
_ROUTING_OPS = ("route", "dispatch", "dispatch_backward", "combine", "combine_backward")


class BackendError(RuntimeError):
    """No backend, or not the named one, can run a request; the message lists the reasons."""


@dataclass(frozen=True)
class Request:
    """What a kernel is asked to run on.

    Attributes:
        op: name of the op without its namespace, e.g. ``grouped_mpo_linear``.
        device: ``cpu``, ``cuda:1``, ...
        dtype: dtype of the activations.
    """

    op: str
    device: str
    dtype: torch.dtype

    @property
    def device_type(self) -> str:
        """``cpu``, ``cuda``, ..."""
        return self.device.partition(":")[0]


def nothing(_: Any) -> list[Any]:
    """No reason against a request or a contraction, or no candidate for it.

    A backend whose ``candidates`` is this very function computes no contraction: `Backend.computes`
    compares by identity.
    """
    return []


def no_reasons() -> list[str]:
    """No reason against a backend: it runs everywhere."""
    return []


class Candidate(NamedTuple):
    """One way to compute a contraction.

    Attributes:
        backend: the backend that offers it.
        name: the strategy and, if there are several, the variant: ``rebuild``, ``rebuild on chip``.
        strategy: one of `mpoe_kernels.contract.STRATEGIES`.
        run: computes it; takes a `ForwardCall` or a `BackwardCall`.
        waits: on a GPU it waits for the device, so it runs only if its backend is named or there is
            no other.
    """

    backend: str
    name: str
    strategy: str
    run: Callable[[Any], Any]
    waits: bool = False

    @property
    def text(self) -> str:
        """Under which a choice is kept."""
        return f"{self.backend} {self.name}"


@dataclass(eq=False)
class Backend:
    """A named table of kernels. Two backends are the same if they are the same object.

    Attributes:
        name: as users write it in ``backend=``.
        kernels: op name -> function that takes a call of that op.
        unavailable_reasons: why this backend cannot run at all here (empty list: it can).
        request_reasons: why it cannot run one request (empty list: it can).
        op_reasons: the same for single ops.
        candidates: the ways to compute a contraction (a strategy in one phase); assigned by
            ``linear/op.py``, which lies above this file.
        contraction_reasons: why it has no candidate for a contraction (empty list: it has one).
        places_rows: its forward kernels of ``grouped_mpo_linear`` take ``out_index`` and ``gates``.
    """

    name: str
    kernels: dict[str, Callable[..., Any]] = field(default_factory=dict)
    unavailable_reasons: Callable[[], list[str]] = no_reasons
    request_reasons: Callable[[Request], list[str]] = nothing
    op_reasons: dict[str, Callable[[Request], list[str]]] = field(default_factory=dict)
    candidates: Callable[[Contraction], list[Candidate]] = nothing
    contraction_reasons: Callable[[Contraction], list[str]] = nothing
    places_rows: bool = False

    def computes(self, op: str) -> bool:
        """Whether it has kernels for an op, of some dtypes and sizes."""
        return op in self.kernels or (op in CONTRACTIONS and self.candidates is not nothing)

    def unsupported_reasons(self, request: Request) -> list[str]:
        """Every reason why this backend cannot run ``request``; empty if it can."""
        reasons = list(self.unavailable_reasons())
        if not self.computes(request.op):
            reasons.append(f"it has no kernel for {request.op}{_instead(request)}")
        of_op = self.op_reasons.get(request.op, nothing)(request)
        return [*reasons, *self.request_reasons(request), *of_op]


def _instead(request: Request) -> str:
    """The backends to take where one has no kernel for an op: those that run here."""
    names = [AUTO]
    for backend in preferred_backends(request):
        if backend.computes(request.op) and not backend.unavailable_reasons():
            names.append(backend.name)
    if len(names) == 1:
        return ""
    return f"; take backend={' or '.join(map(repr, names))}"


BACKENDS: dict[str, Backend] = {}


def register_backend(backend: Backend) -> None:
    """Add a backend; its name must not be taken."""
    if backend.name in BACKENDS or backend.name == AUTO:
        raise ValueError(f"backend name {backend.name!r} is already taken")
    BACKENDS[backend.name] = backend


def add_kernels(backend: str, kernels: Any, functions: Mapping[str, str]) -> None:
    """Add the kernels of some ops to a backend.

    Args:
        backend: its name.
        kernels: a module or an object; its function ``reasons``, if it has one, says why it cannot
            run a request.
        functions: op -> name of its function; ops whose function is missing are left out.
    """
    reasons = getattr(kernels, "reasons", nothing)
    for op, name in functions.items():
        if hasattr(kernels, name):
            BACKENDS[backend].kernels[op] = getattr(kernels, name)
            BACKENDS[backend].op_reasons[op] = reasons


@dataclass(eq=False)
class Lazy:
    """A function of a module that is imported at its first call: Triton takes seconds.

    Attributes:
        module, name: of the module and the function.
    """

    module: str
    name: str

    @cached_property
    def _function(self) -> Callable[..., Any]:
        return getattr(import_module(self.module), self.name)

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)


def lazily(module: str, *functions: str) -> SimpleNamespace:
    """`Lazy` functions of a module."""
    return SimpleNamespace(**{name: Lazy(module, name) for name in functions})


def available_backends() -> tuple[str, ...]:
    """Names of the backends that can run on this machine."""
    return tuple(name for name, backend in BACKENDS.items() if not backend.unavailable_reasons())


def backend_reasons() -> dict[str, list[str]]:
    """Every known backend with the reasons why it cannot run here (empty list: it can)."""
    return {name: backend.unavailable_reasons() for name, backend in BACKENDS.items()}


def check_backend(name: str | None) -> None:
    """Refuse the name of an unknown backend; None means that none is named."""
    if name is not None and (not isinstance(name, str) or (name != AUTO and name not in BACKENDS)):
        raise ValueError(f"backend must be one of {[AUTO, *BACKENDS]}; got {name!r}")


def preferred_backends(request: Request) -> tuple[Backend, ...]:
    """The backends among which a request chooses if none is named, the preferred one first.

    On a GPU the compiled kernels of routing come first: they need fewer launches than Triton's.
    """
    names = PREFERRED.get(request.device_type, ("eager",))
    if request.device_type == "cuda" and request.op in _ROUTING_OPS:
        names = ("cuda", "triton", "eager")
    return tuple(BACKENDS[name] for name in names if name in BACKENDS)


def allowed_backends(request: Request, name: str) -> tuple[Backend, ...]:
    """The backend of this name, or those among which a request chooses."""
    if name == AUTO:
        return preferred_backends(request)
    return (BACKENDS[name],)


def places_rows(backend: str) -> bool:
    """Whether a backend's products can scatter every row like `combine`, times its gate; False for
    ``"auto"``."""
    return backend != AUTO and BACKENDS[backend].places_rows


def kernel_for(op: str, device: torch.device, dtype: torch.dtype, name: str) -> Callable[..., Any]:
    """Cached `select` for a `Request`."""
    # With the backends as they are registered now: one that is added or replaced is asked, too.
    return _selected(op, device, dtype, name, tuple(BACKENDS.values()))


@lru_cache(maxsize=1024)
def _selected(
    op: str, device: torch.device, dtype: torch.dtype, name: str, _backends: tuple[Backend, ...]
) -> Callable[..., Any]:
    return select(Request(op, str(device), dtype), name)


def select(request: Request, name: str = AUTO) -> Callable[..., Any]:
    """Kernel of the named backend, or of the most preferred one that can run the request.

    Not for `CONTRACTIONS`, for which no backend has a single kernel: `chosen_for` of
    `mpoe_kernels.contract.autotune` chooses among their candidates.

    Raises:
        BackendError: with all reasons, when the named backend or every backend cannot run the
            request.
    """
    refused = {}
    for backend in allowed_backends(request, name):
        refused[backend.name] = backend.unsupported_reasons(request)
        if not refused[backend.name]:
            return backend.kernels[request.op]
    raise refusal(request, refused, name)


def refusal(request: Request, refused: Mapping[str, list[str]], name: str) -> BackendError:
    """The error if the named backend, or every one, is refused: with all reasons, by backend."""
    if name != AUTO:
        reasons = "; ".join(refused[name])
        return BackendError(f"backend {name!r} cannot run {request.op}: {reasons}")
    listing = "; ".join(f"{other}: {', '.join(reasons)}" for other, reasons in refused.items())
    what = f"{request.op} on {request.device_type} {request.dtype}"
    return BackendError(f"no backend can run {what}: {listing}")


# ------------------------------------------------------------------ the backends

GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _dtype_reasons(request: Request) -> list[str]:
    if request.op == "route" or request.dtype in GPU_DTYPES:  # routing is about integers
        return []
    names = ", ".join(str(dtype).removeprefix("torch.") for dtype in GPU_DTYPES)
    return [f"it computes in {names}, not in {str(request.dtype).removeprefix('torch.')}"]


def _device_reasons(device_type: str, request: Request) -> list[str]:
    if request.device_type == device_type:
        return []
    return [f"it runs on {device_type}, not on {request.device_type}"]


def _triton_unavailable() -> list[str]:
    reasons = list(architecture.triton_reasons())
    if not architecture.in_interpreter() and not architecture.gpu_available():
        reasons.append(
            "it needs a CUDA or ROCm device (or Triton's interpreter: TRITON_INTERPRET=1)"
        )
    return reasons


def _triton_reasons(request: Request) -> list[str]:
    reasons = []
    interpreted = request.device_type == "cpu" and architecture.in_interpreter()
    if request.device_type != "cuda" and not interpreted:
        reasons.append(
            f"it runs on cuda, not on {request.device_type} (without TRITON_INTERPRET=1)"
        )
    reasons += _dtype_reasons(request)
    reasons += architecture.card_reasons(torch.device(request.device))
    if reasons or request.op == "route" or architecture.triton_reasons():
        return reasons
    target = architecture.target_of(torch.device(request.device))
    needed = _least_shared_bytes(target.architecture, request.dtype)
    if target.shared_memory == architecture.NO_LIMIT or needed <= target.shared_memory:
        return []
    return [
        f"its smallest tile needs {needed} bytes of shared memory; the device has "
        f"{target.shared_memory}"
    ]


@lru_cache(maxsize=64)
def _least_shared_bytes(name: str, dtype: torch.dtype) -> int:
    return import_module("mpoe_kernels.linear.triton.grouped").least_shared_bytes(name, dtype)


def cuda_backend(
    name: str, device_type: str, unavailable_reasons: Callable[[], list[str]]
) -> Backend:
    """The compiled CUDA kernels as a backend without kernels yet.

    Args:
        name: of the backend.
        device_type: of its tensors: ``cuda``, or ``cpu`` for the emulated kernels of the tests.
        unavailable_reasons: see `Backend`.
    """

    def reasons(request: Request) -> list[str]:
        of_card = cuda_card_reasons(torch.device(request.device))
        return [*_device_reasons(device_type, request), *_dtype_reasons(request), *of_card]

    return Backend(
        name, unavailable_reasons=unavailable_reasons, request_reasons=reasons, places_rows=True
    )


EAGER = Backend("eager")
NATIVE = Backend(
    "native",
    unavailable_reasons=lambda: list(NATIVE_LIBRARY.reasons),
    request_reasons=partial(_device_reasons, "cpu"),
)
TRITON = Backend(
    "triton",
    unavailable_reasons=_triton_unavailable,
    request_reasons=_triton_reasons,
    places_rows=True,
)
CUDA = cuda_backend("cuda", "cuda", cuda_unavailable)
for _backend in (EAGER, NATIVE, TRITON, CUDA):
    register_backend(_backend)
