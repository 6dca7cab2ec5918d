"""`mpoe demo`: three quiet experts beside one small model: what each gains on its domain, what the
model forgets, and all three in one model.

Model and texts come with the installation. `--compare` instead compares a dense model, a wider one,
Switch and MPO experts that are trained alike: gain and size."""

from dataclasses import asdict, dataclass
from pathlib import Path

from mpoe.cli.command import Request, as_command, option
from mpoe.cli.demo_compare import ARMS, compare_arms
from mpoe.cli.demo_experts import MODEL_FOLDER, STEPS, train_experts
from mpoe.cli.demo_report import show, write
from mpoe.cli.errors import CommandError, check_installed
from mpoe.cli.outputs import REPORT_FILE, RESULTS_FILE, check_output, write_json
from mpoe.config.checks import check_seed
from mpoe.models.expert_mixture import EXPERTS_FOLDER
from mpoe.training.run_lock import hold


@dataclass
class DemoOptions:
    """Options of the demo."""

    output_dir: Path = option(
        Path("mpoe_demo"), "folder for report.html, results, and experts and model or the runs"
    )
    compare: bool = option(False, "compare dense, wider, Switch and MPO experts")
    model: str = option(
        "t5",
        "of --compare: t5 (documentation) or gpt2 (language modelling)",
        choices=["t5", "gpt2"],
    )
    steps: int | None = option(None, "training steps per expert or arm; default: the tuned budget")
    seed: int = option(0, "of data order, routers and dropout")
    overwrite: bool = option(False, "replace the demo in the output folder")

    LEAST = (("steps", 1),)

    def __post_init__(self) -> None:
        check_seed("seed", self.seed)


@as_command(DemoOptions)
def command(request: Request) -> None:
    """Train and compose the experts, or compare the arms, in the output folder."""
    (options,) = request.options
    if "model" in request.given and not options.compare:
        raise CommandError(
            "model is for --compare; the experts are trained beside the embedded GPT-2"
        )
    if options.compare:
        check_installed("train")
    patterns = (RESULTS_FILE, REPORT_FILE, EXPERTS_FOLDER, MODEL_FOLDER, *ARMS)
    folder = check_output(
        "output_dir", options.output_dir, options.overwrite, "an earlier demo", patterns
    )
    report = folder / REPORT_FILE
    results_file = folder / RESULTS_FILE
    with hold(folder):
        # stale if this demo is killed
        report.unlink(missing_ok=True)
        results_file.unlink(missing_ok=True)
        if options.compare:
            compare_arms(folder, options.model, options.steps, options.seed)
            return
        results = train_experts(folder, options.steps or STEPS, options.seed)
        show(results)
        write(report, results)
        write_json(results_file, asdict(results))
        print(f"{report}, {results_file}, experts and the mixture in {folder}")
