"""Fine-tunes of one model become the experts of one mixture: what is exact, what is reported, what routers learn."""

from __future__ import annotations

import copy

import pytest
import torch

import mpoe
from mpoe import MPOEConfig, RouterConfig, add_expert, compose, convert_to_mpoe, load_mpoe

from .tiny_models import dense_model as dense

FAMILIES = ["llama", "gpt2", "t5", "bert"]


def tuned(base, seed, only="ffn"):
    """A copy with changed feed-forward networks (or with everything changed)."""
    torch.manual_seed(seed)
    model = copy.deepcopy(base).eval()
    for name, p in model.named_parameters():
        inside = any(part in name for part in ("mlp", "DenseReluDense", "intermediate", "output.dense"))
        if only == "all" or (inside and "attention" not in name):
            p.data += 0.1 * torch.randn_like(p)
    return model


def batches(domain, count=2):
    """Texts of a domain, whose words come from its own range."""
    generator = torch.Generator().manual_seed(domain)
    low = 2 + 18 * domain
    ids = [torch.randint(low, low + 18, (4, 12), generator=generator) for _ in range(count)]
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids]


def inputs_of(family, domain):
    inputs = batches(domain, 1)[0]
    return {**inputs, "decoder_input_ids": inputs["input_ids"][:, :5]} if family == "t5" else inputs


def result(model, inputs):
    out = model(**inputs)
    return out.logits if "logits" in out else out.last_hidden_state


def send_to(model, expert):
    """Send every token to one expert."""
    for layer in model.modules():
        if getattr(layer, "router", None) is not None:
            forced = mpoe.models.domains.Forced(layer.router, expert)
            layer.router = forced


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_experts_are_the_fine_tunes(family):
    base = dense(family).eval()
    fine_tunes = [tuned(base, seed) for seed in (1, 2)]
    mixture = compose(base, fine_tunes)
    assert not mixture.training
    for number, fine_tune in enumerate(fine_tunes):
        assert mixture.composition_report[number] == 0.0
        sent = copy.deepcopy(mixture)
        send_to(sent, number)
        inputs = inputs_of(family, number)
        torch.testing.assert_close(result(sent, inputs), result(fine_tune, inputs), rtol=1e-4, atol=1e-5)


def test_what_lies_outside_the_experts_is_the_mean_and_told():
    base = dense("llama")
    one, two = tuned(base, 1, "all"), tuned(base, 2, "all")
    mixture = compose(base, [one, two])
    name = "model.layers.0.self_attn.q_proj.weight"
    of = [dict(model.named_parameters())[name] for model in (mixture, one, two)]
    torch.testing.assert_close(of[0], (of[1] + of[2]) / 2)
    assert all(0.5 < error < 1.0 for error in mixture.composition_report.values())
    assert compose(base, [one, one]).composition_report == {0: 0.0, 1: 0.0}


@pytest.mark.parametrize("top_k", [1, 2])
def test_a_ridge_router_sends_domains_to_their_experts(top_k):
    base = dense("llama").eval()
    fine_tunes = [tuned(base, seed) for seed in (1, 2, 3)]
    mixture = compose(base, fine_tunes, [batches(d) for d in range(3)], RouterConfig(top_k=top_k))
    for domain in range(3):
        load = mixture(**batches(domain, 1)[0]).router_logits
        right = torch.stack([logits.argmax(-1) == domain for logits in load]).float().mean()
        assert right > 0.7


def test_a_ridge_router_gives_probabilities():
    """Tokens are normally distributed around their domain's mean, and the domains overlap."""
    base = dense("llama").eval()
    mixture = compose(base, [tuned(base, 1), tuned(base, 2)])
    generator = torch.Generator().manual_seed(0)
    means = 3 + 0.1 * torch.randn(2, 24, generator=generator, dtype=torch.float64)
    x = means[:, None] + torch.randn(2, 5000, 24, generator=generator, dtype=torch.float64)
    layers = dict(mpoe.models.domains.routed_layers(mixture))
    known = {"outer": torch.einsum("eti,etj->ij", x, x) / 5000, "mean": x.mean(1)}
    mpoe.models.domains.solve_routers(mixture, {f"{n}.{key}": v for n in layers for key, v in known.items()}, 1e-6)
    wanted = (x @ means.mT - means.square().sum(1) / 2).softmax(-1)
    for layer in layers.values():
        found = layer.router(x.flatten(0, 1).float()).logits.softmax(-1).view_as(wanted)
        assert (found - wanted).abs().mean() < 0.08 < (wanted - 0.5).abs().mean()


