"""torch.compile with inductor, which generates C++ here: training and decoding give the same results as without."""

from __future__ import annotations

import copy
import os
import shutil

import pytest
import torch

from .small_models import MASK, batch


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A separate compiler cache, shared by all tests here and independent of earlier runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield


@pytest.fixture(autouse=True)
def _fresh_compiler(cache, lacks):
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        lacks("inductor needs a C++ compiler")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_training_steps(converted):
    model, inputs = converted("t5").train(), batch("t5")
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, fullgraph=True)
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-2) for m in (model, twin)]
    for _ in range(2):
        expected, found = model(**inputs), compiled(**inputs)
        close((found.loss, found.logits), (expected.loss, expected.logits))
        assert torch.equal(found.expert_load, expected.expert_load)
        for output in (expected, found):
            output.loss.backward()
        for eager, parameter in zip(model.parameters(), twin.parameters(), strict=True):
            close(parameter.grad, eager.grad)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.exhaustive
@pytest.mark.parametrize(("family", "shape"), [("t5", "separable"), ("gpt2", "paper")])
def test_decoding_steps(family, shape, converted):
    """With a cache of fixed size, one graph serves every step after the first."""
    model = converted(family, shape=shape)
    mask = MASK if family == "t5" else MASK.flip(1)
    call = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "cache_implementation": "static"}
    call |= {"inputs": batch(family, labels=False)["input_ids"], "output_logits": True, "return_dict_in_generate": True}
    expected = model.generate(**call)
    model.forward = torch.compile(model.forward, fullgraph=True)
    found = model.generate(**call)
    assert torch.equal(found.sequences, expected.sequences)
    close(torch.stack(found.logits), torch.stack(expected.logits))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
