"""Models whose experts own hidden-side blocks: bit-exact conversion, saving, merging, masking, reports, refusals."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from mpoe import MPOEConfig, convert_to_mpoe, load_mpoe, merge_experts
from mpoe.layers import HiddenFeedForward
from mpoe.models.kept import hidden_modules
from mpoe.training.gradient_mask import GradientMask
from mpoe_kernels import reconstruct

from . import kept_models
from .kept_models import dense, every_family, logits, stirred


def config(top_k: int = 1, **fields) -> MPOEConfig:
    return kept_models.config("hidden", top_k, **fields)


@every_family
@pytest.mark.parametrize(("top_k", "per_group"), [(1, True), (1, False), (2, True), (4, True)])
def test_one_expert_per_token_changes_no_bit_and_several_stay_close(family: str, top_k: int, per_group: bool) -> None:
    model = dense(family)
    converted = convert_to_mpoe(model, config(top_k, block_per_group=per_group, backend="eager"))
    found, want = logits(converted, family), logits(model, family)
    assert torch.equal(found, want) if top_k == 1 else (found - want).abs().max() <= 1e-5 * want.abs().max()
    before, after = dict(model.named_parameters()), dict(converted.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert {type(m) for m in model.modules() if isinstance(m, nn.Linear)} <= {type(m) for m in converted.modules()}


@every_family
@pytest.mark.parametrize("per_group", [True, False])
@pytest.mark.parametrize("own", [True, False])
def test_merged_into_dense_experts(family: str, per_group: bool, own: bool, tmp_path: Path) -> None:
    model = stirred(convert_to_mpoe(dense(family), config(2, block_per_group=per_group, expert_bias=own)))
    merged = merge_experts(model)
    want = logits(model, family)
    assert (logits(merged, family) - want).abs().max() <= 1e-5 * want.abs().max()
    assert not hidden_modules(merged)
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(load_mpoe(tmp_path), family), logits(merged, family))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_shared_blocks_are_plain_mpos(family: str) -> None:
    """With the projections as centre, HiddenExperts' cores rebuild C1 (1 x R) and (1 x L) C2."""
    layer = next(iter(hidden_modules(stirred(convert_to_mpoe(dense(family), config(block_per_group=False)))).values()))
    features, block, settings = layer.hidden_features, 8, config(block_per_group=False)
    for kind in layer.projections():
        up = kind != "down"
        shape = settings.shape_for(kind, *((16, features) if up else (features, 16)))
        core = layer.experts.auxiliary[{"up": "right", "gate_proj": "right_gate", "down": "left"}[kind]][2, 0]
        weight = layer.projections()[kind].weight.detach()
        weight = weight if family == "gpt2" else weight.T
        centre = weight.view(1, 16, -1, block) if up else weight.view(-1, block, 16).permute(0, 2, 1)[None]
        cores = [centre, (core if up else core.T).reshape(shape.core_shapes[1])]
        assert tuple(centre.shape) == shape.core_shapes[0]
        assert torch.allclose(reconstruct(cores), layer.expert_weights(kind)[2], atol=1e-6)


def test_the_mask_compiles_into_two_graphs() -> None:
    model = convert_to_mpoe(dense("llama"), config(2)).train()
    layer, compiled = next(iter(hidden_modules(model).values())), []

    def count(graph, _):
        compiled.append(graph)
        return graph.forward

    run = torch.compile(layer, fullgraph=True, backend=count)
    x = torch.randn(2, 5, 16, requires_grad=True)
    mask = GradientMask(model, 0.5, seed=0)
    for step in range(6):
        with mask.step(step):
            run(x).sum().backward()
    assert len(compiled) <= 2


def test_default_blocks_are_the_largest_divisor_up_to_64() -> None:
    settings = MPOEConfig(shape="hidden")
    assert [settings.hidden_block(f) for f in (3072, 192, 24, 2816, 11008, 67)] == [64, 64, 24, 64, 64, 1]


def test_a_fused_projection_is_one_centre_of_two_halves() -> None:
    converted = convert_to_mpoe(dense("phi3"), config())
    (layer,) = hidden_modules(converted).values()
    assert {kind: weight.shape for kind, weight in layer.central_parameters().items()} == {
        "up": (48, 16),
        "down": (16, 24),
    }
    both = layer.gate_up_proj.weight.T
    assert torch.equal(layer.central_weight("gate_proj"), both[:, :24])
    assert torch.equal(layer.central_weight("up"), both[:, 24:])


def test_noise_dropout_and_padding() -> None:
    layer = next(iter(hidden_modules(convert_to_mpoe(dense("gpt2"), config())).values()))
    assert isinstance(layer, HiddenFeedForward)
    x = torch.randn(2, 3, 16)
    x[0, 1] = float("nan")
    mask = torch.ones(2, 3, dtype=torch.bool)
    mask[0, 1] = False
    y = layer(x, mask)
    assert not y[0, 1].any()
    assert bool(torch.isfinite(y).all())
    noisy = convert_to_mpoe(dense("gpt2"), config(auxiliary_noise=0.1))
    assert not torch.equal(logits(noisy, "gpt2"), logits(dense("gpt2"), "gpt2"))
    for blocks in next(iter(hidden_modules(noisy).values())).experts.own_cores:
        assert float((blocks - torch.eye(8)).square().mean().sqrt()) == pytest.approx(0.1 / 8**0.5, rel=0.2)
    layer.expert_dropout = 0.5
    assert not torch.equal(layer.train()(x, mask), y)


def test_blocks_larger_than_matrices_are_said() -> None:
    """At small widths a block is no smaller than a matrix."""
    sizes = {"n_embd": 8, "n_inner": 64, "n_layer": 1, "n_head": 2, "n_positions": 8, "vocab_size": 20}
    small = GPT2LMHeadModel(GPT2Config(**sizes))
    with pytest.warns(
        UserWarning, match=r"experts are larger than dense ones: [\d,]+ parameters, [\d,]+ with expert_type"
    ):
        convert_to_mpoe(small, MPOEConfig(num_experts=8, block_size=64))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert_to_mpoe(small, MPOEConfig(num_experts=8, block_size=2))
