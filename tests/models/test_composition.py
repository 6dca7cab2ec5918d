"""Mixtures that are composed of fine-tunes of one model."""

import copy

import pytest
import torch
from torch.testing import assert_close

from mpoe import MPOEConfig, RouterConfig, compose
from mpoe.models.composition import (
    LOGIT_SCALE,
    _domain_loss,
    _second_moment,
    forced,
    pooled_statistics,
    router_weight,
    solve_routers,
    train_routers,
)
from mpoe.models.walk import routed_layers
from tests.assertions import refuses

from .tiny_models import dense_model as dense

FAMILIES = ["llama", "gpt2", "t5", "bert"]


def tuned(base, seed, only="ffn"):
    """A copy with changed feed-forward networks (or with everything changed)."""
    torch.manual_seed(seed)
    model = copy.deepcopy(base)
    for name, p in model.named_parameters():
        inside = any(
            part in name for part in ("mlp", "DenseReluDense", "intermediate", "output.dense")
        )
        if only == "all" or (inside and "attention" not in name):
            p.data += 0.1 * torch.randn_like(p)
    return model


def tuned_pair(family):
    """A base and two fine-tunes of it."""
    base = dense(family)
    return base, [tuned(base, seed) for seed in (1, 2)]


def batches(domain, count=2):
    """Texts of a domain, whose words come from its own range."""
    generator = torch.Generator().manual_seed(domain)
    low = 2 + 18 * domain
    ids = [torch.randint(low, low + 18, (4, 12), generator=generator) for _ in range(count)]
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids]


def outputs(model, inputs):
    out = model(**inputs)
    return out.logits if "logits" in out else out.last_hidden_state


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_experts_are_the_fine_tunes(family):
    base, fine_tunes = tuned_pair(family)
    mixture = compose(base, fine_tunes)
    assert not mixture.training
    for number, fine_tune in enumerate(fine_tunes):
        inputs = batches(number, 1)[0]
        if family == "t5":
            inputs["decoder_input_ids"] = inputs["input_ids"][:, :5]
        with forced(mixture, number):
            sent = outputs(mixture, inputs)
        assert_close(sent, outputs(fine_tune, inputs), rtol=1e-4, atol=1e-5)


def test_what_lies_outside_the_experts_is_the_mean():
    base = dense("llama")
    one, two = tuned(base, 1, "all"), tuned(base, 2, "all")
    mixture = compose(base, [one, two])
    name = "model.layers.0.self_attn.q_proj.weight"
    of = [dict(model.named_parameters())[name] for model in (mixture, one, two)]
    assert_close(of[0], (of[1] + of[2]) / 2)
    assert torch.equal(compose(base, [one, one, one]).get_parameter(name), of[1])


@pytest.mark.parametrize("top_k", [1, 2])
def test_a_ridge_router_sends_domains_to_their_experts(top_k):
    base = dense("llama")
    fine_tunes = [tuned(base, seed) for seed in (1, 2, 3)]
    mixture = compose(base, fine_tunes, [batches(d) for d in range(3)], RouterConfig(top_k=top_k))
    for domain in range(3):
        load = mixture(**batches(domain, 1)[0]).router_logits
        right = torch.stack([logits.argmax(-1) == domain for logits in load]).float().mean()
        assert right > 0.7


def test_a_ridge_router_gives_probabilities():
    """Tokens are normally distributed around their domain's mean, and the domains overlap."""
    mixture = compose(*tuned_pair("llama"))
    generator = torch.Generator().manual_seed(0)
    means = 3 + 0.1 * torch.randn(2, 24, generator=generator, dtype=torch.float64)
    x = means[:, None] + torch.randn(2, 5000, 24, generator=generator, dtype=torch.float64)
    layers = dict(routed_layers(mixture))
    classes = [statistics_of(own) for own in x]
    for layer in layers.values():
        layer.router.weight.data.copy_(router_weight(classes, "h", sharpness=1 / 2))
    wanted = (x @ means.mT - means.square().sum(1) / 2).softmax(-1)
    for layer in layers.values():
        found = layer.router(x.flatten(0, 1).float()).logits.softmax(-1).view_as(wanted)
        assert (found - wanted).abs().mean() < 0.08 < (wanted - 0.5).abs().mean()


