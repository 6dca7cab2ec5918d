"""`mpoe compose`: fine-tunes, adapters or experts' files into one mixture, an expert more or fewer,
and refusals."""

import contextlib
import copy
import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from mpoe import (
    collect_statistics,
    compose_experts,
    convert_to_mpoe,
    load_expert,
    load_mpoe,
    merge_expert,
    save_expert,
    start_expert,
)
from mpoe.cli import compose as command
from mpoe.cli.errors import CommandError
from mpoe.cli.quiet import made_background
from mpoe.data.stand_in_models import load_stand_in, stand_in_path
from mpoe.models.background import save_background
from mpoe.models.expert_files import base_identity, vocabulary_identity, write_expert
from mpoe.models.expert_mixture import experts_in, keep_experts
from mpoe.training import read_metrics
from tests.assertions import read_json, refuses

from ..models.tiny_models import fit
from .cli_data import make_expert, run
from .cli_data import same_weights as same

BASE = str(stand_in_path("gpt2"))
SMALL = "--max_texts 4 --max_length 16"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of the tiny GPT-2 two fine-tunes with their texts, and three experts; a text of no domain;
    what does not fit."""
    out = tmp_path_factory.mktemp("compose")
    base, _ = load_stand_in("gpt2")
    for number in range(2):
        model = copy.deepcopy(base)
        torch.manual_seed(number)
        for name, p in model.named_parameters():
            if ".mlp." in name:
                p.data += 0.02 * torch.randn_like(p)
        model.save_pretrained(out / f"ft{number}")
    for number, text in enumerate(
        ("ship sea sail wave ", "list tuple dict set ", "rain snow wind sun ")
    ):
        (out / f"t{number}.txt").write_text(text * 60)
    for number, name in enumerate(("law", "med", "code")):
        torch.manual_seed(number)
        make_expert(out / f"{name}.expert", 100 * number, 8 + number)
    (out / "none.txt").write_text("ship sea sail wave " * 60)
    (out / "bad").mkdir()
    (out / "bad.txt").write_bytes(b"\xff\xfe\xfa")
    (out / "short.txt").write_text("word")
    (out / "cut").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (out / "cut" / name).write_text("{")
    (out / "odd").mkdir()
    (out / "odd/adapter_config.json").write_text(
        '{"peft_type": "LORA", "target_modules": ["nothing"], "r": 2}'
    )
    return out


@pytest.fixture(scope="module")
def adapter(folder):
    """A LoRA adapter of the tiny GPT-2."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2, target_modules=["c_fc"], init_lora_weights=False, fan_in_fan_out=True
    )
    peft.get_peft_model(load_stand_in("gpt2")[0], config).save_pretrained(folder / "ft2")
    return str(folder / "ft2")


def compose(folder, line):
    """`mpoe compose` of the tiny GPT-2, in the folder."""
    with contextlib.chdir(folder):
        run(f"compose {BASE} {line}")


def test_two_fine_tunes_and_an_adapter(folder, adapter):
    texts = f"--texts t0.txt t1.txt t2.txt {SMALL}"
    compose(folder, f"ft0 ft1 {adapter} --output_dir triple {texts}")
    three = load_mpoe(folder / "triple")
    assert three.mpoe_config.num_experts == 3
    base, _ = load_stand_in("gpt2")
    merged = command.load_fine_tune(adapter, base)
    experts = three.transformer.h[0].mlp.experts.up.weight
    first = AutoModelForCausalLM.from_pretrained(folder / "ft0")
    assert torch.equal(experts[0], first.transformer.h[0].mlp.c_fc.weight)
    assert torch.equal(experts[2], merged.transformer.h[0].mlp.c_fc.weight)
    assert not torch.equal(experts[2], base.transformer.h[0].mlp.c_fc.weight)


def test_a_trained_router(folder):
    options = f"--texts t0.txt t1.txt --router train --steps 1 --top_k 2 {SMALL}"
    compose(folder, f"ft0 ft1 --output_dir trained_pair {options}")
    config = load_mpoe(folder / "trained_pair").mpoe_config
    assert (config.expert_type, config.router.top_k) == ("dense", 2)


