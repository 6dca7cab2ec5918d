"""Experts of their own hidden neurons: the formula, padding, dropout, dtypes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mpoe import MPOEConfig, RouterConfig
from mpoe.layers import ACTIVATIONS, NeuronExperts, NeuronFeedForward, routing_context

I, F, E, M = 12, 20, 5, 3


class Network(nn.Module):
    """A feed-forward network of a dense model."""

    def __init__(self, gated: bool, dropout: float = 0.0) -> None:
        super().__init__()
        self.wi, self.wo, self.dropout = nn.Linear(I, F, bias=False), nn.Linear(F, I, bias=False), nn.Dropout(dropout)
        self.gate = nn.Linear(I, F, bias=False) if gated else None
        self.scale = 2.0  # something that only its own forward knows

    def forward(self, x: Tensor) -> Tensor:
        h = self.wi(x).relu() if self.gate is None else self.gate(x).relu() * self.wi(x)
        return self.scale * self.wo(self.dropout(h))


class Ending(nn.Module):
    """The end of a network that adds its input, as BERT's."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.norm, self.dropout = nn.Linear(F, I), nn.LayerNorm(I), nn.Dropout(0.0)

    def forward(self, hidden: Tensor, x: Tensor) -> Tensor:
        return self.norm(self.dropout(self.dense(hidden)) + x)


def layer(
    gated: bool = False, latent: int | None = None, top_k: int = 2, dropout: float = 0.0, router: dict | None = None
) -> NeuronFeedForward:
    """Around a `Network`, with experts that contribute."""
    torch.manual_seed(0)
    settings = RouterConfig(top_k=top_k, **(router or {}))
    config = MPOEConfig(
        shape="neurons", num_experts=E, neurons=M, latent=latent, router=settings, expert_bias=True, backend="eager"
    )
    dense = Network(gated, dropout)
    names = {"up": "wi", "down": "wo", **({"gate_proj": "gate"} if gated else {})}
    made = NeuronFeedForward(I, F, config, names=names, gated=gated)
    made.around(dense, {kind: getattr(dense, name) for kind, name in names.items()})
    nn.init.normal_(made.experts.down)
    nn.init.normal_(made.experts.bias)
    return made


def added(module: NeuronFeedForward, x: Tensor) -> Tensor:
    """What the experts add to each of ``x [T, I]``, by the definition."""
    own, decision = module.experts, module.router(x)
    act = ACTIVATIONS[own.activation]
    rows = []
    for t, token in enumerate(x):
        z = token if own.latent_in is None else token @ own.latent_in
        total = torch.zeros_like(z)
        for k, e in enumerate(decision.top_k_index[t].tolist()):
            u = own.up[e] @ z
            bias = 0 if own.bias is None else own.bias[e]
            h = act(u + bias) if own.gate_proj is None else act(own.gate_proj[e] @ z + bias) * u
            total = total + decision.top_k_weights[t, k] * (h @ own.down[e])
        rows.append(total if own.latent_out is None else total @ own.latent_out)
    return torch.stack(rows)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("latent", [None, 4])
@pytest.mark.parametrize("top_k", [1, 2, E])
@pytest.mark.parametrize(
    "gates",
    [{}, {"routed_scaling_factor": 2.0}, {"is_scale_prob": True}, {"scoring_func": "sigmoid", "bias_update_rate": 0.1}],
    ids=["sum to 1", "times a factor", "raw", "sigmoid with a correction bias"],
)
def test_the_definition(gated: bool, latent: int | None, top_k: int, gates: dict) -> None:
    module = layer(gated, latent, top_k, router=gates)
    if module.router.e_score_correction_bias is not None:
        module.router.e_score_correction_bias[3] = 2.0  # the first choice of every token
        assert bool((module.router(torch.randn(4, I)).top_k_index == 3).any(1).all())
    x = torch.randn(2, 4, I)
    want = Network.forward(module, x) + added(module, x.view(-1, I)).view(x.shape)
    assert torch.allclose(module(x), want, atol=1e-5)


@pytest.mark.parametrize("latent", [None, 4])
def test_gradients_follow_the_definition(latent: int | None) -> None:
    module = layer(True, latent)
    x = torch.randn(6, I, requires_grad=True)
    inputs = [x, *module.parameters()]
    weight = torch.randn(6, I)
    got = torch.autograd.grad((module(x) * weight).sum(), inputs)
    want = torch.autograd.grad(((Network.forward(module, x) + added(module, x)) * weight).sum(), inputs)
    for name, mine, theirs in zip(["x", *dict(module.named_parameters())], got, want, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-5), name