def statistics_of(x):
    """Statistics of a layer h whose inputs are ``x [T, I]``."""
    mean, covariance = x.mean(0), x.mT @ x / len(x) - torch.outer(x.mean(0), x.mean(0))
    values, vectors = torch.linalg.eigh(covariance)
    return {
        "h.mean": mean,
        "h.rest": torch.zeros_like(mean),
        "h.vectors": vectors.mT,
        "h.values": values,
    }


def test_a_router_is_the_discriminant_of_the_statistics():
    """``3 E (S + r)^-1 (means - their mean)``, by another way: S is the mean of the classes' second
    moments."""
    rows = [(torch.randn(50, 6) @ torch.randn(6, 6) + number).double() for number in range(3)]
    every = torch.stack([x.mT @ x / 50 for x in rows]).mean(0)
    every += 1e-3 * every.trace() / 6 * torch.eye(6)
    means = torch.stack([x.mean(0) for x in rows])
    found = router_weight([statistics_of(x) for x in rows], "h", sharpness=3.0)
    wanted = 9 * (means - means.mean(0)) @ every.inverse()
    assert_close(found, wanted)


def test_the_preferred_class_gets_as_much_more():
    """Of a class whose tokens have little variance, every token gets ``preference`` more for the
    last class."""
    rows = [(0.01 * torch.randn(50, 6) + torch.eye(6)[number]).double() for number in range(3)]
    classes = [statistics_of(x) for x in rows]
    routers = {
        preference: solve_routers(classes, ["h"], none=True, preference=preference)["h"]
        for preference in (0.0, 2.0)
    }
    more = rows[2] @ (routers[2.0] - routers[0.0]).mT / 3  # one of three classes
    assert_close(more, torch.tensor([0.0, 0.0, 2.0]).double().expand(50, 3), atol=0.1, rtol=0)


@pytest.mark.parametrize(
    "number, scale", [(3, LOGIT_SCALE / 3**0.5), (5, LOGIT_SCALE / 5**0.5), (6, 1.05)]
)
def test_many_classes_have_softer_routers(number, scale):
    classes = [statistics_of(torch.randn(50, 6).double() + place) for place in range(number)]
    router = solve_routers(classes, ["h"], none=False, preference=2.0)["h"]
    assert_close(router, router_weight(classes, "h", scale / number))


def test_pooled_statistics_weigh_texts_alike():
    """A long text counts as much as a short one: mean and second moment are the means over
    texts."""
    rows = [(torch.randn(count, 6) + number).double() for number, count in enumerate((50, 400))]
    pooled = pooled_statistics([statistics_of(x) for x in rows])
    assert_close(pooled["h.mean"].double(), torch.stack([x.mean(0) for x in rows]).mean(0))
    moment = torch.stack([x.mT @ x / len(x) for x in rows]).mean(0)
    assert_close(_second_moment(pooled, "h"), moment, rtol=2e-3, atol=2e-3)  # vectors in 16 bits


def test_a_mask_of_other_tokens_hides_none():
    """A decoder with more tokens than its encoder: the mask is the encoder's."""
    ids = [
        {"input_ids": torch.full((2, 3), d + 2), "labels": torch.full((2, 5), d + 2)}
        for d in range(2)
    ]
    examples = [[{**each, "attention_mask": torch.ones(2, 3)}] for each in ids]
    mixture = compose(*tuned_pair("t5"), examples, router="train", steps=2)
    assert all(parameter.isfinite().all() for parameter in mixture.parameters())


def test_a_decoder_as_long_as_its_encoder_keeps_its_own_tokens():
    mixture = compose(*tuned_pair("t5"))
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]])
    batch = {
        "input_ids": torch.arange(2, 10).view(2, 4),
        "labels": torch.arange(12, 20).view(2, 4),
        "attention_mask": mask,
    }
    out = mixture(**batch, output_router_logits=True)
    losses = []
    for logits, (_, layer) in zip(out.router_logits, routed_layers(mixture), strict=True):
        counted = mask.bool().view(-1) if layer.stream == "encoder" else slice(None)
        losses.append(-logits.log_softmax(-1)[counted, 1].mean())
    wanted = out.task_loss + torch.stack(losses).mean()
    assert_close(_domain_loss(mixture, batch, 1), wanted)