def test_a_base_of_few_positions(folder, monkeypatch):
    base, read = load_stand_in("gpt2")[0], command.read_batches
    base.config.n_positions = 64
    same_length = lambda *given: read(*given) if given[2] == 64 else pytest.fail(str(given))  # noqa: E731
    monkeypatch.setattr(command, "read_batches", same_length)
    monkeypatch.setattr(command.models, "load_model", lambda source: base)
    compose(folder, "law.expert --output_dir few --background none.txt --max_texts 4")


def test_an_adapter_without_peft(adapter, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    refuses(CommandError, "needs PEFT", command.load_fine_tune, adapter, None)


def test_one_more_and_one_fewer(folder, capsys):
    text = f"--background none.txt {SMALL}"
    compose(folder, f"law.expert med.expert --output_dir two {text}")
    assert "law, med, none" in capsys.readouterr().out
    compose(folder, "code.expert --add two --output_dir three")
    compose(folder, f"law.expert med.expert code.expert --output_dir at_once {text}")
    assert same(folder / "three", folder / "at_once")
    compose(folder, "--add three --remove code --output_dir again")
    assert same(folder / "two", folder / "again")
    assert not same(folder / "two", folder / "three")
    three = load_mpoe(folder / "three")
    assert three.config.mpoe_experts == ["law", "med", "code", "none"]
    assert (three.mpoe_config.num_experts, three.mpoe_config.neurons, three.mpoe_config.top_k) == (
        4,
        10,
        4,
    )
    assert [expert.name for expert in experts_in(folder / "three")[0]] == ["law", "med", "code"]


def test_the_background_beside_an_expert_is_taken(folder, capsys):
    base, tokenizer = load_stand_in("gpt2")
    beside = folder / "beside"
    beside.mkdir()
    shutil.copy(folder / "law.expert", beside)
    background = made_background(base, tokenizer, beside)
    compose(folder, "beside/law.expert --output_dir with_it")
    printed = capsys.readouterr().out
    assert printed.count("sampling") == 1, "the background was made again"
    assert "What the base itself says" in printed
    _, of_mixture = experts_in(folder / "with_it")
    assert all(torch.equal(value, of_mixture[name]) for name, value in background.items())
    changed = copy.deepcopy(base)
    changed.transformer.h[0].mlp.c_fc.weight.data += 1
    save_background(background, changed, beside / "background.safetensors")
    compose(folder, "beside/law.expert --output_dir not_it")
    printed = capsys.readouterr().out
    assert "not used: background must be of this base" in printed
    assert "sampling" in printed
    compose(folder, "--add with_it --preference 5 --request_weight 0.5 --output_dir quieter")
    quieter = load_mpoe(folder / "quieter")
    assert quieter.config.mpoe_routing["preference"] == 5
    compose(folder, "--add quieter --output_dir as_quiet")
    for mixture in (quieter, load_mpoe(folder / "as_quiet")):
        assert mixture.mpoe_config.router.request_weight == 0.5
    assert not same(folder / "with_it", folder / "quieter")


@pytest.mark.parametrize(
    "line, message",
    [
        ("", "at least one expert"),
        (f"{BASE} --texts t0.txt", "compose needs --output_dir"),
        (f"{BASE} --output_dir x --max_length 1", "max_length must be at least 2"),
        (f"{BASE} --output_dir x", "texts must name a file for each of 1 fine-tunes; got 0"),
        (f"{BASE} --output_dir x --texts none", "texts: no such file"),
        (f"{BASE} --output_dir ft0 --texts t0.txt", "holds a model; give --overwrite"),
        ("./ft9 --output_dir x --texts t0.txt", "no such folder"),
        (f"{BASE} --output_dir x --texts bad.txt", "texts: .*expected UTF-8 text"),
        (
            f"{BASE} --output_dir x --texts short.txt",
            "short.txt: texts must give at least one block of block_size=128",
        ),
        ("odd --output_dir x --texts t0.txt", "does not fit the base"),
        ("law.expert --texts none.txt none.txt", "texts must name a file for each of 1 experts"),
        ("law.expert --router train", "router train needs --texts for every expert"),
        ("law.expert --router best", "argument --router: invalid choice: 'best'"),
        ("law.expert --merge --top_k 2", "merge makes one network without routers: no top_k"),
        ("law.expert --merge --texts t0.txt", "or texts but of adapters"),
        ("law.expert --texts t0.txt --output_dir x --max_length 512", "at most 256, the"),
        ("cut --neurons 4 --output_dir x --texts t0.txt", "line 1, column 2: bad JSON"),
        (
            "law.expert --neurons 8",
            "neurons must be at least 1, of experts fitted to adapters; got 8",
        ),
        ("law.expert --steps 0", "steps must be at least 1; got 0"),
        ("law.expert --output_dir x --top_k 0", "top_k must be at least 1; got 0"),
        ("law.expert --output_dir ''", "compose needs --output_dir"),
        ("law.expert absent.expert", "absent.expert: no file"),
        ("law.expert bad", "either fine-tunes or experts' files"),
        ("law.expert --remove law", "remove needs --add MIXTURE"),
        ("law.expert --background absent.txt --output_dir x", "background: no such file"),
        ("law.expert --add bad --output_dir x", "a mixture that was composed of experts"),
        ("law.expert law.expert --output_dir x", "'law' is there twice"),
        ("bad --preference 1", "add, remove, merge, background, preference and request_weight are"),
        (
            "bad --background none.txt",
            "add, remove, merge, background, preference and request_weight are",
        ),
    ],
)
def test_refused(folder, line, message):
    refuses(ValueError, message, compose, folder, line)
    assert not (folder / "x/config.json").exists()


def test_names_that_are_refused(folder, adapter):
    for name in ("t5", f"{adapter} --neurons 8"):
        line = f"compose t5 {name} --output_dir {folder}/x --texts {folder}/t0.txt"
        refuses(CommandError, "of others a causal language model", run, line)
    compose(folder, f"law.expert --output_dir one --background none.txt {SMALL}")
    message = "remove must name experts of the mixture, law; got med"
    refuses(CommandError, message, compose, folder, "--add one --remove med --output_dir x")
    message = "takes the dense model that the experts were trained beside"
    refuses(CommandError, message, run, f"compose {folder}/one {folder}/law.expert --output_dir x")
    (folder / "other").mkdir()
    make_expert(folder / "other/law.expert")
    refuses(
        ValueError,
        "must have names of their own",
        compose,
        folder,
        "law.expert other/law.expert --output_dir x",
    )


def test_refused_before_adapters_are_fitted_and_the_base_is_sampled(folder, adapter, monkeypatch):
    monkeypatch.setattr(command.lora_fit, "fit_adapter", lambda *_, **__: pytest.fail("fitted"))
    monkeypatch.setattr(command, "background_batches", lambda *_: pytest.fail("asked"))
    make_expert(folder / "foreign.expert", changed=1)
    for names in (
        "foreign.expert",
        f"{adapter} foreign.expert",
        f"{adapter} foreign.expert --merge",
    ):
        message = "'foreign' must be of this base"
        refuses(ValueError, message, compose, folder, f"{names} --output_dir x")
    names = f"{adapter} cut law.expert"
    refuses(ValueError, "bad JSON", compose, folder, f"{names} --output_dir x")
    shutil.copytree(adapter, folder / "again/ft2")
    message = "must have names of their own, not 'none'; got 'ft2'"
    refuses(ValueError, message, compose, folder, f"{adapter} again/ft2 --output_dir x")


def test_an_expert_fewer_with_the_sharpness_of_the_mixture(folder):
    base, tokenizer = load_stand_in("gpt2")
    files = [folder / f"{name}.expert" for name in ("law", "med")]
    mixture = compose_experts(base, files, tokenizer=tokenizer, sharpness=3.0, preference=1.0)
    mixture.save_pretrained(folder / "sharp")
    keep_experts(mixture, folder / "sharp")
    compose(folder, "--add sharp --remove med --output_dir sharp_law")
    background = mixture.background_statistics
    one = compose_experts(base, files[:1], background=background, sharpness=3.0, preference=1.0)
    one.save_pretrained(folder / "sharp_one")
    assert same(folder / "sharp_law", folder / "sharp_one")
    assert load_mpoe(folder / "sharp_law").config.mpoe_routing == one.config.mpoe_routing


def test_texts_a_trained_router_and_one_network(folder, capsys):
    files, texts = "law.expert med.expert", "--texts none.txt none.txt"
    compose(folder, f"{files} --output_dir refined {texts} {SMALL}")
    compose(folder, f"{files} --output_dir trained {texts} {SMALL} --router train --steps 2")
    compose(folder, f"{files} --output_dir plain")
    assert not same(folder / "refined", folder / "plain")
    assert not same(folder / "refined", folder / "trained")
    capsys.readouterr()
    (folder / "plain/mine.safetensors").touch()
    merged = "--output_dir plain --merge --overwrite"
    refuses(
        CommandError,
        "plain holds mine.safetensors, which mpoe did not write",
        compose,
        folder,
        f"{files} {merged}",
    )
    (folder / "plain/mine.safetensors").unlink()
    compose(folder, f"{files} {merged}")
    assert "every expert at weight 1/2" in capsys.readouterr().out
    names = ("experts", "README.md", "modeling_mpoe.py")
    assert not [name for name in names if (folder / "plain" / name).exists()]
    merged = AutoModelForCausalLM.from_pretrained(folder / "plain")
    assert (type(merged).__name__, merged.config.n_inner) == ("GPT2LMHeadModel", 512 + 8 + 9)
    wanted = merge_expert(load_stand_in("gpt2")[0], [folder / f for f in files.split()], weight=0.5)
    assert_close(merged.state_dict(), wanted.state_dict())


def test_what_a_file_expects_and_what_a_mixture_holds(folder, capsys):
    compose(folder, f"law.expert code.expert --output_dir listed --background none.txt {SMALL}")
    law, mixture = str(folder / "law.expert"), str(folder / "listed")
    capsys.readouterr()
    assert not run(f"info {law} {mixture} --json")
    told = json.loads(capsys.readouterr().out)
    assert [each["name"] for each in told[mixture]] == ["the mixture", "law", "code"]
    assert told[law] == told[mixture][1:2]
    whole = told[mixture][0]
    assert (whole["base"], whole["experts_per_token"]) == (told[law][0]["base"], 3)
    assert whole["experts"] == ["law", "code", "none"]
    assert whole["none"].startswith("adds nothing")
    assert whole["background"].startswith("background.safetensors")
    assert (told[law][0]["neurons"], told[law][0]["parameters"]) == (8, 4 * 8 * (2 * 128 + 1))
    assert not run(f"info {law}")
    assert told[law][0]["base"][:12] in capsys.readouterr().out
    refuses(CommandError, "info takes experts' files and mixtures", run, f"info {law} {folder}/bad")


def test_upload(folder, monkeypatch, capsys):
    asked = []

    def push(path, repository, private):
        asked.append((path, repository, private))
        return "https://hub/commit/1"

    monkeypatch.setattr("mpoe.cli.export.push_expert", push)
    assert not run(f"export {folder}/law.expert me/experts --to hub --private")
    assert asked == [(str(folder / "law.expert"), "me/experts", True)]
    assert "uploaded to https://hub/commit/1" in capsys.readouterr().out


def test_what_experts_are_worth(folder, tmp_path, capsys, monkeypatch):
    compose(folder, f"law.expert med.expert --output_dir seen --background none.txt {SMALL}")
    line = f"inspect {folder}/seen --output_dir {tmp_path}/out --num_items 2"
    for text in ("", "--text the --overwrite"):  # of one token nothing is predicted
        assert not run(f"{line} {text}")
        # of no domain, the default items tell nothing
        assert "give --texts FILE" in capsys.readouterr().out
    assert read_json(tmp_path / "out/inspect.json")["routes"][0]["text"] == "the"
    assert not run(f"{line} --overwrite --text 'Return the first item of the list.'")
    assert list(read_json(tmp_path / "out/inspect.json")["worth"]) == ["the sentences"]
    files = [f"{folder}/t0.txt", f"{folder}/t1.txt"]
    absent = f"{line} --overwrite --texts {files[0]} absent.txt"
    refuses(CommandError, "texts: no such file: absent.txt", run, absent)
    with monkeypatch.context() as patch:
        patch.setattr("mpoe.cli.models.tokenizer_if_any", lambda _: None)
        refuses(CommandError, "texts need a tokenizer; .*seen holds none", run, absent)
        assert not run(f"{line} --overwrite")
        assert "seen: reading bonds" in capsys.readouterr().out
    for option in ("tasks doc_lm", "n_val 2", "split test"):
        message = f"texts are all that is read; got {option.split()[0]} too"
        refuses(CommandError, message, run, absent, f"--{option}")
    twice = [files[0], files[0]]
    refuses(CommandError, "texts must be different files", run, line, "--overwrite --texts", *twice)
    assert not run(line, "--overwrite --texts", *files)
    numbers = read_json(tmp_path / "out/inspect.json")
    worth = numbers["worth"]
    assert list(worth) == files
    assert numbers["counted_on"] == f"3 items of {', '.join(files)}"
    first_layer = [sum(worth[file]["load"][0]) for file in files]
    assert sum(numbers["expert_load"][0]) == sum(first_layer)
    numbers = worth[files[0]]
    assert numbers["tokens"] == 2 * 127
    assert numbers["names"] == ["law", "med", "none"]
    assert numbers["oracle"] <= min(numbers["alone"])
    page = (tmp_path / "out/report.html").read_text()
    assert "What each expert is worth" in page
    assert "1 med</span>" in page
    said = capsys.readouterr().out
    assert "more than the oracle" in said
    assert f"{numbers['removed'][0] - numbers['loss']:+.3f}" in said


def test_an_adapter_as_an_expert(folder, tmp_path, capsys, monkeypatch):
    peft = pytest.importorskip("peft")
    base, tokenizer = load_stand_in("gpt2")
    adapter = peft.LoraConfig(r=2, target_modules=["mlp.c_fc", "mlp.c_proj"], fan_in_fan_out=True)
    model = peft.get_peft_model(base, adapter)
    (tmp_path / "sea.txt").write_text(
        "The sea was calm, and the ship went on its way to the islands. " * 40
    )
    ids = torch.tensor(tokenizer((tmp_path / "sea.txt").read_text())["input_ids"][:256]).view(4, 64)
    fit(model, [{"input_ids": ids, "labels": ids}] * 6)
    model.save_pretrained(tmp_path / "sea")
    texts = f"--texts {tmp_path}/sea.txt --max_texts 10 --max_length 16 --steps 50"
    run(f"compose {BASE} {tmp_path}/sea --neurons 64 --output_dir {tmp_path}/mix {texts}")
    assert "sea: 64 neurons keep" in capsys.readouterr().out
    assert load_mpoe(tmp_path / "mix").config.mpoe_experts == ["sea", "none"]
    (expert,) = experts_in(tmp_path / "mix")[0]
    assert expert.facts["training"]["kept"] >= 0.8
    monkeypatch.setattr("mpoe.models.lora_fit.SAMPLED", 16)
    line = f"compose {BASE} {tmp_path}/sea --output_dir {tmp_path}/x"
    message = "'sea' must keep 80% of its gain as 10 neurons"
    refuses(ValueError, message, run, f"{line} --steps 1")
    assert not (tmp_path / "x").exists()
    run(f"{line} --steps 40 --neurons 64")
    assert "fitted to 16 texts that the adapted model itself writes" in capsys.readouterr().out
    (expert,) = experts_in(tmp_path / "x")[0]
    assert expert.facts["training"]["kept"] >= 0.8


def test_faults_leave_nothing_behind(folder, tmp_path):
    base, tokenizer = load_stand_in("gpt2")
    expert = load_expert(folder / "law.expert")
    compose(folder, f"med.expert --output_dir of_med --background none.txt {SMALL}")
    tokenizer.add_tokens(["another"])
    expert.facts["tokenizer"] = vocabulary_identity(tokenizer)
    write_expert(expert, tmp_path / "tokenizer.expert")
    with torch.no_grad():
        base.transformer.h[0].mlp.c_fc.weight[0, 0] += 1e-3
    save_expert(start_expert(base, 8), tmp_path / "base.expert", statistics=expert.statistics)
    (tmp_path / "file.expert").write_bytes((folder / "law.expert").read_bytes()[:-100])
    there = set(tmp_path.iterdir())
    for kind, message in {
        "base": "must be of this base",
        "tokenizer": "experts must be of one tokenizer",
        "file": "must be a whole safetensors file",
    }.items():
        for first in ("med.expert", "--add of_med"):
            line = f"{tmp_path}/{kind}.expert {first} --output_dir {tmp_path}/mix"
            refuses(ValueError, message, compose, folder, line)
            assert set(tmp_path.iterdir()) == there


def test_from_texts_to_a_mixture(prose, folder, tmp_path, monkeypatch):
    shutil.copytree(prose, prose.parent / "sea")
    (prose.parent / "sea/train.txt").write_text("ship sea sail wave " * 400)
    seen = []  # for the statistics
    monkeypatch.setattr("mpoe.cli.expert.LEAST_STATISTICS", 8)

    def collect(model, batches):
        seen.extend(batches)
        return collect_statistics(model, seen)

    monkeypatch.setattr("mpoe.cli.expert.collect_statistics", collect)
    flags = f"--model gpt2 --data_dir {prose.parent} --tasks prose sea --use_cpu"
    flags += " --max_source_length 32 --max_steps 2"
    flags += " --learning_rate 1e-2 --weight_decay 0.1 --neurons 16"
    assert not run(f"train {flags} --expert a --output_dir {tmp_path}/a")
    expert = load_expert(tmp_path / "a/a.expert")
    assert any(
        load_stand_in("gpt2")[1](" sea")["input_ids"][0] in batch["input_ids"] for batch in seen
    )
    assert (expert.facts["training"]["steps"], expert.neurons) == (2, 16)
    assert any(value.any() for name, value in expert.weights.items() if name.endswith("down"))
    assert expert.facts["base"] == base_identity(load_stand_in("gpt2")[0])
    assert expert.facts["training"]["data"]["sea"]["seen"]
    kept = [file.name for file in (tmp_path / "a").glob("*.safetensors")]
    assert kept == ["background.safetensors"]  # no copy of the base
    losses = expert.facts["training"]["held_out"]
    assert sorted(losses) == ["base", "expert, always on", "quiet expert"]
    records = read_metrics(tmp_path / "a")
    (trained,) = (record for record in records if "loss" in record and record["step"] == 2)
    assert trained["base_loss"] > trained["loss"] > 0
    results = read_json(tmp_path / "a/results.json")["validation"]
    for task, losses in results.items():
        (record,) = (record for record in records if f"eval_{task}_loss" in record)
        assert losses["base_loss"] == record[f"eval_{task}_base_loss"] != losses["loss"]
    files = f"{tmp_path}/a/a.expert {folder}/law.expert"
    assert not run(f"compose {BASE} {files} --output_dir {tmp_path}/mix --top_k 1")
    mixture = load_mpoe(tmp_path / "mix")
    assert (mixture.config.mpoe_experts, mixture.mpoe_config.top_k) == (["a", "law", "none"], 1)


def test_a_run_of_an_expert_goes_on(prose, tmp_path):
    flags = f"train --model gpt2 --data_dir {prose} --use_cpu --expert a --neurons 4"
    flags += " --max_source_length 32 --max_steps 2 --save_steps 1"
    flags += f" --learning_rate 1e-2 --output_dir {tmp_path}/run"
    run(flags)
    whole = load_expert(tmp_path / "run/a.expert").weights
    saved = load_file(tmp_path / "run/checkpoint-1" / "model.safetensors")
    assert all(".experts." in name for name in saved)
    shutil.rmtree(tmp_path / "run/checkpoint-2")
    run(f"{flags} --resume")
    again = load_expert(tmp_path / "run/a.expert").weights
    assert all(torch.equal(value, whole[name]) for name, value in again.items())
    run(f"{flags} --overwrite --save_base")
    assert same(tmp_path / "run", tmp_path / "run/checkpoint-2")
    assert len(load_file(tmp_path / "run/model.safetensors")) > len(saved)


@pytest.mark.parametrize(
    "line, message",
    [
        ("--save_base", "save_base is for --expert"),
        *(
            (f"--expert '{name}'", "expert must be a name")
            for name in ("a/b", "..", "", "none", "a\nb")
        ),
        ("--expert mine", r"did not write .*run/mine\.expert"),
        ("--expert a --num_experts 2", "num_experts is for mixtures"),
        ("--expert a --baseline dense", "baseline is for mixtures"),
        ("--expert a --model {}", "expert needs a dense language model"),
    ],
)
def test_training_that_is_refused(prose, tmp_path, line, message):
    convert_to_mpoe(load_stand_in("gpt2")[0]).save_pretrained(tmp_path / "mixture")
    line = line.format(tmp_path / "mixture")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/mine.expert").write_text("mine")
    flags = f"train --data_dir {prose} --output_dir {tmp_path}/run --use_cpu"
    refuses((CommandError, FileExistsError), message, run, flags, line)
    assert [path.read_text() for path in (tmp_path / "run").iterdir()] == ["mine"]
