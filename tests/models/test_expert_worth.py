"""What each expert of a composed mixture is worth; several experts merged; statistics and routers from texts."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mpoe import compose_experts, load_expert, merge_expert, start_expert
from mpoe.data.predict import token_losses
from mpoe.inspection import composed_worth
from mpoe.models.domains import train_routers
from mpoe.models.expert_files import made_expert
from mpoe.models.kept import neuron_modules

from .domain_experts import M, domain, loss
from .small_models import dense_model


@pytest.fixture
def composed(domains: SimpleNamespace) -> SimpleNamespace:
    mixture = compose_experts(domains.base, domains.files, background=domains.background)
    classes = [*(load_expert(file).statistics for file in domains.files), mixture.background_statistics]
    return SimpleNamespace(mixture=mixture, classes=classes)


def test_worth(domains: SimpleNamespace, composed: SimpleNamespace) -> None:
    batches = [*domain(0, seed=9), *domain(1, seed=9)]
    before = [layer.router for layer in neuron_modules(composed.mixture).values()]
    found = composed_worth(composed.mixture, composed.classes, batches)
    assert [layer.router for layer in neuron_modules(composed.mixture).values()] == before
    assert found.names == ["domain0", "domain1", "none"]
    assert found.tokens == len(found.best) == 2 * 32 * 15
    assert sum(found.share) == pytest.approx(1.0)
    assert found.loss == pytest.approx((loss(composed.mixture, 0) + loss(composed.mixture, 1)) / 2, abs=1e-4)
    assert found.base == pytest.approx((loss(domains.base, 0) + loss(domains.base, 1)) / 2, abs=1e-4)
    for number, file in enumerate(domains.files):
        on = start_expert(domains.base, expert=file)
        assert found.alone[number] == pytest.approx(float(token_losses(on, batches).mean()), abs=1e-4)
        others = [each for each in domains.files if each != file]
        less = compose_experts(domains.base, others, background=composed.mixture.background_statistics)
        assert found.removed[number] == pytest.approx(float(token_losses(less, batches).mean()), abs=1e-4)
        assert found.removed[number] > found.loss + 0.3
    assert found.oracle < found.loss < min(found.alone)
    own = torch.tensor(found.best).view(2, -1)
    assert all((own[number] == number).float().mean() > 0.6 for number in (0, 1))


def test_worth_without_none(domains: SimpleNamespace) -> None:
    mixture = compose_experts(domains.base, domains.files, none=False, top_k=1)
    classes = [load_expert(file).statistics for file in domains.files]
    found = composed_worth(mixture, classes, domain(0))
    assert found.base is None
    assert found.removed == pytest.approx(found.alone[::-1], abs=1e-4)


def test_worth_that_is_refused(domains: SimpleNamespace, composed: SimpleNamespace) -> None:
    with pytest.raises(ValueError, match="at least two experts"):
        composed_worth(composed.mixture, composed.classes[:2], domain(0))
    with pytest.raises(ValueError, match="at least two experts"):
        composed_worth(domains.base, [], domain(0))
    with pytest.raises(ValueError, match="batches must hold labels; got input_ids"):
        composed_worth(composed.mixture, composed.classes, [{"input_ids": torch.ones(1, 4).long()}])
    with pytest.raises(ValueError, match="batches must hold tokens to predict"):
        token_losses(domains.base, [])


def test_several_experts_in_one_dense_network(domains: SimpleNamespace) -> None:
    base = domains.base
    merged = merge_expert(base, domains.files, weight=0.5)
    assert merged.config.intermediate_size == 48 + 2 * M
    ids = domain(0)[0]["input_ids"]
    apart = [start_expert(base, expert=file).eval() for file in domains.files]
    x = torch.randn(5, 32)
    for layer in range(2):
        expected = sum(model.model.layers[layer].mlp(x) for model in apart) / 2
        torch.testing.assert_close(merged.model.layers[layer].mlp(x), expected, rtol=1e-5, atol=1e-5)
    assert merged(input_ids=ids).logits.isfinite().all()
    with pytest.raises(ValueError, match="expert must be at least one; got an empty list"):
        merge_expert(base, [])
    for weight in (math.nan, "a", True):
        with pytest.raises(ValueError, match="weight must be a finite number"):
            merge_expert(base, domains.files, weight=weight)


def test_biases_of_several_experts() -> None:
    base = dense_model("gpt2")
    expert = start_expert(base, 4)
    merged = merge_expert(base, [made_expert(expert, "a"), made_expert(expert, "b")])
    assert merged.transformer.h[0].mlp.c_fc.bias.shape == (base.transformer.h[0].mlp.c_fc.bias.shape[0] + 8,)


def test_texts_refine_the_router(domains: SimpleNamespace, tmp_path: Path) -> None:
    texts = {f"domain{number}": domain(number, seed=30) for number in (0, 1)}
    plain = compose_experts(domains.base, domains.files, background=domains.background)
    refined = compose_experts(domains.base, domains.files, background=domains.background, texts=texts)
    assert [len(each.statistics["model.layers.0.mlp.vectors"]) for each in refined.composed_of] == [32, 32]
    assert all(loss(refined, number) < loss(plain, number) + 0.05 for number in (0, 1))
    routers = {name: layer.router.weight for name, layer in neuron_modules(plain).items()}
    assert not any(torch.equal(layer.router.weight, routers[n]) for n, layer in neuron_modules(refined).items())
    again = compose_experts(domains.base, refined.composed_of, background=plain.background_statistics)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in refined.state_dict().items())
    bare = load_expert(domains.files[0])
    bare.statistics.clear()
    compose_experts(domains.base, [bare], background=domains.background, texts={"domain0": texts["domain0"]})
    with pytest.raises(ValueError, match="texts must be by names of experts, domain0, domain1; got 'law'"):
        compose_experts(domains.base, domains.files, background=domains.background, texts={"law": []})


def test_routers_of_neurons_train(domains: SimpleNamespace) -> None:
    mixture = compose_experts(domains.base, domains.files, background=domains.background)
    before = {name: value.clone() for name, value in mixture.state_dict().items()}
    examples = [domain(0, seed=31), domain(1, seed=31), domains.background]
    losses = train_routers(mixture, examples, 0, 5)
    assert losses[-1] < losses[0]
    changed = {name for name, value in mixture.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if "router" in name}
