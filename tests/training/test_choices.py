"""How products are computed: as the run that is resumed did, and on all processes as the first one does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mpoe.training import checkpoints
from mpoe.training.checkpoints import go_on_with_choices
from mpoe_kernels.contract import autotune

from .ranks import torchrun
from .tiny import LAST, make_trainer, preferring, resume_options, weights

Machine = Callable[[int], None]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """A new process on a new machine, on which the n-th candidate of those that are timed is the fastest."""
    monkeypatch.setenv(autotune.SETTING, "1")

    def move(place: int) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"cache{place}"))
        monkeypatch.setattr(autotune, "_seconds", preferring(place))
        autotune.forget()

    yield move
    monkeypatch.undo()
    autotune.forget()


def train(folder: Path, steps: int, resume: bool = False) -> dict[str, torch.Tensor]:
    trainer = make_trainer(folder, **resume_options("t5", steps))
    trainer.train(resume_from_checkpoint=resume or None)
    return weights(trainer.model)


def change_manifest(checkpoint: Path, **entries: object) -> None:
    manifest = checkpoint / checkpoints.MANIFEST
    content = json.loads(manifest.read_text())
    del content["choices"]
    manifest.write_text(json.dumps(content | entries))


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return all(map(torch.equal, one.values(), two.values()))


def test_a_resumed_run_goes_on_with_its_choices_bit_for_bit(machine: Machine, tmp_path: Path) -> None:
    machine(0)
    whole, chosen = train(tmp_path / "run", 6), autotune.choices()
    assert chosen
    for step in (3, 6):
        assert checkpoints.choices_of(tmp_path / "run" / f"checkpoint-{step}") == chosen
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    machine(LAST)
    assert same(train(tmp_path / "run", 6, resume=True), whole)
    assert checkpoints.choices_of(tmp_path / "run" / "checkpoint-6") == chosen
    machine(LAST)
    assert not same(train(tmp_path / "new", 6), whole), "a new run chooses for the machine it is on"
    assert not set(autotune.choices().items()) & set(chosen.items())


def test_one_process_takes_nothing_but_the_checkpoints_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[dict[str, str]] = []
    monkeypatch.setattr(autotune, "choices", lambda: {"some": "eager chain"})
    monkeypatch.setattr(autotune, "adopt", taken.append)
    go_on_with_choices(None, SimpleNamespace(world_size=1))  # type: ignore[arg-type]
    assert taken == [{}]


@pytest.mark.parametrize(
    "entries", [{}, {"machine": {"constants": None}}, {"choices": {"some": 3, "other": "eager x"}}]
)
def test_checkpoints_without_choices_choose_anew(machine: Machine, tmp_path: Path, entries: dict) -> None:
    """Those written before choices were recorded, some with a machine's constants; and what no run wrote."""
    machine(0)
    train(tmp_path / "run", 3)
    chosen = autotune.choices()
    change_manifest(tmp_path / "run" / "checkpoint-3", **entries)
    machine(LAST)
    train(tmp_path / "run", 4, resume=True)
    assert not set(autotune.choices().items()) & set(chosen.items())


@pytest.mark.slow
def test_ranks_whose_clocks_disagree_compute_the_same(tmp_path: Path) -> None:
    """Tensor parallelism: the same tokens, the same experts, the same bits. Data parallelism: one set of choices."""
    answer = torchrun("ranks_models", "choices", tmp_path)
    assert answer.returncode == 0, answer.stdout
    first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2))
    assert first["chosen alone"].keys() == second["chosen alone"].keys()
    assert not set(first["chosen alone"].items()) & set(second["chosen alone"].items())
    assert first["alone"]["logits"] != second["alone"]["logits"], "the test can fail"
    for name in ("split", "weights", "chosen"):
        assert first[name] == second[name], name
    recorded = checkpoints.choices_of(tmp_path / "run" / "checkpoint-2")
    assert recorded == first["chosen"]
    assert first["chosen alone"].items() <= recorded.items()
