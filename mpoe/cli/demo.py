"""`mpoe demo`: three experts are trained apart beside one small model and composed into a mixture without their texts.

Model and texts come with the installation. `--compare` instead compares a dense model, a wider one, Switch and MPO
experts that are trained alike: gain, size and cost."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mpoe.cli.errors import CommandError, close_matches
from mpoe.cli.parsing import option, read_command

MODEL_FOLDER = "model"
KINDS = ("t5", "gpt2")


@dataclass
class DemoOptions:
    """Options of the demo."""

    _argument_group_name = "demo"

    output_dir: Path = option(Path("mpoe_demo"), "folder for report.html, results.json, experts and the model")
    compare: bool = option(False, "compare dense, wider, Switch and MPO experts")
    model: str = option("t5", "of --compare: t5 (documentation tasks) or gpt2 (language modelling)")
    steps: int | None = option(None, "training steps per expert or arm; default: the tuned budget")
    seed: int = option(0, "of data order, routers and dropout")
    overwrite: bool = option(False, "replace the demo in the output folder")


def command(arguments: Sequence[str]) -> None:
    """Run the command on its tokens."""
    # Threads that spin while they wait for each other cost minutes on shared cores; torch reads this when it loads.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    asked = read_command("mpoe demo [--flag value ...]", __doc__, [DemoOptions], arguments)
    if asked is None:
        return
    options: DemoOptions = asked.options[0]
    output_dir, steps = options.output_dir, options.steps
    from mpoe.cli.files import REPORT_FILE, RESULTS_FILE
    from mpoe.config.checks import check_seed
    from mpoe.training.output_dir import check_folder
    from mpoe.training.run_lock import hold

    check_seed("seed", options.seed)
    if options.model not in KINDS:
        close = close_matches(options.model, KINDS)
        raise CommandError(f"model must be one of {', '.join(KINDS)}; got {options.model!r}{close}")
    if "model" in asked.given and not options.compare:
        raise CommandError("model is for --compare; the experts are trained beside the embedded GPT-2")
    if steps is not None and steps < 1:
        raise CommandError(f"steps must be at least 1; got {steps}")
    check_folder("output_dir", output_dir)
    others = {p.name for p in output_dir.iterdir()} if output_dir.is_dir() else set()
    if "run.json" in others or "config.json" in others:
        raise CommandError(f"output_dir {output_dir} holds another run; choose another folder")
    if others & {RESULTS_FILE, REPORT_FILE, MODEL_FOLDER} and not options.overwrite:
        raise CommandError(
            f"output_dir {output_dir} holds an earlier demo; give --overwrite to replace it, or another --output_dir"
        )
    with hold(output_dir):
        for name in (RESULTS_FILE, REPORT_FILE):
            (output_dir / name).unlink(missing_ok=True)  # stale if this demo is killed
        if options.compare:
            from mpoe.cli import demo_compare
            from mpoe.cli.demo_arms import SETTINGS, with_steps

            demo_compare.run(output_dir, options.model, with_steps(SETTINGS[options.model], steps), options.seed)
        else:
            from mpoe.cli import demo_experts

            demo_experts.run(output_dir, steps or demo_experts.STEPS, options.seed)
