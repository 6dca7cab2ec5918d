"""The gradient mask in a plain PyTorch loop; under the Trainer it is tested in test_trainer_mask.py."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mpoe.training.gradient_mask import GradientMask, mask_draw

from .tiny import mpoe_model
from .toy import Toy


def adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


def first_step(mask: GradientMask, masked: bool) -> int:
    return next(step for step in range(1000) if mask.is_masked(step) is masked)


def train_step(model: Toy, optimizer: torch.optim.Optimizer, micro_batches: int = 1) -> None:
    for _ in range(micro_batches):
        model(torch.randn(6, 32)).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def snapshot(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> list[torch.Tensor]:
    """Values and complete Adam state (exp_avg, exp_avg_sq, step) of some parameters."""
    tensors = [p.detach().clone() for p in parameters]
    for p in parameters:
        tensors += [value.clone() for _, value in sorted(optimizer.state[p].items())]
    return tensors


@pytest.mark.parametrize("shape", ["separable", "paper", "light"])
def test_masked_step_leaves_centrals_and_their_adam_state_bitwise_unchanged(shape: str) -> None:
    model = Toy(shape)
    mask, optimizer = GradientMask(model, 0.5, seed=3), adamw(model)
    for _ in range(3):  # unmasked steps give momentum, which weight decay and Adam would keep applying
        with mask.step(first_step(mask, masked=False)) as masked:
            assert not masked
            train_step(model, optimizer)
    before_centrals = snapshot(optimizer, model.centrals())
    assert len(before_centrals) == 4 * len(model.centrals()) == 16
    assert all(optimizer.state[p]["exp_avg"].abs().max() > 0 for p in model.centrals())
    before_others = [p.detach().clone() for p in model.others()]

    with mask.step(first_step(mask, masked=True)) as masked:
        assert masked
        train_step(model, optimizer, micro_batches=3)
    for old, new in zip(before_centrals, snapshot(optimizer, model.centrals()), strict=True):
        assert torch.equal(old, new)
    for old, parameter in zip(before_others, model.others(), strict=True):
        assert not torch.equal(old, parameter)

    with mask.step(first_step(mask, masked=False)):
        train_step(model, optimizer)
    assert not any(torch.equal(old, p) for old, p in zip(before_centrals, model.centrals(), strict=False))


def test_gradient_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Toy()
    mask = GradientMask(model, 1.0)
    seen: list[bool] = []
    cores = model.layers[0].experts.up
    original = type(cores).cores

    def spy(self: nn.Module) -> list[torch.Tensor]:
        chain = original(self)
        seen.append(chain[self.shape.central].requires_grad)
        return chain

    monkeypatch.setattr(type(cores), "cores", spy)
    with mask.step(0):
        model(torch.randn(6, 32)).backward()
        assert seen
        assert not any(seen)
        assert all(p.grad is None for p in model.centrals())
        assert all(p.grad is not None for p in model.others())
    seen.clear()
    model(torch.randn(6, 32)).backward()
    assert all(seen)
    assert all(p.grad is not None for p in model.centrals())


def test_other_gradients_and_the_forward_do_not_depend_on_the_mask() -> None:
    model = Toy()
    x = torch.randn(6, 32)
    model(x).backward()
    free = [p.grad.clone() for p in model.others()]
    value = model(x).detach()
    model.zero_grad()
    with GradientMask(model, 1.0).step(0):
        loss = model(x)
        loss.backward()
    assert torch.equal(loss.detach(), value)
    for expected, parameter in zip(free, model.others(), strict=True):
        torch.testing.assert_close(parameter.grad, expected)


def test_stale_zero_gradients_do_not_defeat_the_mask() -> None:
    model = Toy()
    mask, optimizer = GradientMask(model, 1.0), adamw(model)
    model(torch.randn(6, 32)).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    before = [p.detach().clone() for p in model.centrals()]
    with mask.step(1):
        model(torch.randn(6, 32)).backward()
        optimizer.step()
    assert all(torch.equal(old, p) for old, p in zip(before, model.centrals(), strict=True))


def test_the_share_of_masked_steps_since_it_was_asked_for() -> None:
    mask = GradientMask(Toy(), 0.5, seed=3)
    assert mask.pop_rate() is None
    masked = [mask.begin_step(step) for step in range(8)]
    assert 0 < sum(masked) < 8
    assert mask.pop_rate() == sum(masked) / 8
    assert mask.pop_rate() is None


def test_draws_are_a_pure_function_of_seed_and_step() -> None:
    draws = [mask_draw(7, step) for step in range(50)]
    torch.manual_seed(123)
    assert draws == [mask_draw(7, step) for step in range(50)]
    assert [mask_draw(7, step) for step in reversed(range(50))] == draws[::-1]
    assert draws != [mask_draw(8, step) for step in range(50)]
    assert len(set(draws)) == 50
    assert mask_draw(2**63 + 1, 0) != mask_draw(2**63, 0)
    assert 0 <= mask_draw(-1, 0) < 1
    # Pinned: a change of the stream would make resumed runs disagree with themselves.
    assert mask_draw(0, 0) == 0.06080617801273447
    assert mask_draw(1234567, 3) == mask_draw(2**64 + 1234567, 3) == 0.6831252126694477


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_frequency(probability: float) -> None:
    mask = GradientMask(None, probability, seed=11)
    rate = sum(mask.is_masked(step) for step in range(4000)) / 4000
    # Four standard deviations; exact at the ends.
    assert abs(rate - probability) <= 4 * (probability * (1 - probability) / 4000) ** 0.5


def test_error_in_a_masked_step_releases_the_model() -> None:
    model = Toy()
    mask = GradientMask(model, 1.0)
    cores = model.layers[0].experts.up

    def fail() -> None:
        with mask.step(0):
            assert cores.central_masked
            assert mask.active
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        fail()
    assert not cores.central_masked
    assert not mask.active


def test_a_mask_bound_to_another_model_releases_the_first() -> None:
    first, second = Toy(), Toy()
    mask = GradientMask(first, 1.0)
    mask.begin_step(0)
    mask.bind(second)
    assert not any(cores.central_masked for layer in first.layers for cores in (layer.experts.up, layer.experts.down))
    assert not mask.active


def test_frozen_projections_around_hidden_experts() -> None:
    model = mpoe_model("gpt2", shape="hidden")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    GradientMask(model, 0.0)  # off: nothing to refuse
    with pytest.raises(ValueError, match="the gradient mask needs projections that train"):
        GradientMask(model, 0.5)


@pytest.mark.parametrize("probability", [-0.1, 1.5, float("nan")])
def test_bad_probability(probability: float) -> None:
    with pytest.raises(ValueError, match="gradient_mask_prob must be between 0 and 1"):
        GradientMask(Toy(), probability)


def test_bad_types() -> None:
    with pytest.raises(TypeError, match="gradient_mask_prob must be a number"):
        GradientMask(Toy(), "0.5")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="gradient_mask_seed must be an integer"):
        GradientMask(Toy(), 0.5, seed=1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="step must be >= 0"):
        mask_draw(0, -1)


def test_model_without_cores_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a model with MPO cores; Linear has none"):
        GradientMask(nn.Linear(2, 2), 0.5)
    GradientMask(nn.Linear(2, 2), 0.0)  # off: nothing to refuse
