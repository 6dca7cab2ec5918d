"""The stand-in checkpoints, which work without a download: a tiny T5 and a tiny GPT-2.

They saw the training split of the documentation only; ``stand_ins/README.md`` tells how they were
made. They are not a substitute for real pretrained weights.
"""

from pathlib import Path
from typing import Any

from mpoe.config.checks import check_choice

STAND_INS = {"t5": "AutoModelForSeq2SeqLM", "gpt2": "AutoModelForCausalLM"}


def stand_in_path(kind: str) -> Path:
    """Folder of the stand-in ``kind`` ("t5" or "gpt2"): config, weights and tokenizer for
    ``from_pretrained``.

    Raises:
        ValueError: unknown kind.
    """
    check_choice("stand-in", kind, list(STAND_INS))
    return Path(__file__).resolve().parent / "stand_ins" / kind


def load_stand_in(kind: str) -> tuple[Any, Any]:
    """The stand-in model (float32, in eval mode, on the CPU) and its tokenizer; raises as
    :func:`stand_in_path`."""
    folder = stand_in_path(kind)
    import transformers

    model_class = getattr(transformers, STAND_INS[kind])
    model = model_class.from_pretrained(folder, dtype="float32", local_files_only=True)
    if kind == "gpt2":
        model.loss_type = (
            "ForCausalLM"  # GPT2LMHeadModel leaves it unset, which warns at the first loss
        )
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
