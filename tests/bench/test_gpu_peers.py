"""Peers that run on GPUs, with stand-ins for their libraries; and why they are absent, in words."""

from __future__ import annotations

import sys
from dataclasses import replace
from enum import Enum
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from mpoe_bench.contender import NOT_HERE, checked
from mpoe_bench.peers import gpu, peer_builds
from mpoe_bench.problem import FFNCase, Problems
from mpoe_bench.suites.scale import GPU_PEERS
from torch import Tensor

CASE = FFNCase(24, 48, 3, 12, torch.bfloat16)
PACKAGES = {
    "ScatterMoE": "scattermoe",
    "SonicMoE": "sonicmoe",
    "QuACK grouped GEMM": "quack",
    "Liger SwiGLU as ReLU, 1.5x FLOPs": "liger_kernel",
}


def row_of(peer: str, case: FFNCase = CASE) -> dict:
    ((name, kind, build),) = peer_builds((peer,), "separable")
    return checked(name, kind, build, Problems(case))[1]


class ActivationType(Enum):
    SWIGLU = "swiglu"
    RELU = "relu"


def sonic_experts(
    x: Tensor, scores: Tensor, tokens: Tensor, index: Tensor, w1: Tensor, b1: None, w2: Tensor, b2: None,
    experts: int, stream: int, activation: ActivationType, inference: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As SonicMoE's function of that name: weights ``[out, in, E]``, tokens in ascending order."""
    assert (tokens.dtype, index.dtype, scores.dtype) == (torch.int32, torch.int32, torch.float32)
    assert (activation, b1, b2, inference) == (ActivationType.RELU, None, None, not torch.is_grad_enabled())
    assert w1.stride(1) == w2.stride(1) == 1
    rows = []
    for token, expert, score in zip(tokens.tolist(), index.tolist(), scores, strict=True):
        rows.append(w2[:, :, expert] @ F.relu(w1[:, :, expert] @ x[token]) * score)
    return torch.stack(rows), torch.bincount(index, minlength=experts)


def quack_gemm(a: Tensor, b: Tensor, *, cu_seqlens_m: Tensor) -> Tensor:
    """Rows of group e, ``cu_seqlens_m[e]`` to ``[e + 1]``, times ``b[e]``."""
    assert cu_seqlens_m.dtype == torch.int32
    parts = cu_seqlens_m.tolist()
    assert parts[0] == 0
    return torch.cat([a[p:q] @ b[e] for e, (p, q) in enumerate(zip(parts[:-1], parts[1:], strict=True))])


def liger_experts(x: Tensor, gate_up: Tensor, down: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """SwiGLU of chosen experts, the gate first."""
    assert index.dtype == torch.int32
    rows = []
    for t, expert in enumerate(index[:, 0].tolist()):
        gate, up = (gate_up[expert] @ x[t]).float().chunk(2)
        rows.append(down[expert] @ (F.silu(gate) * up).to(x.dtype) * weights[t])
    return torch.stack(rows)


LIBRARIES = {
    "SonicMoE": {
        "sonicmoe.functional": {"moe_general_routing_inputs": sonic_experts},
        "sonicmoe.enums": {"ActivationType": ActivationType},
    },
    "QuACK grouped GEMM": {"quack.gemm_interface": {"gemm": quack_gemm}},
    "Liger SwiGLU as ReLU, 1.5x FLOPs": {
        "liger_kernel.ops.fused_moe": {"LigerFusedMoEFunction": SimpleNamespace(apply=liger_experts)}
    },
}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins where the libraries would be, on a device on which they run."""
    for modules in LIBRARIES.values():
        for name, contents in modules.items():
            module = ModuleType(name)
            module.__dict__.update(contents)
            monkeypatch.setitem(sys.modules, name, module)
    for package in ("sonicmoe", "quack", "liger_kernel", "liger_kernel.ops"):
        monkeypatch.setitem(sys.modules, package, ModuleType(package))
    monkeypatch.setattr(gpu, "DEVICES", ("cpu",))


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("peer", LIBRARIES)
def test_their_results_are_the_truth(peer: str) -> None:
    row = row_of(peer)
    assert row["reason"] is None
    gradients = set() if peer.startswith("QuACK") else {"dx", "d_up_probe", "d_down_probe"}  # QuACK has no autograd
    assert row["errors"].keys() == {"y"} | gradients
    assert row["memory"].keys() == ({"forward", "train"} if gradients else {"forward"})


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("peer", ["SonicMoE", "QuACK grouped GEMM"])
def test_types_that_they_do_not_take(peer: str) -> None:
    assert "bfloat16 and float16" in row_of(peer, replace(CASE, dtype=torch.float32))["reason"]


@pytest.mark.usefixtures("installed")
def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = SimpleNamespace(apply=lambda *arguments: liger_experts(*arguments) * 1.5)
    monkeypatch.setattr(sys.modules["liger_kernel.ops.fused_moe"], "LigerFusedMoEFunction", wrong)
    row = row_of("Liger SwiGLU as ReLU, 1.5x FLOPs")
    assert "error of y" in row["reason"]
    assert "memory" not in row


@pytest.mark.parametrize("peer", GPU_PEERS)
def test_absent_peers_say_why(peer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    package = PACKAGES[peer]
    assert row_of(peer)["reason"] == f"{NOT_HERE}: {package} runs on CUDA devices only"
    monkeypatch.setattr(gpu, "DEVICES", ("cpu",))
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not there
    reason = row_of(peer)["reason"]
    assert reason.startswith(NOT_HERE)
    assert package in reason


def test_a_package_that_is_not_there_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "DEVICES", ("cpu",))
    for name in [name for name in sys.modules if name.partition(".")[0] == "sonicmoe"]:
        monkeypatch.delitem(sys.modules, name)

    def missing(name: str) -> ModuleType:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name.partition(".")[0])

    monkeypatch.setattr(gpu.importlib, "import_module", missing)
    assert row_of("SonicMoE")["reason"] == f"{NOT_HERE}: sonicmoe is not installed"

    def broken(name: str) -> ModuleType:
        raise ModuleNotFoundError("No module named 'cutlass'", name="cutlass")

    monkeypatch.setattr(gpu.importlib, "import_module", broken)
    assert "sonicmoe.functional does not import: No module named 'cutlass'" in row_of("SonicMoE")["reason"]
