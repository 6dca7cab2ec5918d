"""Two processes (gloo, DDP): same draws on both ranks, masked steps work, losses weigh targets of all ranks alike."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .tiny import make_trainer, ranks_options, weights

TESTS = Path(__file__).parent.parent
CODE = "import sys; sys.path.insert(0, sys.argv[1]); from training.tiny import rank_main; rank_main(sys.argv[2])"


@pytest.mark.slow
def test_two_ranks_equal_one_process(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CODE, str(TESTS), str(tmp_path / "two")],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=180)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    ranks = [torch.load(tmp_path / "two" / f"rank-{rank}.pt") for rank in range(2)]
    assert ranks[0]["masked"] == ranks[1]["masked"]
    assert 0 < sum(ranks[0]["masked"]) < len(ranks[0]["masked"])

    single = make_trainer(tmp_path / "one", **ranks_options(ranks=1))
    single.train()
    for name, value in weights(single.model).items():
        assert torch.equal(ranks[0]["weights"][name], ranks[1]["weights"][name]), name
        torch.testing.assert_close(ranks[0]["weights"][name], value, rtol=1e-3, atol=1e-4, msg=name)
    logged = [record for record in single.state.log_history if "loss" in record]
    for one, two in zip(logged, ranks[0]["logs"], strict=True):
        for name in ("loss", "task_loss", "grad_norm", "expert_max_share", "masked_steps"):
            assert one[name] == pytest.approx(two[name], rel=1e-3), name
