"""Models that are already mixtures, and mixtures that are composed of fine-tunes of one model."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn

import mpoe
from mpoe import MPOEConfig, RouterConfig, add_expert, compose, convert_to_mpoe, load_mpoe, merge_experts
from mpoe.cli import export as command
from mpoe.cli.plan import build, read_values
from mpoe.layers import MixtureExperts, MPOLinear
from mpoe.models.find import expert_modules
from mpoe.models.table import TABLE
from tests.assertions import refuses

from .tiny_models import EXPERTS, first_result, heads_of, text_rows, tiny_batch, tiny_model
from .tiny_models import dense_model as dense

slow = pytest.mark.slow
DAILY = ("qwen2_moe", "deepseek_v3")
CASES = [
    pytest.param(*case, id="-".join(case[::2]), marks=[slow] * (case[0] not in DAILY or "CausalLM" not in case[1]))
    for case in heads_of([model_type for model_type, row in TABLE.items() if row.is_mixture])
]


def result(model, inputs):
    with torch.no_grad():
        return text_rows(first_result(model(**inputs)), inputs)


def close(found, expected, bound=1e-5):
    return float((found - expected).abs().max()) <= bound * float(expected.abs().max())


def alike(model, relative=0.0):
    """``model`` with every expert a copy of the first plus noise, so that MPOs around one centre fit them."""
    with torch.no_grad():
        for _, experts in expert_modules(model):
            for weight in experts.parameters():
                weight.copy_(weight[:1] + relative * torch.randn_like(weight))
    return model


@pytest.mark.parametrize(("model_type", "auto", "name"), CASES)
def test_experts_stay_or_become_mpos_and_come_back(model_type, auto, name, tmp_path):
    model = alike(tiny_model(model_type, name))
    inputs = tiny_batch(model, model_type)
    expected = result(model, inputs)
    kept = convert_to_mpoe(model)
    assert type(kept).__name__ == f"MPOE{name}"
    assert torch.equal(result(kept, inputs), expected)
    assert kept.mpoe_config.num_experts == EXPERTS
    assert list(kept.state_dict()) == list(model.state_dict())
    changed = convert_to_mpoe(model, MPOEConfig(existing_experts="mpo"))
    assert any(isinstance(module, MixtureExperts) for module in changed.modules())
    assert close(result(changed, inputs), expected)
    for place, one in enumerate((kept, changed)):
        one.save_pretrained(tmp_path / str(place))
        for again in (
            load_mpoe(tmp_path / str(place)),
            getattr(transformers, auto).from_pretrained(tmp_path / str(place)),
        ):
            assert type(again) is type(one)
            own, other = one.state_dict(), again.state_dict()
            assert list(own) == list(other)
            assert all(torch.equal(own[key], other[key]) for key in own)
            # The weights are elsewhere in memory, so PyTorch's short products may end in other bits.
            assert close(result(again, inputs), result(one, inputs), 1e-6)
    stock = merge_experts(changed, as_=model_type)
    assert type(stock) is type(model)
    assert close(result(stock, inputs), result(changed, inputs))
    assert close(result(merge_experts(changed), inputs), expected)
    assert torch.equal(result(merge_experts(kept, as_=model_type), inputs), expected)


def test_the_error_of_every_layer_and_expert_is_told(capsys):
    torch.manual_seed(0)
    model = alike(tiny_model("olmoe", "OlmoeForCausalLM"), relative=0.02)
    with pytest.warns(UserWarning, match=r"differ from the model's own by [\d.]+% to [\d.]+% of their norm"):
        changed = convert_to_mpoe(model, MPOEConfig(existing_experts="mpo", layers_to_transform=[1]))
    names = [f"model.layers.1.mlp.experts.{kind}" for kind in ("down", "gate_proj", "up")]
    assert sorted(changed.conversion_report) == names
    stock, mine = model.model.layers[1].mlp.experts, changed.model.layers[1].mlp.experts
    gate, up = stock.gate_up_proj.chunk(2, 1)
    for kind, weights in {"gate_proj": gate, "up": up, "down": stock.down_proj}.items():
        told = changed.conversion_report[f"model.layers.1.mlp.experts.{kind}"]
        off = (mine.projections()[kind].dense_weights() - weights.transpose(1, 2)).flatten(1).norm(dim=1)
        found = off / weights.flatten(1).norm(dim=1)
        torch.testing.assert_close(torch.tensor(told["expert_errors"]), found.detach(), rtol=1e-3, atol=1e-6)
        assert 0 < told["relative_error_bound"] < 0.2
    assert set(changed.config.conversion_errors) == set(names)
    assert isinstance(changed.model.layers[0].mlp.experts, type(stock))
    changed.mpoe_summary()
    shown = capsys.readouterr().out
    assert all(f"{error:.1e}" in shown for error in changed.config.conversion_errors.values())


@pytest.mark.filterwarnings("ignore:experts around one centre")
def test_trains_and_counts():
    model = tiny_model("mixtral", "MixtralForCausalLM", output_router_logits=True, router_aux_loss_coef=0.5)
    dense = sum(p.numel() for p in model.parameters())
    changed = convert_to_mpoe(model, MPOEConfig(existing_experts="mpo"))
    kept = convert_to_mpoe(model)
    for one in (changed, kept):
        report = one.parameter_report()
        assert report["dense_total"] == report["switch_total"] == dense
        assert report["total"] == sum(p.numel() for p in one.parameters())
    assert kept.parameter_report()["expert"] > 0
    inputs = tiny_batch(model, "mixtral")
    output = changed(**inputs, labels=inputs["input_ids"])
    assert changed.config.router_aux_loss_coef == 0.5
    output.loss.backward()
    assert output.aux_loss > 0
    assert all(p.grad is not None for p in changed.parameters())


@pytest.mark.filterwarnings("ignore:experts around one centre")
def test_plans_name_what_is_there():
    model = tiny_model("mixtral", "MixtralForCausalLM")
    kept, changed = convert_to_mpoe(model), convert_to_mpoe(model, MPOEConfig(existing_experts="mpo"))
    assert kept.tp_plan == model.tp_plan
    assert [key for key in kept.tp_plan if key.endswith("experts.gate_up_proj")]
    assert not [key for key in changed.tp_plan if "experts" in key]
    assert [key for key in changed.tp_plan if key.endswith("q_proj")]
    assert not changed._ep_plan


def test_attention_of_a_mixture_becomes_mpos():
    model = tiny_model("olmoe", "OlmoeForCausalLM")
    inputs = tiny_batch(model, "olmoe")
    changed = convert_to_mpoe(model, MPOEConfig(target_modules=["ffn", "attention"]))
    assert any(isinstance(module, MPOLinear) for module in changed.modules())
    assert close(result(changed, inputs), result(model, inputs))
    refuses(ValueError, "only the feed-forward networks may be in MPO form", merge_experts, changed, as_="olmoe")


def test_an_adapted_olmoe_is_exported(tmp_path, monkeypatch, capsys):
    class Tokenizer:
        def save_pretrained(self, folder):
            """Saves nothing: the tiny model has no tokenizer."""

    monkeypatch.setattr("mpoe.cli.models.load_tokenizer", lambda source: Tokenizer())
    model = tiny_model("olmoe", "OlmoeForCausalLM")
    inputs = tiny_batch(model, "olmoe")
    convert_to_mpoe(model).save_pretrained(tmp_path / "kept")
    command.command([str(tmp_path / "kept"), str(tmp_path / "out"), "--to", "olmoe"])
    assert "a OlmoeForCausalLM whose logits differ by 0.0e+00" in capsys.readouterr().out
    assert torch.equal(
        result(transformers.OlmoeForCausalLM.from_pretrained(tmp_path / "out"), inputs), result(model, inputs)
    )


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_experts": 3}, "num_experts must be left out for MixtralForCausalLM, which has 4 experts"),
        ({"moe_type": "none"}, "moe_type must be left out"),
        ({"expert_type": "dense"}, "expert_type must be left out"),
        ({"router": RouterConfig(top_k=2)}, "router must be left out"),
        ({"existing_experts": "mpo", "shape": "hidden"}, "shape 'hidden' needs one dense projection for all experts"),
        (
            {"existing_experts": "mpo", "shape_pattern": {"layers.0.mlp.experts": "hidden"}},
            "shape 'hidden' needs one dense projection for all experts",
        ),
        ({"existing_experts": "mpo", "separable_left": 7}, r"experts\.up: .*7"),
        ({"existing_experts": "mpo", "layers_to_transform": [2]}, r"layer indices 0\.\.1; got 2"),
    ],
)
def test_settings_that_do_not_fit_a_mixture(values, words):
    refuses(ValueError, words, convert_to_mpoe, tiny_model("mixtral", "MixtralForCausalLM"), MPOEConfig(**values))


def test_what_does_not_fit_is_refused(tmp_path):
    saved = tmp_path / "config.json"
    tiny_model("mixtral", "MixtralForCausalLM").config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="existing_experts must be one of 'keep', 'mpo'; got 'drop'"):
        MPOEConfig(existing_experts="drop")
    planned = (str(saved), read_values(str(saved)), MPOEConfig())
    refuses(ValueError, "must be a dense model to be planned; mixtral is a mixture already", build, *planned)
    with pytest.raises(ValueError, match="LlamaForCausalLM has no experts"):
        convert_to_mpoe(tiny_model("llama", "LlamaForCausalLM"), MPOEConfig(existing_experts="mpo"))
    dense = tiny_model("qwen3_moe", "Qwen3MoeForCausalLM", mlp_only_layers=[0, 1])
    refuses(ValueError, "Qwen3MoeForCausalLM must have layers with experts; this one has none", convert_to_mpoe, dense)
    kept = convert_to_mpoe(tiny_model("mixtral", "MixtralForCausalLM"))
    refuses(ValueError, r"must have MPO experts; got .* existing_experts='keep'", merge_experts, kept)
    refuses(ValueError, "olmoe: this is a mixtral already, and stays one", merge_experts, kept, as_="olmoe")
    refuses(ValueError, "as_ must be one of 'mixtral'; got 'gpt2'", merge_experts, kept, as_="gpt2")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda e: e.register_parameter("bias", nn.Parameter(torch.zeros(1))), "they also hold bias"),
        (lambda e: setattr(e, "is_concatenated", False), r"in another way than act\(gate\) \* up"),
        (
            lambda e: setattr(e, "down_proj", nn.Parameter(e.down_proj.mT.clone())),
            r"must be \[E, 2F, I\] beside down_proj",
        ),
    ],
)
def test_experts_of_another_kind_are_refused(change, words):
    model = tiny_model("mixtral", "MixtralForCausalLM")
    change(model.model.layers[0].mlp.experts)
    refuses(ValueError, words, convert_to_mpoe, model, MPOEConfig(existing_experts="mpo"))


# ------------------------------------------------------------------ fine-tunes in one mixture


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


def outputs(model, inputs):
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
        torch.testing.assert_close(outputs(sent, inputs), outputs(fine_tune, inputs), rtol=1e-4, atol=1e-5)


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
    layer = dict(mpoe.models.domains.routed_layers(mixture))["model.layers.0.mlp"]
    for domain in range(2):
        hook = layer.register_forward_pre_hook(lambda _, args, own=rows[domain]: own.append(args[0].flatten(0, -2)))
        for each in batches(domain):
            mixture(**each)
        hook.remove()
    x = [torch.cat(own).double() for own in rows]
    known = mixture.router_statistics
    for kind, own in (("outer", sum(a.mT @ a / len(a) for a in x)), ("mean", torch.stack([a.mean(0) for a in x]))):
        torch.testing.assert_close(known[f"model.layers.0.mlp.{kind}"], own, rtol=1e-5, atol=1e-6)


def test_a_mask_of_other_tokens_hides_none():
    """A decoder with more tokens than its encoder: the mask is the encoder's."""
    base = dense("t5").eval()
    ids = [{"input_ids": torch.full((2, 3), d + 2), "labels": torch.full((2, 5), d + 2)} for d in range(2)]
    examples = [[{**each, "attention_mask": torch.ones(2, 3)}] for each in ids]
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


