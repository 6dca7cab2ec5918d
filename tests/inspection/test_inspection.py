"""Spectra against an SVD, routes against the router, totals against converted models."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from mpoe import MPOEConfig, convert_to_mpoe
from mpoe.data.embedded import load_stand_in
from mpoe.inspection import bond_spectra, parameter_growth, route_text
from mpoe.layers.cores import MPOCores
from mpoe.models.report import routed_layers
from mpoe_kernels import MPOShape

SHAPES = {
    "paper": MPOShape((2, 3, 2), (3, 2, 2)),
    "separable": MPOShape.separable(12, 20, left=4, right=5),
    "truncated": MPOShape((2, 3, 2, 2), (3, 2, 2, 2), max_bond=3, central=1),
    "padded": MPOShape((2, 3, 3), (3, 2, 3), in_features=13, out_features=17),
    "one_bond": MPOShape((3, 4), (4, 5)),
}


def unfolding(weight: torch.Tensor, shape: MPOShape, bond: int) -> torch.Tensor:
    """The matrix ``[i_1 j_1 .. i_k j_k, the rest]`` of a weight, by plain reshapes."""
    n = shape.num_cores
    tensor = weight.reshape(*shape.in_factors, *shape.out_factors)
    tensor = tensor.permute([axis for k in range(n) for axis in (k, n + k)])
    return tensor.reshape(math.prod(shape.in_factors[:bond]) * math.prod(shape.out_factors[:bond]), -1)


def full_weights(cores: MPOCores) -> torch.Tensor:
    """``[E, padded I, padded F]``, of the chain itself: values in the padding count too."""
    shape = cores.shape
    whole = MPOShape(shape.in_factors, shape.out_factors, max_bond=shape.max_bond, central=shape.central)
    padded = MPOCores(whole, cores.num_experts, dtype=torch.float64)
    padded.load_state_dict({n: p for n, p in cores.state_dict().items() if n != "bias"})
    return padded.dense_weights().detach()


@pytest.mark.parametrize("name", SHAPES)
def test_spectra_are_singular_values_of_the_unfoldings(name: str) -> None:
    shape = SHAPES[name]
    cores = MPOCores(shape, 3, dtype=torch.float64)
    for parameter in cores.parameters():
        torch.nn.init.normal_(parameter)
    spectra = bond_spectra(cores)
    assert [bond.dimension for bond in spectra] == list(shape.bond_dims[1:-1])
    for expert, weight in enumerate(full_weights(cores)):
        for k, bond in enumerate(spectra):
            expected = torch.linalg.svdvals(unfolding(weight, shape, k + 1))
            found = bond.singular_values[expert]
            torch.testing.assert_close(found, expected[: len(found)], rtol=1e-6, atol=1e-6 * float(expected[0]))


def test_entropy_counts_the_directions_in_use() -> None:
    cores = MPOCores(MPOShape((4, 4), (4, 4), central=0), 1, dtype=torch.float64)
    left, right = torch.linalg.qr(torch.randn(2, 16, 16, dtype=torch.float64))[0]
    tensor = torch.einsum("pk,qk->pq", left[:, :5], right[:, :5])  # 5 equal singular values across the bond
    cores.load_weight_(tensor.reshape(4, 4, 4, 4).permute(0, 2, 1, 3).reshape(16, 16))
    (bond,) = bond_spectra(cores)
    assert bond.effective_rank.item() == pytest.approx(5)
    assert bond.used == pytest.approx(5 / 16)
    cores.load_weight_(torch.zeros(16, 16, dtype=torch.float64))
    assert bond_spectra(cores)[0].entropy.item() == 0.0
    assert bond_spectra(MPOCores(MPOShape((12,), (8,)), 2)) == []  # a chain of one core has no bonds


@pytest.mark.parametrize(("kind", "top_k"), [("t5", 1), ("gpt2", 2)])
def test_routes_are_the_routers_choices(kind: str, top_k: int) -> None:
    dense, tokenizer = load_stand_in(kind)
    model = convert_to_mpoe(dense, MPOEConfig(num_experts=4, router={"top_k": top_k}, shape="separable"))
    text = "return the number of items in the list."
    routes = route_text(model, tokenizer, text, max_new_tokens=5)
    layers = routed_layers(model)
    assert [route.stream for route in routes] == (["encoder", "decoder"] if kind == "t5" else ["main"])
    assert [name for route in routes for name in route.layers] == [name for name, _ in layers]
    seen: dict[str, torch.Tensor] = {}
    for name, layer in layers:
        layer.router.register_forward_hook(lambda _m, _i, out, name=name: seen.update({name: out.top_k_index}))
    first = routes[0]
    assert "".join(first.tokens).replace("</s>", "").strip() == text
    extra = {"decoder_input_ids": torch.zeros(1, 1, dtype=torch.long)} if kind == "t5" else {}
    with torch.no_grad():
        model(input_ids=tokenizer([text], return_tensors="pt").input_ids, **extra)
    for name, experts, probabilities in zip(first.layers, first.experts, first.probabilities, strict=True):
        assert experts == seen[name].tolist()
        assert all(len(p) == top_k and p == sorted(p, reverse=True) and 0 < sum(p) <= 1 + 1e-6 for p in probabilities)
    with pytest.raises(ValueError, match="text must hold at least one token; got ''"):
        route_text(model, load_stand_in("gpt2")[1], "")


@pytest.mark.parametrize("expert_type", ["mpo", "dense"])
def test_totals_are_those_of_converted_models(expert_type: str) -> None:
    dense = GPT2LMHeadModel(GPT2Config(vocab_size=30, n_embd=24, n_layer=2, n_head=2, n_positions=8))

    def converted(experts: int, kind: str):
        targets = ["ffn", "attention"]
        config = MPOEConfig(num_experts=experts, expert_type=kind, target_modules=targets, shape="separable")
        return convert_to_mpoe(dense, config)

    reports = [converted(experts, "mpo").parameter_report() for experts in (2, 4, 8)]
    growth = parameter_growth(converted(4, expert_type), experts=(2, 8))
    assert growth.experts == [2, 4, 8]
    assert [growth.dense] * 3 == [report["dense_total"] for report in reports]
    assert growth.switch == [report["switch_total"] for report in reports]
    assert growth.mpoe == ([report["total"] for report in reports] if expert_type == "mpo" else [])
    with pytest.raises(ValueError, match="GPT2LMHeadModel has none"):
        parameter_growth(dense)
