"""`mpoe inspect`: a report that stands alone, and its numbers; spectra, routes and totals in it;
refusals."""

import math
import os
import re

import pytest
import torch

from mpoe import MPOEConfig, convert_to_mpoe
from mpoe.cli import inspect
from mpoe.data.stand_in_models import load_stand_in
from mpoe.inspection import bond_spectra, route_text
from mpoe.layers.cores import MPOCores
from mpoe.models.walk import routed_layers
from mpoe_kernels import MPOShape
from tests.assertions import read_json, refuses


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders t5, gpt2 (paper shapes) and dense (experts) of converted stand-ins."""
    root = tmp_path_factory.mktemp("models")
    for name, kind, values in (
        ("t5", "t5", {"shape": "separable"}),
        (
            "gpt2",
            "gpt2",
            {"shape": "paper", "target_modules": ["ffn", "attention"], "router": {"top_k": 2}},
        ),
        ("dense", "gpt2", {"expert_type": "dense"}),
        ("none", "gpt2", {"moe_type": "none"}),
    ):
        dense, tokenizer = load_stand_in(kind)
        convert_to_mpoe(dense, MPOEConfig(num_experts=3, **values)).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


def page(folder):
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert not re.search(r'(src|href)="(?!data:)', text), (
        "the report must need nothing beside itself"
    )
    assert text.count("<table") == text.count("</table>")
    return text


@pytest.mark.usefixtures("drawn")
def test_report_of_a_t5(cli, models, sentiment, tmp_path):
    out, run = tmp_path / "out", models / "t5"
    cli(f"inspect {run} --data_dir {sentiment} --output_dir {out} --text 'the film is <good>'")
    text = page(out)
    assert set(os.listdir(out)) == {"report.html", "inspect.json"}
    assert text.count("data:image/png;base64,iVBOR") == 2  # load, bonds
    assert "the film is &lt;good&gt;" in text
    numbers = read_json(out / "inspect.json")
    (followed,) = numbers["routes"]
    assert [stream["stream"] for stream in followed["streams"]] == ["encoder", "decoder"]
    cells = re.findall(
        r'<td style="background:#\w{6}" title="expert (\d): p = [\d.]+">\1</td>', text
    )
    assert len(cells) == sum(len(s["tokens"]) * len(s["layers"]) for s in followed["streams"])
    # 8 items of the split; every token of every layer is counted once
    assert len({sum(layer) for layer in numbers["expert_load"][:2]}) == 1
    assert sum(numbers["expert_load"][2]) < sum(numbers["expert_load"][0])
    assert set(numbers["bonds"]) == {"up", "down"}


@pytest.mark.slow
def test_other_mixtures(cli, models, prose, tmp_path):
    data = f"--data_dir {prose} --max_source_length 16"
    for name in ("gpt2", "dense", "none"):
        cli(f"inspect {models}/{name} {data} --output_dir {tmp_path}/{name}")
    numbers = read_json(tmp_path / "gpt2/inspect.json")
    assert len(numbers["routes"]) == 2  # the first items, where no text is given
    assert set(numbers["bonds"]) == {"up", "down", "c_attn", "c_proj"}
    assert re.search(r">[012]\+[012]</td>", page(tmp_path / "gpt2"))
    assert "What the bonds carry" not in page(tmp_path / "dense")
    assert "no routers" in page(tmp_path / "none")
    assert "Expert load" not in page(tmp_path / "none")


def test_help_and_refusals(cli, refused, models, tmp_path):
    assert "--output_dir" in cli("inspect").out
    out, t5 = f"--output_dir {tmp_path}/out", models / "t5"
    (tmp_path / "old").mkdir()
    (tmp_path / "old/report.html").write_text("mine")
    for flags, message in (
        ("--text x", "inspect needs a model first"),
        (f"t5 {out}", "t5 is a dense t5; inspect looks into mixtures: mpoe convert t5 OUT"),
        (f"{t5} --text ' '", "text must hold words; got an empty one"),
        (
            f"{t5} --texts a.txt",
            f"made of experts of a decoder; {t5} is of the family mpoe_t5, not composed",
        ),
        (f"{t5} --num_items 0", "num_items must be at least 1; got 0"),
        (f"{t5} --output_dir {t5}", "holds a model or a run; choose another folder"),
        (f"{t5} --output_dir {tmp_path}/old", "holds an earlier report; give --overwrite"),
    ):
        assert message in refused(f"inspect {flags}")
    assert (tmp_path / "old/report.html").read_text() == "mine"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("most, shares", [(1, [1]), (4, [2, 1, 1]), (8, [3, 3, 2])])
def test_every_task_gives_as_many_items_or_one_more(most, shares, monkeypatch):
    asked = []

    def encode(task, split, tokenizer, share, style):
        asked.append(share)
        return [task] * share

    monkeypatch.setattr(inspect, "encode_task", encode)
    subject = inspect.Subject("run", "causal", None, None, False)
    assert len(inspect._items(subject, "test", most, ["a", "b", "c"][:most])) == most
    assert asked == shares


def test_a_runs_load_is_counted_on_its_own_data(cli, prose, tmp_path):
    run, out = tmp_path / "run", tmp_path / "out"
    flags = f"--data_dir {prose} --max_source_length 16 --num_experts 2 --max_steps 1 --use_cpu"
    cli(f"train --model gpt2 {flags} --learning_rate 0.001 --output_dir {run}")
    cli(f"inspect {run} --output_dir {out}")
    numbers = read_json(out / "inspect.json")
    assert numbers["counted_on"].endswith("validation items of prose")
    blocks = int(numbers["counted_on"].split()[0])
    assert {sum(layer) for layer in numbers["expert_load"]} == {
        blocks * 16 * 2
    }  # top-2 of 16 tokens a block
    assert numbers["counted_on"] in page(out)


SHAPES = {
    "paper": MPOShape((2, 3, 2), (3, 2, 2)),
    "separable": MPOShape.separable(12, 20, left=4, right=5),
    "truncated": MPOShape((2, 3, 2, 2), (3, 2, 2, 2), max_bond=3, central=1),
    "padded": MPOShape((2, 3, 3), (3, 2, 3), in_features=13, out_features=17),
    "one_bond": MPOShape((3, 4), (4, 5)),
}


def unfolding(weight, shape, bond):
    """The matrix ``[i_1 j_1 .. i_k j_k, the rest]`` of a weight, by plain reshapes."""
    n = shape.num_cores
    tensor = weight.reshape(*shape.in_factors, *shape.out_factors)
    tensor = tensor.permute([axis for k in range(n) for axis in (k, n + k)])
    return tensor.reshape(
        math.prod(shape.in_factors[:bond]) * math.prod(shape.out_factors[:bond]), -1
    )


def full_weights(cores):
    """``[E, padded I, padded F]``, of the chain itself: values in the padding count too."""
    shape = cores.shape
    whole = MPOShape(
        shape.in_factors, shape.out_factors, max_bond=shape.max_bond, central=shape.central
    )
    padded = MPOCores(whole, cores.num_experts, dtype=torch.float64)
    padded.load_state_dict({n: p for n, p in cores.state_dict().items() if n != "bias"})
    return padded.dense_weights().detach()


@pytest.mark.parametrize("name", SHAPES)
def test_spectra_are_singular_values_of_the_unfoldings(name):
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
            torch.testing.assert_close(
                found, expected[: len(found)], rtol=1e-6, atol=1e-6 * float(expected[0])
            )


def test_entropy_counts_the_directions_in_use():
    cores = MPOCores(MPOShape((4, 4), (4, 4), central=0), 1, dtype=torch.float64)
    left, right = torch.linalg.qr(torch.randn(2, 16, 16, dtype=torch.float64))[0]
    tensor = torch.einsum(
        "pk,qk->pq", left[:, :5], right[:, :5]
    )  # 5 equal singular values across the bond
    cores.load_weight_(tensor.reshape(4, 4, 4, 4).permute(0, 2, 1, 3).reshape(16, 16))
    (bond,) = bond_spectra(cores)
    assert bond.effective_rank.item() == pytest.approx(5)
    assert bond.used == pytest.approx(5 / 16)
    cores.load_weight_(torch.zeros(16, 16, dtype=torch.float64))
    assert bond_spectra(cores)[0].entropy.item() == 0.0
    assert (
        bond_spectra(MPOCores(MPOShape((12,), (8,)), 2)) == []
    )  # a chain of one core has no bonds


@pytest.mark.parametrize("kind, top_k", [("t5", 1), ("gpt2", 2)])
def test_routes_are_the_routers_choices(kind, top_k):
    dense, tokenizer = load_stand_in(kind)
    router = {"top_k": top_k, "bias_update_rate": 0.01}
    model = convert_to_mpoe(dense, MPOEConfig(num_experts=4, router=router, shape="separable"))
    for _, layer in routed_layers(model) if top_k == 1 else ():
        layer.router.e_score_correction_bias[2] = 0.5
    text = "return the number of items in the list."
    routes = route_text(model, tokenizer, text, max_new_tokens=5)
    layers = routed_layers(model)
    assert [route.stream for route in routes] == (
        ["encoder", "decoder"] if kind == "t5" else ["main"]
    )
    assert [name for route in routes for name in route.layers] == [name for name, _ in layers]
    seen = {}
    for name, layer in layers:
        layer.router.register_forward_hook(
            lambda _m, _i, out, name=name: seen.update({name: out.top_k_index})
        )
    first = routes[0]
    assert "".join(first.tokens).replace("</s>", "").strip() == text
    extra = {"decoder_input_ids": torch.zeros(1, 1, dtype=torch.long)} if kind == "t5" else {}
    with torch.no_grad():
        model(input_ids=tokenizer([text], return_tensors="pt").input_ids, **extra)
    for name, experts, probabilities in zip(
        first.layers, first.experts, first.probabilities, strict=True
    ):
        assert experts == seen[name].tolist()
        assert all(
            len(p) == top_k and p == sorted(p, reverse=True) and 0 < sum(p) <= 1 + 1e-6
            for p in probabilities
        )
    refuses(
        ValueError,
        "text must hold at least one token; got ''",
        route_text,
        model,
        load_stand_in("gpt2")[1],
        "",
    )
