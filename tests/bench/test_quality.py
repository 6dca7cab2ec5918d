"""The comparison of quality: a tiny plan end to end, resumed and refused; what arms are; what statistics say."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from mpoe_bench.quality.arms import ARMS, Arm
from mpoe_bench.quality.evaluation import RouterCounts, expert_distance
from mpoe_bench.quality.hidden import hidden
from mpoe_bench.quality.language import LanguageField
from mpoe_bench.quality.plans import PLANS, Plan
from mpoe_bench.quality.report import write_report
from mpoe_bench.quality.runs import BEYOND, arm_of, run_plan
from mpoe_bench.quality.statistics import Spread, gain, verdict
from mpoe_bench.quality.training import Budget, convert, hidden_as_large_as, prepare, run_arm, schedule

from mpoe.layers.hidden import HiddenExperts
from mpoe.layers.router import TopKRouter

PLAN = Plan("language", ("dense", "switch8", "separable8"), 3, seeds=(0, 1), tuning=1, rates=(1e-3, 4e-3))


@pytest.fixture(scope="module")
def field(tmp_path_factory: pytest.TempPathFactory) -> LanguageField:
    """Two domains of invented sentences, a model of 16 and blocks of 16."""
    folder = tmp_path_factory.mktemp("data")
    for name, column in (("sms_spam", "sentence"), ("movie_sentiment", "sentence")):
        (folder / name).mkdir()
        for split in ("train", "validation", "test"):
            rows = [
                {column: f"the {name} of {split} number {i} is long and full of words", "label": 0} for i in range(40)
            ]
            (folder / name / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return LanguageField(folder, model=16, layers=1, block=16, batch=4, held_out=4, domains=("messages", "reviews"))


@pytest.fixture(scope="module")
def folder(field: LanguageField, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quality") / "out"
    run_plan(PLAN, field, out, lambda _: None)
    return out


def test_a_plan_leaves_a_record_for_every_arm_and_seed(folder: Path) -> None:
    lines = (folder / "results.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert {(r["arm"], r["budget"]["seed"]) for r in records} == {(a, s) for a in PLAN.arms for s in PLAN.seeds}
    tuned = {r["arm"]: r["budget"]["rate"] for r in records}
    for arm, rate in tuned.items():
        tried = [json.loads(file.read_text()) for file in (folder / "tuning").glob(f"{arm}-*.json")]
        scores = {record["budget"]["rate"]: record["validation"] for record in tried}
        assert rate == min(scores, key=scores.__getitem__)
        assert set(PLAN.rates) < set(scores)
        assert min(scores) < rate < max(scores) or len(scores) == len(PLAN.rates) + BEYOND
    by_arm = {r["arm"]: r for r in records}
    assert by_arm["switch8"]["of_switch"] == 1.0
    assert by_arm["dense"]["of_dense"] == 1.0
    assert by_arm["dense"]["router"] == {}
    assert 0 < by_arm["separable8"]["router"]["entropy"] <= 1.0
    assert by_arm["separable8"]["distance"] > 0


def test_a_stopped_plan_goes_on_and_runs_the_same(folder: Path, field: LanguageField) -> None:
    kept, lost = folder / "runs" / "dense-0.json", folder / "runs" / "separable8-1.json"
    before, written = json.loads(lost.read_text()), kept.stat().st_mtime_ns
    lost.unlink()
    run_plan(PLAN, field, folder, lambda _: None)
    again = json.loads(lost.read_text())
    assert kept.stat().st_mtime_ns == written
    measured = ("cpu_seconds", "peak_memory")
    assert {k: v for k, v in again.items() if k not in measured} == {
        k: v for k, v in before.items() if k not in measured
    }


def test_another_budget_is_refused(folder: Path, field: LanguageField) -> None:
    with pytest.raises(ValueError, match="runs of another plan"):
        run_plan(Plan("language", ("dense",), 4), field, folder)
    with pytest.raises(ValueError, match="arms must be among dense"):
        arm_of("densest")


def test_an_arm_may_take_the_rate_of_another(folder: Path, field: LanguageField) -> None:
    arm = "dense_anew"
    records = run_plan(dataclasses.replace(PLAN, arms=(arm,), seeds=(0,)), field, folder, lambda _: None)
    assert not list((folder / "tuning").glob(f"{arm}-*"))
    assert len({r["budget"]["rate"] for r in records if r["arm"] in (arm, "dense")}) == 1
    (folder / "runs" / f"{arm}-0.json").unlink()


def test_the_report_shows_every_arm(folder: Path, field: LanguageField) -> None:
    text = write_report(folder, field)
    assert text == (folder / "report.md").read_text()
    for key in PLAN.arms:
        assert f"| {arm_of(key).name} |" in text
    assert "Gain over dense" in text
    assert "| one seed |" not in text
    assert "Named before" not in text


def test_the_report_tests_what_the_plan_named(folder: Path, field: LanguageField, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    one, other = PLAN.arms[:2]
    file = copy / "plan.json"
    known = json.loads(file.read_text())
    known["plan"]["comparisons"] = [[one, other], [one, "absent"]]
    file.write_text(json.dumps(known))
    lines = write_report(copy, field).split("Named before the first run:")[1].splitlines()
    rows = [line for line in lines[:8] if line.startswith(f"| {arm_of(one).name} | {arm_of(other).name} |")]
    assert len(rows) == 1
    assert rows[0].split(" | ")[-1].strip(" |") in {"better", "worse", "not significant"}


def test_every_plan_knows_its_arms() -> None:
    for plan in PLANS.values():
        assert [arm_of(key).key for key in plan.arms] == list(plan.arms)
        assert plan.tuning_seed not in plan.seeds


@pytest.mark.parametrize("key", ["wide8", "mask50", "biases8", "larger", "decay", "biases", "upcycled_paper_even"])
def test_every_kind_of_arm_trains(field: LanguageField, key: str) -> None:
    first, more = (run_arm(field, arm_of(key), Budget(steps, 4e-3, 0)) for steps in (1, 4))
    assert more["test"] < first["test"]


@pytest.mark.parametrize("key", ["mask50", "full_hidden_mask"])
def test_the_mask_of_an_arm_is_on(field: LanguageField, key: str) -> None:
    arm = dataclasses.replace(arm_of(key), upcycled=0.0)
    if key == "full_hidden_mask":
        arm = dataclasses.replace(arm, experts={**arm.experts, "num_experts": 4, "block_size": 8})
    free, masked = (run_arm(field, dataclasses.replace(arm, mask=p), Budget(3, 4e-3, 0))["test"] for p in (0.0, 1.0))
    assert free != masked


@pytest.mark.parametrize("options", [{"own_biases": True}, {"shared_weight": True}, {}])
def test_a_fresh_mixture_is_the_dense_model(field: LanguageField, options: dict[str, bool]) -> None:
    kind = "dense" if options.get("shared_weight") else "mpo"
    arm = Arm("x", "x", {"num_experts": 4, "expert_type": kind}, router={"is_scale_prob": False}, **options)
    dense = prepare(field, arm, 0).eval()
    batch = next(iter(field.batches(0, 1)))
    with torch.no_grad():
        expected = dense(**batch).logits
        torch.testing.assert_close(convert(field, arm, dense, 0).eval()(**batch).logits, expected)


def test_the_larger_dense_model_has_the_parameters_of_its_arm(field: LanguageField) -> None:
    for arm in ARMS:
        if arm.as_large_as:
            record = run_arm(field, arm_of(arm.as_large_as), Budget(1, 1e-3, 0))
            wider = field.feed_forward_weights(hidden_as_large_as(field, arm.as_large_as))
            assert abs(wider - sum(record["weights"].values())) <= 8 * field.model


def test_statistics() -> None:
    def runs(scores: list[float]) -> list[dict]:
        return [{"test": score, "budget": {"seed": seed}} for seed, score in enumerate(scores)]

    difference = gain(runs([1.0, 2.0, 3.5]), runs([1.5, 2.5, 4.0]), lower_is_better=True)
    assert difference == Spread(0.5, 0.0, 3)
    assert verdict(difference) == "better"
    assert verdict(gain(runs([1.0, 2.0]), runs([1.5, 2.1]), True)) == "not significant"
    assert verdict(gain(runs([2.0]), runs([1.0]), True)) == "one seed"
    assert Spread.of([1.0, 3.0]).text(2, sign=True) == "+2.00 ± 1.41"
    assert Spread.of([1.0, 3.0]).half_width == pytest.approx(12.71)


def test_router_counts() -> None:
    counts = RouterCounts()
    assert counts.summary() == {}
    counts.add("one", torch.tensor([[8, 0]]))
    counts.add("other", torch.tensor([[0, 2]]))
    assert counts.summary() == pytest.approx({"entropy": 1.0, "specialisation": 1.0})


def test_schedule_and_distance(field: LanguageField) -> None:
    assert [round(schedule(step, 40), 3) for step in (0, 1, 2, 21)] == [0.5, 1.0, 1.0, 0.5]
    arm = next(arm for arm in ARMS if arm.key == "switch8")
    model = convert(field, arm, prepare(field, arm, 0), 0)
    assert expert_distance(model) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("change", [{"noise": 0.3}, {"restart": 0.5}, {"all_gates": True}, {"frozen": ("left",)}])
def test_what_the_search_changes(field: LanguageField, change: dict[str, Any]) -> None:
    """Noise and restarts change the model at once; gates of all experts change gradients alone; frozen blocks stay."""
    plain, changed = (hidden("x", 4, 8, True, **options) for options in ({}, change))
    models = [convert(field, arm, prepare(field, arm, 0), 0) for arm in (plain, changed)]
    batch = next(iter(field.batches(0, 1)))
    losses = [field.loss(model, batch) for model in models]
    assert (losses[0].item() == pytest.approx(losses[1].item(), abs=1e-6)) == (
        "noise" not in change and "restart" not in change
    )
    for loss in losses:
        loss.backward()
    routers = [next(m for m in model.modules() if isinstance(m, TopKRouter)).weight.grad for model in models]
    assert torch.equal(*routers) == ("frozen" in change)
    blocks = next(m for m in models[1].modules() if isinstance(m, HiddenExperts)).auxiliary
    assert (blocks["left"].grad is None) == ("frozen" in change)
    assert blocks["right"].grad is not None


def test_a_search_leaves_the_test_split_alone(field: LanguageField, tmp_path: Path) -> None:
    plan = Plan("language", ("dense", "group_base"), 2, seeds=(10,), validate_only=True)
    records = run_plan(plan, field, tmp_path)
    assert all("test" not in record and record["parts"] for record in records)
    assert "validation loss" in write_report(tmp_path, field)


def test_the_arms_of_the_hidden_study(field: LanguageField) -> None:
    """A tiny run of each kind; every comparison that is stated beforehand names arms of its plan."""
    plan = PLANS["hidden"]
    assert {key for pair in plan.comparisons for key in pair} <= set(plan.arms)
    small = dataclasses.replace(
        arm_of("hidden_group"), experts={"num_experts": 4, "shape": "hidden", "block_size": 8, "block_per_group": True}
    )
    record = run_arm(field, small, Budget(4, 1e-3, 0))
    centre, own = field.feed_forward_weights(), 4 * 2 * field.hidden * 8
    assert record["weights"] == {"shared": centre, "own": own * field.layers}
    assert record["distance"] > 0
    wide = run_arm(field, arm_of("flops_group"), Budget(2, 1e-3, 0), tuning=False)
    assert wide["of_dense"] == pytest.approx(4 / 3, abs=0.1)
    restarted = run_arm(field, arm_of("dense_restart"), Budget(8, 1e-3, 0))
    assert restarted["weights"] == {"shared": centre, "own": 0}
    assert restarted["test"] != run_arm(field, arm_of("dense"), Budget(8, 1e-3, 0))["test"]
