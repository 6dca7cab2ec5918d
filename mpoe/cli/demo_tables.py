"""The comparison's output: what is compared, the table, the conclusions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mpoe.cli.demo_arms import NUM_EXPERTS, Settings

# the claim: MPOE's mean is not below Switch's by more than this, with less than this share of its expert parameters
ALLOWED_LOSS = 0.02
ALLOWED_SHARE = 0.5
SATURATED = 0.95
# for perplexity, a relative difference, since it is not a fraction
ALLOWED_PERPLEXITY = 0.02
LARGE_NAMES = {"t5-base": "T5-base", "gpt2": "GPT-2"}
BASELINE = "baseline"  # the most frequent answer for all items; for perplexity, every token by its frequency


def comparison_lines(settings: Settings) -> list[str]:
    """A description of the comparison."""
    rates = ", ".join(f"{arm.name} {arm.learning_rate:g}" for arm in settings.arms)
    metric = (
        "perplexity per token of the stand-in's tokenizer (lower is better)"
        if settings.causal
        else "accuracy of each task and their mean, in per cent"
    )
    large = LARGE_NAMES[settings.large]
    return [
        f"Comparison: the same start, {settings.steps} steps of {settings.batch} items, the same items in the same "
        f"order, one seed. Mixtures have {NUM_EXPERTS} experts per layer; a token meets as many as the table says. The "
        "wider dense model has as many feed-forward weights as MPOE.",
        f"Learning rates, chosen on the validation split ({settings.rates}): {rates}.",
        f"Scores: {metric}, on held-out test items that no training item shares an object or a text with. The baseline "
        f"answers every item alike, with the most frequent answer"
        f"{'; it guesses every token by its frequency' if settings.causal else ''}.",
        '"weights": those of the feed-forward layers, or of all their experts, over the dense ones. '
        f'"{large}": parameters of a whole {large} so converted. "time": to train one of its feed-forward layers, over '
        "the dense layer's; CPU time of one core, measured here in turns.",
        "What this does not show: larger models, longer training, other data. So short a training from a pretrained "
        "start hardly needs experts, and seeds differ by a point or so. docs/evidence.md has longer trials.",
    ]


def _value(task_scores: dict[str, float], causal: bool) -> str:
    value = next(iter(task_scores.values()))
    return f"{value:.2f}" if causal else f"{100 * value:.1f}"


def weights_ratio(arm: dict[str, Any], arms: Sequence[dict[str, Any]]) -> float:
    """Feed-forward weights relative to the dense model's."""
    (dense,) = (other for other in arms if other["key"] == "dense")
    return arm["parameters"]["experts"] / dense["parameters"]["experts"]