def test_fine_tunes_that_do_not_fit():
    base = dense("llama")
    other = dense("gpt2")
    refuses(ValueError, "at least one model", compose, base, [])
    refuses(ValueError, "class of base", compose, base, [other])
    longer = copy.deepcopy(base)
    longer.resize_token_embeddings(70)
    refuses(ValueError, r"number 0 differs in .*70", compose, base, [longer])
    refuses(TypeError, "routing must be a RouterConfig; got MPOEConfig", compose, base, [base], None, MPOEConfig())
    refuses(ValueError, "router must be one of 'ridge', 'train'", compose, base, [base], router="rigde")
    refuses(ValueError, "steps must be at least 1; got 0", compose, base, [base], steps=0)
    refuses(ValueError, "ridge must be a positive number", compose, base, [base], ridge=0.0)
    refuses(ValueError, "each of 1 fine-tunes; got 2", compose, base, [base], [batches(0), batches(1)])
    refuses(ValueError, "those of number 0 hold none", compose, base, [base], [[]])


def test_what_cannot_join_is_refused():
    base = dense("llama")
    mixture = compose(base, [base])
    refuses(TypeError, "mixture must be an MPOE model", add_expert, base, base, base)
    refuses(ValueError, "class that mixture was", add_expert, mixture, dense("gpt2"), dense("gpt2"))
    with pytest.raises(ValueError, match="mixture must have a router and dense experts"):
        add_expert(convert_to_mpoe(base, MPOEConfig(num_experts=2)), base, base)
    refuses(ValueError, "must carry router_statistics", add_expert, mixture, base, base, batches(0))
