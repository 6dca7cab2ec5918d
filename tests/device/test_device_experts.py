"""Hidden-side experts and neurons on the device, in the sizes people use first, against the float64
reference."""

import pytest
import torch

from tests.expert_problems import HiddenProblem, NeuronProblem

from .conftest import DEVICE

ON_GPU = DEVICE.startswith("cuda")
TOKENS = 300 if ON_GPU else 19
COUNTS = (1, 8, 9, 64, 300, 4096) if ON_GPU else (1, 9)
NEURONS = {"width": 768, "neurons": 64} if ON_GPU else {"width": 32, "neurons": 16}
HIDDEN = {"groups": 48, "block": 64} if ON_GPU else {"groups": 3, "block": 16}
SIZES = {
    "neurons": {"experts": 8, "top_k": 2, **NEURONS},
    "neurons of 64": {"experts": 64, "top_k": 8, **NEURONS},
    "hidden": {"experts": 8, "top_k": 2, **HIDDEN},
    "hidden of 64": {"experts": 64, "top_k": 2, **HIDDEN},
}
# bfloat16 first: it is what people compute in.
CASES = [(dtype, name) for dtype in (torch.bfloat16, torch.float32) for name in SIZES]
IDS = [f"{str(dtype).removeprefix('torch.')}-{name}" for dtype, name in CASES]


def problem_of(name, dtype, device, **options):
    """With its tensors on the device."""
    sizes = {"tokens": TOKENS, "dtype": dtype, **SIZES[name], **options}
    if name.startswith("hidden"):
        made = HiddenProblem(per_group=True, **sizes)
    else:
        made = NeuronProblem(out=sizes["width"], **sizes)
    made.inputs = {
        n: None if value is None else value.to(device) for n, value in made.inputs.items()
    }
    made.index, made.grad = made.index.to(device), made.grad.to(device)
    return made


def op_of(name):
    return "hidden_experts" if name.startswith("hidden") else "neuron_experts"


@pytest.mark.parametrize("dtype, name", CASES, ids=IDS)
def test_experts(dtype, name, backend, device, check_able):
    check_able(backend, op_of(name))
    problem_of(name, dtype, device).check(backend, 3)


@pytest.mark.parametrize("tokens", COUNTS, ids=[f"T{tokens}" for tokens in COUNTS])
def test_neurons_of_any_number_of_tokens(tokens, backend, device, check_able):
    """Forward and backward; few pairs of token and choice have launches of their own."""
    check_able(backend, "neuron_experts")
    problem_of("neurons of 64", torch.bfloat16, device, tokens=tokens).check(backend, 3)


@pytest.mark.parametrize("name", ["neurons", "hidden"])
def test_an_infinite_token_spoils_its_own_row_alone(name, backend, device, check_able):
    check_able(backend, op_of(name))
    made = problem_of(name, torch.bfloat16, device, none_share=0.0)
    whole = made.computed(backend)["o"]
    made.inputs[made.ROWS][7] = float("inf")
    spoilt = made.computed(backend)["o"]
    others = torch.arange(TOKENS, device=device) != 7
    assert not torch.isfinite(spoilt[7]).all()
    torch.testing.assert_close(spoilt[others], whole[others])