def comparison_table(arms: Sequence[dict[str, Any]], settings: Settings) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the comparison, one row per arm and one for the baseline (see `mpoe.data.baseline`)."""
    names = list(arms[0]["scores"])
    header = ["model", "experts\nper token", "weights\nx dense", f"{LARGE_NAMES[settings.large]}\nM", "time\nx dense"]
    header += [f"{name}\nperplexity" for name in names] if settings.causal else [*names, "mean"]
    rows = []
    for arm in arms:
        large = arm["large"]
        row = [arm["name"], str(settings.arm(arm["key"]).experts_per_token or "-"), f"{weights_ratio(arm, arms):.2f}"]
        row += [f"{large['parameters'] / 1e6:,.0f}", f"{large['training']:.2f}"]
        row += [_value(arm["scores"][name], settings.causal) for name in names]
        rows.append(row + ([] if settings.causal else [f"{100 * arm['mean']:.1f}"]))
    constant = arms[0]["baselines"]
    values = [next(iter(constant[name].values())) for name in names]
    row = [BASELINE, *["-"] * 4, *(_value({"": value}, settings.causal) for value in values)]
    row += [] if settings.causal else [f"{100 * sum(values) / len(values):.1f}"]
    return header, [*rows, row]


def what_holds(arms: Sequence[dict[str, Any]], settings: Settings) -> list[str]:
    """The benefits that this run shows, one sentence each."""
    by_key = {arm["key"]: arm for arm in arms}
    switch, mpoe, separable = by_key["switch"], by_key[settings.main_arm], by_key["separable"]
    changed = max(arm["conversion_difference"] for arm in arms if arm["conversion_difference"] is not None)
    large = LARGE_NAMES[settings.large]
    millions = {arm["key"]: f"{arm['large']['parameters'] / 1e6:,.0f} million" for arm in arms}
    return [
        f"Conversion is exact: no logit changed by more than {changed:.0e} of the largest.",
        f"Size: a {large} with {NUM_EXPERTS} experts per layer has {millions[settings.main_arm]} parameters (in the "
        f"shape separable {millions['separable']}); with Switch's dense experts {millions['switch']}, without experts "
        f"{millions['dense']}.",
        f"Price: one of its layers, where a token meets {settings.arm(settings.main_arm).experts_per_token} experts, "
        f"trains in {mpoe['large']['training']:.2f} times the dense layer's time (one of Switch's dense experts: "
        f"{switch['large']['training']:.2f}, one separable expert: {separable['large']['training']:.2f}).",
    ]


def check(arms: Sequence[dict[str, Any]], settings: Settings) -> dict[str, Any]:
    """Whether the claim holds for the main MPOE arm against Switch, with the numbers behind it."""
    by_key = {arm["key"]: arm for arm in arms}
    switch, mpoe = by_key["switch"], by_key[settings.main_arm]
    share = mpoe["parameters"]["experts"] / switch["parameters"]["experts"]
    items = sum(int(score["items"]) for score in mpoe["scores"].values())
    if settings.causal:
        loss = mpoe["mean"] / switch["mean"] - 1.0
        highest, kept = 0.0, loss <= ALLOWED_PERPLEXITY
        numbers = f"perplexity {mpoe['mean']:.2f} against Switch's {switch['mean']:.2f} ({100 * loss:+.1f}%)"
        wanted = f"not above Switch's by more than {100 * ALLOWED_PERPLEXITY:g}%"
    else:
        loss = switch["mean"] - mpoe["mean"]
        highest = max(next(iter(s.values())) for arm in arms for s in arm["scores"].values())
        kept = loss <= ALLOWED_LOSS
        numbers = (
            f"mean {100 * mpoe['mean']:.1f} against Switch's {100 * switch['mean']:.1f} ({-100 * loss:+.1f} points)"
        )
        wanted = f"not below Switch's by more than {100 * ALLOWED_LOSS:g} points"
    held = kept and share < ALLOWED_SHARE and highest <= SATURATED
    reasons = [] if kept else ["the metric fell further"]
    reasons += [] if share < ALLOWED_SHARE else ["it has too many parameters"]
    reasons += [] if highest <= SATURATED else [f"a task is saturated ({100 * highest:.1f}%)"]
    verdict = "held" if held else f"did NOT hold: {', '.join(reasons)}"
    return {
        "held": held,
        "loss": loss,
        "share_of_switch_expert_parameters": share,
        "highest_task": highest,
        "test_items": items,
        "statement": f"{mpoe['name']}: {numbers} on {items:,} held-out items, with {100 * share:.1f}% of its "
        f"FFN-expert parameters. The claim ({wanted}, with less than {100 * ALLOWED_SHARE:g}% of them, no task above "
        f"{100 * SATURATED:g}%) {verdict}.",
    }


def show_comparison(
    console: Any, results: dict[str, Any], header: Sequence[str], rows: Sequence[Sequence[str]]
) -> None:
    """Print examples, the times of the stages, the table and the verdict."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    examples = Table("prompt", "expected", "generated", title="Generated by the reloaded MPOE model")
    for example in results["examples"]:
        examples.add_row(*(Text(example[key]) for key in ("prompt", "expected", "generated")))
    console.print(examples)
    console.print(f"Reloaded model computes bit for bit the same: {'yes' if results['reloaded_equal'] else 'NO'}")
    total = sum(results["stages"].values())
    listed = ", ".join(f"{name} {seconds:.1f}" for name, seconds in results["stages"].items())
    console.print(f"[dim]Seconds per stage: {listed}; together {total:.1f}[/dim]", highlight=False, soft_wrap=True)
    for line in results["comparison"]:
        console.print(Text(line, style="dim"))
    title = f"mpoe demo: {results['model']}, {results['steps']} steps per arm, seed {results['seed']}"
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for arm in results["arms"]:
        for remark in arm["remarks"]:
            console.print(Text(f"note: {arm['name']}: {remark}", style="yellow"))
    for line in results["holds"]:
        console.print(Text(line))
    console.print(Text(results["check"]["statement"], style="green" if results["check"]["held"] else "bold red"))
