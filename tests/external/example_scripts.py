"""Runs Transformers' example scripts, as they lie in a checkout, on saved mixtures and on the dense models.

Not collected here: `tools/external_suites.sh` copies this file beside nothing else, as ``test_models.py``.
``EXAMPLES`` is the folder with the scripts. They know nothing of mpoe: a mixture is opened by its remote code.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
import unittest
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

from mpoe import MPOEConfig, convert_to_mpoe, load_mpoe

word_tokenizer = importlib.import_module("tally").word_tokenizer  # `tests` is another package there
SPECIAL = {f"{name}_token": f"<{name}>" for name in ("pad", "unk", "cls", "sep", "mask")}
WORDS = [f"word{n}" for n in range(59)]
SCRIPTS = {
    "run_clm_no_trainer": (
        lambda: GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32)),
        ("--block_size", "16"),
    ),
    "run_mlm_no_trainer": (
        lambda: BertForMaskedLM(
            BertConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
        ),
        ("--max_seq_length", "16"),
    ),
}


# They ask accelerate for a kind of device that it has dropped, which no process has.
PROGRAM = (
    "import runpy, sys; from accelerate import DistributedType; DistributedType.TPU = 'TPU'; "
    "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
)


class _Scripts(unittest.TestCase):
    is_mixture: bool

    def trained(self, script: str, folder: Path) -> tuple[Any, Any]:
        """The model before and after a script has trained it for four steps."""
        build, sizes = SCRIPTS[script]
        torch.manual_seed(0)
        model: Any = build().eval()
        if self.is_mixture:
            model = convert_to_mpoe(model, MPOEConfig(num_experts=4, backend="eager", shape="separable"))
        model.save_pretrained(folder / "before")
        tokenizer = word_tokenizer([*SPECIAL.values(), *WORDS], model_max_length=16, **SPECIAL)
        tokenizer.save_pretrained(folder / "before")
        lines = [" ".join(WORDS[(line * word) % len(WORDS)] for word in range(40)) for line in range(40)]
        (folder / "text.txt").write_text("\n".join(lines) + "\n")
        arguments = {
            "model_name_or_path": folder / "before",
            "train_file": folder / "text.txt",
            "validation_file": folder / "text.txt",
            "output_dir": folder / "after",
            "per_device_train_batch_size": 4,
            "max_train_steps": 4,
            "learning_rate": 1e-2,
        }
        given = [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
        file = f"{os.environ['EXAMPLES']}/{script}.py"
        command = [sys.executable, "-c", PROGRAM, file, *given, *sizes, "--trust_remote_code"]
        home = {"HF_HOME": str(folder / "home"), "ACCELERATE_USE_CPU": "true"}
        done = subprocess.run(command, env={**os.environ, **home}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        perplexity = json.loads((folder / "after" / "all_results.json").read_text())["perplexity"]
        assert math.isfinite(perplexity)
        opened = load_mpoe if self.is_mixture else type(model).from_pretrained
        return opened(folder / "before"), opened(folder / "after")

    def check(self, script: str) -> None:
        with TemporaryDirectory() as folder:
            before, after = self.trained(script, Path(folder))
        assert type(after) is type(before)
        was = dict(before.named_parameters())
        moved = {name for name, value in after.named_parameters() if not torch.equal(value, was[name])}
        assert moved
        if self.is_mixture:
            assert any(".auxiliary." in name for name in moved)
            assert any("router" in name for name in moved)

    def test_run_clm_no_trainer(self) -> None:
        self.check("run_clm_no_trainer")

    def test_run_mlm_no_trainer(self) -> None:
        self.check("run_mlm_no_trainer")


class MPOE_scripts(_Scripts):
    is_mixture = True


class Dense_scripts(_Scripts):
    is_mixture = False


del _Scripts
