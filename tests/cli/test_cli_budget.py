"""How long `mpoe train --expert` trains if nobody says it, and what it says before the first
step."""

from functools import partial
from types import SimpleNamespace

import pytest

from mpoe.cli.evaluate import encode_task
from mpoe.cli.expert import encode_part, plan_budget, short_enough
from mpoe.data.stand_in_models import load_stand_in
from mpoe.data.tables import Section, make_task
from mpoe.data.tasks import detect_spec
from mpoe.training.callbacks import StopWhenFlat
from tests.assertions import read_json

SENTENCE = "A list holds items in their order, and a set holds each of them once.\n"
SECTION = SENTENCE * 28  # 1,960 characters


def task_of(section, count):
    rows = [(Section({"text": section}), f"section {place}") for place in range(count)]
    held_out = [(Section({"text": section[:500]}), "held out")]
    tables = {"train": lambda: rows, "validation": lambda: held_out}
    return make_task(detect_spec(rows, "mine"), tables, "here")


# (section, how many, steps, passes over the text, words that must be said)
SIZES = {
    "1 KB": (SENTENCE, 14, 3, 4.0, "little text"),
    "20 KB": (SECTION, 10, 40, 4.0, "times"),
    "400 KB": (SECTION, 200, None, 1.0, "plan"),
    "2 MB": (SECTION, 1000, 400, 0.29, "left out"),
    "200 MB": (SECTION, 100_000, 400, 0.0029, "left out: 99.7% of the text (--max_steps"),
}


@pytest.mark.parametrize("size", SIZES)
def test_a_plan_for_every_size(size):
    section, count, steps, passes, words = SIZES[size]
    _, tokenizer = load_stand_in("gpt2")
    task = short_enough(task_of(section, count), tokenizer)
    encode = partial(encode_task, tokenizer=tokenizer, style="causal")
    items, tokens = encode_part(task, encode)
    in_section = len(tokenizer(section)["input_ids"])
    assert tokens == pytest.approx(count * in_section, rel=0.1)
    assert sum(len(item["input_ids"]) for item in items) < 1_000_000  # however large the folder is
    arguments = SimpleNamespace(
        world_size=1, gradient_accumulation_steps=1, per_device_train_batch_size=8
    )
    budget = plan_budget(arguments, {"mine": items}, tokens, {"mine": items[:2]}, frozenset())
    assert budget.step_tokens == pytest.approx(512, rel=0.1)
    assert arguments.max_steps == budget.steps
    assert steps is None or budget.steps == pytest.approx(steps, rel=0.3)
    assert budget.steps <= 400
    read = budget.steps * budget.step_tokens / budget.tokens
    assert read == pytest.approx(passes, rel=0.35)
    assert words in "\n".join(budget.lines())
    assert ("left out" in "\n".join(budget.lines())) == (passes < 1)


def test_it_is_said_before_the_first_step(cli, tmp_path, monkeypatch):
    """A kilobyte: shorter blocks, four times over; bars where somebody watches."""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    folder = tmp_path / "short"
    folder.mkdir()
    (folder / "train.txt").write_text(
        "".join(f"Item {i} of a list is followed by {i + 1}.\n" for i in range(26))
    )
    flags = f"--data_dir {folder} --output_dir {tmp_path}/run --use_cpu"
    answer = cli(f"train --expert mine --neurons 4 --model gpt2 {flags}")
    before, _, after = answer.out.partition("validation loss")
    assert after
    for words in ("to train on", "held out", "plan: ", "little text", "minutes of training", "GB"):
        assert words in before
    assert "it/s" in answer.err or "s/it" in answer.err
    results = read_json(tmp_path / "run/results.json")
    assert 1 <= results["steps"] < 10
    (sizes,) = results["data"].values()
    assert sizes["seen"] > sizes["train"]


def test_it_stops_when_the_held_out_loss_no_longer_falls():
    def stops(*losses, tasks=1):
        history = [{"step": 0, "loss": 9.0}]
        for step, loss in enumerate(losses, start=1):
            for task in range(tasks):
                record = {f"eval_{task}_loss": loss, f"eval_{task}_base_loss": 9.0 - step}
                history.append({"step": step, **record})
        control = SimpleNamespace(should_training_stop=False)
        StopWhenFlat(tasks).on_evaluate(None, SimpleNamespace(log_history=history), control)
        return control.should_training_stop

    assert stops(3.0, 2.0, 2.1, 2.2, 2.0)
    assert stops(3.0, 2.0, 2.1, 2.2, 2.0, tasks=2)
    assert not stops(3.0, 2.0, 2.1, 2.2, 1.9)
    assert not stops(3.0, 3.1, 3.2)