def test_padding_has_no_expert_and_is_not_counted() -> None:
    module = layer()
    x = torch.randn(2, 3, I)
    mask = torch.tensor([[True, False, True], [True, True, False]])
    with routing_context({"main": mask}) as routing:
        found = module(x)
    with routing_context({"main": None}) as whole:
        other = module(x)
    assert torch.equal(found[~mask], Network.forward(module, x)[~mask])
    assert torch.allclose(found[mask], other[mask])
    (record,) = routing.records
    assert int(record.expert_load.sum()) == 2 * int(mask.sum())
    assert int(whole.records[0].expert_load.sum()) == 2 * mask.numel()
    x[~mask] = float("nan")  # whatever padding holds stays there
    again = module(x, token_mask=mask)
    assert torch.equal(again[mask], found[mask])
    with pytest.raises(ValueError, match=r"token_mask must be \[2, 3\]"):
        module(x, token_mask=mask[:1])


def test_a_network_that_ends_in_a_module_that_adds_its_input() -> None:
    torch.manual_seed(0)
    dense, up = Ending(), nn.Linear(I, F)
    config = MPOEConfig(shape="neurons", num_experts=E, neurons=M, router=RouterConfig(top_k=2), backend="eager")
    module = NeuronFeedForward(I, F, config, names={"down": "dense"}, adds_input=True)
    module.around(dense, {"up": up, "down": dense.dense})
    nn.init.normal_(module.experts.down)
    x, hidden = torch.randn(4, I), torch.randn(4, F)
    own = Ending.forward(module, hidden, x + added(module, x))
    assert torch.allclose(module(hidden, x), own, atol=1e-5)
    assert module.projections() == {"down": module.dense, "up": up}


def test_the_dense_networks_dropout_is_not_the_experts() -> None:
    module = layer(dropout=0.5).train()
    x = torch.randn(64, I)
    torch.manual_seed(1)
    found = module(x)
    torch.manual_seed(1)
    assert torch.allclose(found - Network.forward(module, x), added(module, x), atol=1e-5)
    asked = layer(dropout=0.5, router={"expert_dropout": 0.5}).train()
    torch.manual_seed(1)
    found = asked(x)
    torch.manual_seed(1)
    share = ((found - Network.forward(asked, x)).abs() < 1e-6).float().mean()
    assert 0.4 < float(share) < 0.6


def test_dtypes() -> None:
    module = layer().double()
    x = torch.randn(3, I, dtype=torch.float64)
    want = module(x)
    assert want.dtype == torch.float64
    half = layer().bfloat16()
    assert torch.allclose(half(x.bfloat16()).double(), want, atol=0.3)
    assert half(x.bfloat16()).dtype == torch.bfloat16
    whole = layer()
    with torch.autocast("cpu", torch.bfloat16):
        lowered = whole(x.float())
    assert lowered.dtype == torch.bfloat16
    assert torch.allclose(lowered.double(), want, atol=0.3)


@pytest.mark.parametrize("latent", [None, 4])
def test_merged(latent: int | None) -> None:
    module = layer(True, latent)
    module.experts.up.requires_grad_(False)
    x = torch.randn(6, I)
    want = module(x)
    module.experts = module.experts.merged()
    assert module.experts.latent is None
    assert torch.allclose(module(x), want, atol=1e-5)
    assert not module.experts.up.requires_grad
    assert module.experts.down.requires_grad


def test_no_token_and_one_token() -> None:
    module = layer(True, 4).eval()
    with torch.no_grad():
        assert module(torch.randn(0, I)).shape == (0, I)
        x = torch.randn(3, I)
        assert torch.allclose(torch.cat([module(row[None]) for row in x]), module(x), atol=1e-5)


@pytest.mark.parametrize("latent", [None, 16])
@pytest.mark.parametrize("std", [None, 0.3])
@torch.no_grad()
def test_random_neurons_have_the_scale_of_dense_ones(latent: int | None, std: float | None) -> None:
    own = NeuronExperts(64, 8, 32, latent, gated=True, bias=True, init_std=std)
    x = torch.randn(500, 64)
    z = x if latent is None else x @ own.latent_in
    wanted = (std or 64**-0.5) * 64**0.5  # of x times a dense neuron
    for rows in (own.up, own.gate_proj):
        assert float((z @ rows.flatten(0, 1).t()).std()) == pytest.approx(wanted, rel=0.1)
    assert not own.down.any()
    assert not own.bias.any()
    if latent is not None:
        assert float(own.latent_out.std()) == pytest.approx(0.25, rel=0.1)  # of 16 numbers
