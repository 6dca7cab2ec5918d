"""vLLM's greedy tokens of a composed folder are those of `generate`: alone, together, behind shared
prefixes, read in chunks, and after preemption.

``MPOE_VLLM`` names the Python of an environment with vLLM and this package.
"""

import json
import os
import subprocess

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mpoe import start_expert
from mpoe.models.expert_mixture import keep_experts
from tests.vllm.test_mixture import composed, saved

pytestmark = pytest.mark.slow
NEW_TOKENS = 192
ASK = f"""
import json, sys, vllm
folder, batches, options = sys.argv[1], *map(json.loads, sys.argv[2:])
engine = vllm.LLM(folder, dtype="float32", enforce_eager=True, max_model_len=320, max_num_seqs=8,
    skip_tokenizer_init=True, block_size=32, disable_log_stats=False, **options)
count = dict(max_tokens={NEW_TOKENS}, ignore_eos=True, detokenize=False)
how = vllm.SamplingParams(temperature=0.0, **count)
answers = []
for batch in batches:
    given = [{{"prompt_token_ids": ids}} for ids in batch]
    answers += [list(answer.outputs[0].token_ids) for answer in engine.generate(given, how)]
counts = {{m.name: m.value for m in engine.get_metrics() if hasattr(m, "value")}}
print(json.dumps([answers, counts["vllm:num_preemptions"], counts["vllm:prefix_cache_hits"]]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A composed folder of a tiny Llama whose heads have a size that vLLM computes on CPUs; prompts
    of which eight begin alike, and `generate`'s answers."""
    place = tmp_path_factory.mktemp("vllm")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes, **heads, **ends)).eval()
    for parameter in base.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    for number, name in enumerate(("law", "med", "code")):
        saved(start_expert(base, 8), number, place / f"{name}.expert")
    mixture = composed(base, place, ("law", "med", "code"))
    mixture.save_pretrained(place / "mixture")
    keep_experts(mixture, place / "mixture")
    prompts = [torch.randint(2, 64, (5 + 7 * number,)).tolist() for number in range(8)]
    head = torch.randint(2, 64, (70,)).tolist()
    prompts += [head + prompt[:5] for prompt in prompts]
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    answers = []
    dense = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        answers.append(mixture.generate(ids, **options)[0, len(prompt) :].tolist())
        dense.append(base.generate(ids, **options)[0, len(prompt) :].tolist())
    assert sum(map(list.__ne__, answers, dense)) > len(prompts) / 2
    return place / "mixture", prompts, answers


@pytest.mark.skipif("MPOE_VLLM" not in os.environ, reason="MPOE_VLLM is not set")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_num_batched_tokens": 32},
        {"num_gpu_blocks_override": 40},
        {"additional_config": {"mpoe": {"slots": 9, "neurons": 12}}},
    ],
    ids=["whole", "chunks", "small cache", "more slots than experts of a token"],
)
def test_tokens(folder, options):
    place, prompts, answers = folder
    batches = [[prompt] for prompt in prompts[:8]] + [prompts[:8], prompts[8:]]
    said = subprocess.run(
        [os.environ["MPOE_VLLM"], "-c", ASK, place, json.dumps(batches), json.dumps(options)],
        env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    tokens, preemptions, hits = json.loads(said.splitlines()[-1])
    assert tokens == [*answers[:8], *answers]
    assert hits > 0
    assert (preemptions > 0) == ("num_gpu_blocks_override" in options)