def test_training_of_routers_leaves_no_gradients_and_no_frozen_model():
    mixture = compose(*tuned_pair("llama"))
    train_routers(mixture, [batches(0), batches(1)], 1)
    assert all(parameter.grad is None for parameter in mixture.parameters())
    with pytest.raises(StopIteration):
        train_routers(mixture, [batches(0), []], 1)
    assert all(parameter.requires_grad for parameter in mixture.parameters())


def test_examples_may_be_read_once_and_training_needs_them():
    base, fine_tunes = tuned_pair("llama")
    options = {"router": "train", "steps": 1}
    wanted = compose(base, fine_tunes, [batches(0), batches(1)], **options)
    once = compose(base, fine_tunes, [iter(batches(0)), iter(batches(1))], **options)
    for (_, one), (_, other) in zip(routed_layers(wanted), routed_layers(once), strict=True):
        assert torch.equal(one.router.weight, other.router.weight)
    message = "router 'train' needs examples; got None"
    refuses(ValueError, message, compose, base, fine_tunes, **options)


def test_a_capacity_keeps_no_token_from_the_regression():
    """All tokens of a domain go to one expert, whose capacity would admit only a few."""
    base, fine_tunes = tuned_pair("llama")
    routers = [RouterConfig(), RouterConfig(eval_capacity_factor=0.5)]
    free, bound = (
        compose(base, fine_tunes, [batches(d) for d in range(2)], router) for router in routers
    )
    for (_, one), (_, other) in zip(routed_layers(free), routed_layers(bound), strict=True):
        assert torch.equal(one.router.weight, other.router.weight)


def test_training_changes_the_routers_alone_and_lowers_the_loss():
    base, fine_tunes = tuned_pair("llama")
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
    losses = train_routers(trained, examples, 15)
    assert losses[-1] < losses[0]
    assert [parameter.requires_grad for parameter in trained.parameters()] == before
    wanted = 0.0
    for domain, batch in enumerate(each[0] for each in examples):
        out = trained(**batch, output_router_logits=True)
        own = [-logits.log_softmax(-1)[:, domain].mean() for logits in out.router_logits]
        wanted += float((out.task_loss + torch.stack(own).mean()).detach())
    assert train_routers(trained, examples, 1)[0] == pytest.approx(wanted, rel=1e-5)
    padded = {**examples[0][0], "attention_mask": torch.ones_like(examples[0][0]["input_ids"])}
    padded["attention_mask"][:, -2:] = 0
    out = trained(**padded, output_router_logits=True)
    mask = padded["attention_mask"].bool().view(-1)
    own = [-logits.log_softmax(-1)[mask, 1].mean() for logits in out.router_logits]
    assert float(_domain_loss(trained, padded, 1)) == pytest.approx(
        float(out.task_loss + torch.stack(own).mean())
    )


def test_fine_tunes_that_do_not_fit():
    base = dense("llama")
    other = dense("gpt2")
    refuses(ValueError, "at least one model", compose, base, [])
    refuses(
        ValueError, "number 0 differs in class: GPT2LMHeadModel for Llama", compose, base, [other]
    )
    longer = copy.deepcopy(base)
    longer.resize_token_embeddings(70)
    refuses(ValueError, r"number 0 differs in .*70", compose, base, [longer])
    wrong = "router must be a RouterConfig or its dict; got MPOEConfig"
    refuses(TypeError, wrong, compose, base, [base], routing=MPOEConfig())
    refuses(
        ValueError, "router must be one of 'ridge', 'train'", compose, base, [base], router="rigde"
    )
    refuses(ValueError, "steps must be at least 1; got 0", compose, base, [base], steps=0)
    refuses(
        ValueError, "each of 1 fine-tunes; got 2", compose, base, [base], [batches(0), batches(1)]
    )
    refuses(ValueError, "each of 2 fine-tunes; got 1", compose, base, [base, base], [batches(0)])
    refuses(ValueError, "batches must hold tokens", compose, base, [base], [[]])
