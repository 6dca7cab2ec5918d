"""One rank of a run with dropout: `torchrun -m tests.training.ranks_killed FOLDER [STEP]`.

STEP: rank 1 is killed after it. Continues the last checkpoint in FOLDER, if there is one, and writes the final weights
there.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from mpoe.training import find_last_checkpoint
from tests.training.tiny import make_trainer, resume_options

folder, kill_after = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else None


class Kill(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == kill_after and args.process_index == 1:
            os.kill(os.getpid(), signal.SIGKILL)


torch.set_num_threads(1)
trainer = make_trainer(folder, **resume_options("t5", 8), callbacks=[Kill()])
assert trainer.args.world_size == 2
trainer.train(resume_from_checkpoint=True if find_last_checkpoint(folder) else None)
if trainer.is_world_process_zero():
    torch.save(dict(trainer.model.state_dict()), folder / "final.pt")
