"""What a server knows of its mixture, without vLLM: which files may join, and what workers copy."""

import json
import shutil

import pytest
import safetensors.torch
import torch

from mpoe import collect_statistics, compose_experts, load_expert, save_expert, start_expert
from mpoe.models.expert_mixture import keep_experts
from mpoe.models.walk import neuron_modules
from mpoe_vllm.mixture import ExpertSet, Refused, ServedMixture, options_of
from tests.assertions import refuses
from tests.models.tiny_models import domain, language_model, tokenizer


def saved(model, number, file):
    """An expert of random neurons with the statistics of a domain."""
    torch.manual_seed(number)
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    save_expert(
        model,
        file,
        statistics=collect_statistics(model, domain(number % 3, number)),
        tokenizer=tokenizer(),
    )


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A composed folder of two experts, and a folder of files with a third one and bad ones."""
    place = tmp_path_factory.mktemp("served")
    files = place / "files"
    files.mkdir()
    base = language_model()
    for number, name in enumerate(("law", "med", "late")):
        saved(start_expert(base, 8), number, files / f"{name}.expert")
    saved(start_expert(base, 9), 3, files / "large.expert")
    other = language_model()
    other.lm_head.weight.data += 1
    saved(start_expert(other, 8), 4, files / "other.expert")
    save_expert(start_expert(base, 8), files / "bare.expert", tokenizer=tokenizer())
    (files / "bad.expert").write_bytes((files / "law.expert").read_bytes()[:-9])
    (place / "outside.expert").write_bytes((files / "late.expert").read_bytes())
    (files / "link.expert").symlink_to(place / "outside.expert")
    shutil.copy(files / "law.expert", files / "twin.expert")
    mixture = composed(base, files, ("law", "med"))
    mixture.save_pretrained(place / "mixture")
    keep_experts(mixture, place / "mixture")
    return place, base


def composed(base, files, names):
    paths = [files / f"{name}.expert" for name in names]
    return compose_experts(base, paths, background=domain(2, 9), tokenizer=tokenizer())


def expert_set(served, **options):
    place, _ = served
    values = json.loads((place / "mixture/config.json").read_text())
    given = {"mpoe": {"slots": 4, "folder": str(place / "files"), **options}}
    return ExpertSet(place / "mixture", values, given)


def test_a_set_with_one_expert_more_has_the_routers_of_that_composition(served):
    place, base = served
    experts = expert_set(served)
    after = experts.with_file("late.expert")
    changes = safetensors.torch.load(experts.changes(after))
    assert changes["occupied"].tolist() == [True, True, True, False, True]
    assert changes["slots"].tolist() == [2]
    late = load_expert(place / "files/late.expert")
    wanted = composed(base, place / "files", ("law", "med", "late"))
    for name, layer in neuron_modules(wanted).items():
        router = changes[f"{name}.router"]
        assert torch.equal(router[[0, 1, 2, 4]], layer.router.weight), name
        assert not router[3].any(), name
        assert torch.equal(changes[f"{name}.down.2"], late.weights[f"{name}.down"]), name


def test_after_a_removal_everything_is_as_before(served):
    experts = expert_set(served)
    before = safetensors.torch.load(experts.changes(experts.by_slot))
    experts.by_slot = experts.with_file("late.expert")
    experts.by_slot = experts.without("late")
    after = safetensors.torch.load(experts.changes(experts.by_slot))
    assert set(before) == set(after)
    for name, value in before.items():
        assert torch.equal(value, after[name]), name


def test_a_freed_slot_is_taken_again_and_the_last_expert_may_go(served):
    experts = expert_set(served)
    experts.by_slot = experts.without("law")
    experts.by_slot = experts.with_file("late.expert")
    assert {slot: expert.name for slot, expert in experts.by_slot.items()} == {1: "med", 0: "late"}
    for name in ("med", "late"):
        experts.by_slot = experts.without(name)
    changes = safetensors.torch.load(experts.changes(experts.by_slot))
    assert changes["occupied"].tolist() == [False] * 4 + [True]
    assert experts.shown()["experts"] == []


@pytest.mark.parametrize(
    "path, status, message",
    [
        ("absent.expert", 404, "no 'absent.expert' there"),
        ("../outside.expert", 403, "in the server's folder"),
        ("link.expert", 403, "in the server's folder"),
        ("bad.expert", 400, "bad.expert must be a whole safetensors file"),
        ("other.expert", 400, "must be of this server's base"),
        ("large.expert", 400, "at most 8 neurons"),
        ("bare.expert", 400, "must hold statistics"),
        ("law.expert", 409, "'law' is there already"),
        ("twin.expert", 409, "'twin' is there already, as 'law'"),
    ],
)
def test_refused_files(served, path, status, message):
    experts = expert_set(served)
    with pytest.raises(Refused, match=message) as refused:
        experts.with_file(path)
    assert refused.value.status == status


def test_no_slot_and_no_such_expert(served):
    experts = expert_set(served, slots=2)
    with pytest.raises(Refused, match="all 2 slots are taken") as refused:
        experts.with_file("late.expert")
    assert refused.value.status == 409
    with pytest.raises(Refused, match="no expert 'late'") as refused:
        experts.without("late")
    assert refused.value.status == 404


def test_options_and_sizes(served):
    place, _ = served
    values = json.loads((place / "mixture/config.json").read_text())
    unknown = {"mpoe": {"slot": 1}}
    refuses(ValueError, "may hold slots, neurons, folder; got 'slot'", options_of, unknown)
    refuses(TypeError, "must be a mapping", options_of, {"mpoe": 8})
    few = {"mpoe": {"slots": 1}}
    refuses(ValueError, "slots must be at least the model's 2", ServedMixture.of, values, few)
    other = {**values, "mpoe_experts": None}
    refuses(ValueError, "must be a mixture of experts' files", ServedMixture.of, other, {})
    refuses(ValueError, "must be the folder", expert_set, served, folder=str(place / "absent"))
    sizes = ServedMixture.of(values, {"mpoe": {"slots": 12, "neurons": 16}})
    assert (sizes.slots, sizes.neurons, sizes.top_k, sizes.rows()) == (12, 16, 8, [0, 1, 12])
    assert ServedMixture.of(values, {}).top_k == 3
