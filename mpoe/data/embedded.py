"""The stand-in checkpoints: a tiny T5 and a tiny GPT-2, trained on documentation.

They saw the training split of :mod:`mpoe.data.documentation` only; ``stand_ins/README.md`` tells how they were made.
With them the demo and the tests run without a download; they are not a substitute for real pretrained weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mpoe.data.mappings import lookup

STAND_INS = {"t5": "AutoModelForSeq2SeqLM", "gpt2": "AutoModelForCausalLM"}


def stand_in_path(kind: str) -> Path:
    """Folder of the stand-in ``kind`` ("t5" or "gpt2"): config, weights and tokenizer for ``from_pretrained``.

    Raises:
        ValueError: unknown kind.
        FileNotFoundError: the installation lacks the folder.
    """
    lookup(STAND_INS, kind, "stand-in")
    folder = Path(__file__).resolve().parent / "stand_ins" / kind
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"the stand-in checkpoint is missing from this installation: {folder}")
    return folder


def load_stand_in(kind: str) -> tuple[Any, Any]:
    """The stand-in model (float32, in eval mode, on the CPU) and its tokenizer; raises as :func:`stand_in_path`."""
    folder = stand_in_path(kind)
    import transformers

    model_class = getattr(transformers, STAND_INS[kind])
    model = model_class.from_pretrained(folder, dtype="float32", local_files_only=True)
    if kind == "gpt2":
        model.loss_type = "ForCausalLM"  # GPT2LMHeadModel leaves it unset, which warns at the first loss
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
