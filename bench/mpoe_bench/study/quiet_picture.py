"""The picture of the study of quiet experts: what a domain's training teaches against what it
changes elsewhere."""

from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from mpoe_bench.study.quiet_tables import QuietResults

# By method: its words and colour. Colours differ in lightness too.
METHODS = {
    "quiet": ("quiet expert", "#0b6e4f"),
    "neurons": ("expert, always on", "#7fc8a9"),
    "lora": ("LoRA", "#d1495b"),
    "replay": ("LoRA with replay", "#edae49"),
}


def draw(results: QuietResults, file: Path) -> None:
    """Write an SVG: a line a method, a point a length of training, in two panels."""
    plan = results.plan
    steps_of = sorted([*plan.lengths, plan.steps])
    figure = Figure(figsize=(8.4, 3.6), layout="constrained")
    text, answers = figure.subplots(1, 2)
    for method, (name, colour) in METHODS.items():
        cases = [results.of_domain(method, plan.forgetting, n, plan.seeds[0]) for n in steps_of]
        points = [case for case in cases if case is not None]
        learnt = [case.gain for case in points]
        look = {"color": colour, "label": name, "marker": "o"}
        text.plot(learnt, [case.elsewhere for case in points], **look)
        answers.plot(learnt, [case.answers for case in points], **look)
    lengths = ", ".join(map(str, steps_of))
    text.set_title("Other domains and sources: worse by")
    text.axhline(0, color="0.7", linewidth=0.8)
    answers.set_title("The model's own answers: KL")
    answers.set_yscale("log")
    for axes in (text, answers):
        axes.set_xlabel(f"better on {plan.forgetting} after {lengths} steps")
        axes.set_ylabel("nats per token")
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*text.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": file.name}):  # the same file each time
        figure.savefig(file, metadata={"Date": None})