def test_statistics_are_sums_over_domains_of_what_a_router_reads():
    base = dense("llama").eval()
    mixture = compose(base, [tuned(base, 1), tuned(base, 2)], [batches(d) for d in range(2)])
    rows: list[list[torch.Tensor]] = [[], []]
    layer = mpoe.models.domains.routed_layers(mixture)["model.layers.0.mlp"]
    for domain in range(2):
        hook = layer.register_forward_pre_hook(lambda _, args, own=rows[domain]: own.append(args[0].flatten(0, -2)))
        for each in batches(domain):
            mixture(**each)
        hook.remove()
    x = [torch.cat(own).double() for own in rows]
    known = mixture.router_statistics
    torch.testing.assert_close(
        known["model.layers.0.mlp.outer"], sum(a.mT @ a / len(a) for a in x), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(
        known["model.layers.0.mlp.mean"], torch.stack([a.mean(0) for a in x]), rtol=1e-5, atol=1e-6
    )


def test_a_mask_of_other_tokens_hides_none():
    """A decoder with more tokens than its encoder: the mask is the encoder's."""
    base = dense("t5").eval()
    examples = [
        [
            {
                "input_ids": torch.full((2, 3), d + 2),
                "attention_mask": torch.ones(2, 3),
                "labels": torch.full((2, 5), d + 2),
            }
        ]
        for d in range(2)
    ]
    mixture = compose(base, [tuned(base, 1), tuned(base, 2)], examples, router="train", steps=2)
    assert all(parameter.isfinite().all() for parameter in mixture.parameters())


def test_a_capacity_keeps_no_token_from_the_regression():
    """All tokens of a domain go to one expert, whose capacity would admit only a few."""
    base = dense("llama").eval()
    fine_tunes = [tuned(base, seed) for seed in (1, 2)]
    routers = [RouterConfig(), RouterConfig(eval_capacity_factor=0.5)]
    free, bound = (compose(base, fine_tunes, [batches(d) for d in range(2)], router) for router in routers)
    for key, value in free.router_statistics.items():
        assert torch.equal(bound.router_statistics[key], value), key


def test_training_changes_the_routers_alone_and_lowers_the_loss():
    base = dense("llama").eval()
    fine_tunes = [tuned(base, seed) for seed in (1, 2)]
    examples = [[{**b, "labels": b["input_ids"]} for b in batches(d)] for d in range(2)]
    ridge = compose(base, fine_tunes, examples)
    trained = compose(base, fine_tunes, examples, router="train", steps=5)
    kept = dict(ridge.named_parameters())
    for name, p in trained.named_parameters():
        assert torch.equal(p, kept[name]) == ("router" not in name), name
        assert p.requires_grad
    for number, parameter in enumerate(trained.parameters()):
        parameter.requires_grad_(number % 3 > 0)
    before = [parameter.requires_grad for parameter in trained.parameters()]
    losses = mpoe.models.domains.train_routers(trained, examples, 0, 15)
    assert losses[-1] < losses[0]
    assert [parameter.requires_grad for parameter in trained.parameters()] == before


def test_one_expert_more_is_as_if_it_had_been_there_and_leaves_the_others():
    base = dense("llama").eval()
    fine_tunes = [tuned(base, seed) for seed in (1, 2, 3)]
    examples = [batches(d) for d in range(3)]
    two = compose(base, fine_tunes[:2], examples[:2])
    three = add_expert(two, base, fine_tunes[2], examples[2])
    at_once = dict(compose(base, fine_tunes, examples).named_parameters())
    before = dict(two.named_parameters())
    for name, p in three.named_parameters():
        torch.testing.assert_close(p, at_once[name], rtol=1e-4, atol=1e-4)
        if "experts" in name:
            assert torch.equal(p[:2], before[name]), name
        elif "router" not in name:
            assert torch.equal(p, before[name]), name
    assert (three.mpoe_config.num_experts, two.mpoe_config.num_experts) == (3, 2)


def test_a_composed_mixture_is_saved_and_loaded(tmp_path):
    base = dense("gpt2").eval()
    mixture = compose(base, [tuned(base, 1), tuned(base, 2)], [batches(0), batches(1)])
    mixture.save_pretrained(tmp_path)
    inputs = inputs_of("gpt2", 0)
    assert torch.equal(result(load_mpoe(tmp_path).eval(), inputs), result(mixture, inputs))


def test_what_does_not_fit_is_refused():
    base = dense("llama")
    other = dense("gpt2")
    with pytest.raises(ValueError, match="at least one model"):
        compose(base, [])
    with pytest.raises(ValueError, match="class of base"):
        compose(base, [other])
    longer = copy.deepcopy(base)
    longer.resize_token_embeddings(70)
    with pytest.raises(ValueError, match=r"number 0 differs in .*70"):
        compose(base, [longer])
    with pytest.raises(TypeError, match="routing must be a RouterConfig; got MPOEConfig"):
        compose(base, [base], None, MPOEConfig())
    with pytest.raises(ValueError, match="router must be one of 'ridge', 'train'"):
        compose(base, [base], router="rigde")
    with pytest.raises(ValueError, match="steps must be at least 1; got 0"):
        compose(base, [base], steps=0)
    with pytest.raises(ValueError, match="ridge must be a positive number"):
        compose(base, [base], ridge=0.0)
    with pytest.raises(ValueError, match="each of 1 fine-tunes; got 2"):
        compose(base, [base], [batches(0), batches(1)])
    with pytest.raises(ValueError, match="those of number 0 hold none"):
        compose(base, [base], [[]])


def test_what_cannot_join_is_refused():
    base = dense("llama")
    mixture = compose(base, [base])
    with pytest.raises(TypeError, match="mixture must be an MPOE model"):
        add_expert(base, base, base)
    with pytest.raises(ValueError, match="class that mixture was"):
        add_expert(mixture, dense("gpt2"), dense("gpt2"))
    with pytest.raises(ValueError, match="mixture must have a router and dense experts"):
        add_expert(convert_to_mpoe(base, MPOEConfig(num_experts=2)), base, base)
    with pytest.raises(ValueError, match="must carry router_statistics"):
        add_expert(mixture, base, base, batches(0))
