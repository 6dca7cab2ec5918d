"""`mpoe demo`: three quiet experts beside one small model: what each gains on its domain, what the
model forgets, and all three in one model.

Model and texts come with the installation. `--compare` instead compares a dense model, a wider one,
Switch and MPO experts that are trained alike: gain and size."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, mode
from typing import Any

import torch
from markupsafe import Markup
from rich.console import Console
from rich.text import Text
from torch.optim.lr_scheduler import OneCycleLR
from transformers.utils import logging

from mpoe.cli.command import CommandError, Request, as_command, check_installed, option
from mpoe.cli.outputs import (
    MODEL_OR_RUN,
    REPORT_FILE,
    RESULTS_FILE,
    check_model_output,
    check_output,
    model_folder,
    write_json,
)
from mpoe.cli.report import Table, bars_html, expert_colours, section, tokens_html, write_page
from mpoe.config.checks import check_seed
from mpoe.data.documentation import load_documentation
from mpoe.data.domains import DOMAINS, domain_text
from mpoe.data.predict import token_losses
from mpoe.data.stand_in_models import load_stand_in
from mpoe.inspection import route_text
from mpoe.models import collect_statistics, compose_experts, save_expert, start_expert
from mpoe.models.background import (
    AT_ONCE,
    own_texts,
    pieces,
    pooled_background,
    save_background,
    token_batches,
)
from mpoe.models.expert_mixture import BACKGROUND_FILE, EXPERTS_FOLDER, batches, keep_experts
from mpoe.training.run_lock import hold

MODEL_FOLDER = "model"


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
        "output_dir",
        options.output_dir,
        options.overwrite,
        "an earlier demo",
        patterns,
        MODEL_OR_RUN,
    )
    with hold(folder):
        for name in (RESULTS_FILE, REPORT_FILE):
            (folder / name).unlink(missing_ok=True)  # stale if this demo is killed
        if options.compare:
            compare_arms(folder, options.model, options.steps, options.seed)
        else:
            train_experts(folder, options.steps or STEPS, options.seed)


# ------------------------------------------------------------------------ --compare: `mpoe train`,
# arm by arm

_HIDDEN = "--shape hidden --block_size 16 --top_k 2"
# options of each arm; the wider dense model has as many weights as the hidden mixture
ARMS = {
    "dense": "--baseline dense",
    "wider": f"--baseline wider {_HIDDEN}",
    "switch": "--baseline switch",
    # blocks at the rate of the rest
    "hidden": f"{_HIDDEN} --regime scratch --auxiliary_lr_scale 1.0",
    "separable": "--shape separable",
}
# Options by model, and rates of the baselines and of the mixtures, chosen on the validation items:
# of T5 from .001, .0015 and .002 with 200 steps of two seeds.
SETTINGS = {
    "t5": ("--tasks doc_module --max_steps 200 --per_device_train_batch_size 32", "1e-3", "1.5e-3"),
    "gpt2": ("--tasks doc_lm --max_steps 60 --per_device_train_batch_size 16", "3e-4", "3e-4"),
}
_ALIKE = (
    "--lr_scheduler_type cosine --warmup_steps 0.05 --weight_decay 0.01 --logging_steps 5 "
    "--eval_strategy no --save_strategy no --use_cpu --disable_tqdm true --report_to none "
    "--overwrite"
)
_COMPARED = (
    "The same start, the same items in the same order, one seed. So short a training from a "
    "pretrained start hardly needs experts, and seeds differ by a point or so: larger models, "
    "longer training and other data may differ. Parameters and FLOPs of a large model: mpoe plan "
    "t5-base."
)


def compare_arms(output_dir: Path, kind: str, steps: int | None, seed: int) -> None:
    """Train the arms alike, each in a folder of its own, and put them side by side."""
    from mpoe.cli import compare, train

    settings, of_baselines, of_mixtures = SETTINGS[kind]
    settings += f" --model {kind} --seed {seed} {_ALIKE}"
    if steps:
        settings += f" --max_steps {steps}"
    for arm, options in ARMS.items():
        print(f"{arm}:")
        rate = of_baselines if "--baseline" in options else of_mixtures
        words = f"{settings} --learning_rate {rate} {options}"
        train.command([*words.split(), "--output_dir", str(output_dir / arm)])
    runs = [str(output_dir / arm) for arm in ARMS]
    compare.command([*runs, "--output_dir", str(output_dir), "--overwrite"])
    print(_COMPARED)


# ------------------------------------------------------------------------------ quiet experts

STEPS = 60
LENGTH = 128
NEURONS = 64
RATE = 0.01
MOST = 2000  # pieces of a domain's text that are trained on
OF_STATISTICS = 256  # of these
TESTED = 24  # pieces of each held-out text
SHOWN = 48  # tokens of each text in the picture
PROMPT, NEW = 16, 24  # tokens of a held-out text, and of its continuation
FOREIGN = "documentation"
_APART_HEADER = ("domain", "base", "always on", "quiet", "kept", "lost, always on", "lost, quiet")
_APART = (
    "Loss in nats per token on held-out text of the domain, lower is better; kept: the part of the "
    "expert's gain that is left when it is quiet; lost: how much worse the model is on "
    f"{FOREIGN}, held out too, which it knew before. Neither an expert nor the background has seen "
    "any: the background of 'none' is what the model itself says."
)
_TOGETHER_HEADER = ("held-out text", "base", "the three composed", "kept")
_TOGETHER = (
    "One model with the three files, whose routers were solved from the files alone; nobody says "
    "which text is which."
)
_PICTURE = "Every token in the colour of the expert that most layers of this model sent it to."
_CONTINUED = (
    "The most probable tokens after the beginning of each held-out text: before of the base, after "
    f"with the quiet expert of the domain, of {FOREIGN} with all three."
)


def train_experts(output_dir: Path, steps: int, seed: int) -> dict:
    """Train experts of three domains apart, make each quiet, and compose them; returns the
    results."""
    logging.disable_progress_bar()
    start = time.perf_counter()
    base, tokenizer = load_stand_in("gpt2")
    tokenizer.model_max_length = 10**9  # texts are cut into pieces

    def loss(model: Any, text: str) -> float:
        return float(token_losses(model, held_out[text]).mean())

    foreign = "\n\n".join(record.text for record in load_documentation("test")[::7])
    texts = {name: domain_text(name, True) for name in DOMAINS} | {FOREIGN: foreign}
    held_out = {
        name: batches(pieces(text, tokenizer, LENGTH, TESTED)) for name, text in texts.items()
    }
    losses = {text: {"base": loss(base, text)} for text in held_out}
    lost: dict[str, dict[str, float]] = {}
    files = []
    after: dict = {}
    folder = output_dir / EXPERTS_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    # Without the general text of the default background, which is a domain here.
    background = pooled_background(base, [token_batches(own_texts(base, tokenizer))])
    save_background(background, base, folder / BACKGROUND_FILE)
    for number, name in enumerate(DOMAINS):
        started = time.perf_counter()
        domain_pieces = pieces(domain_text(name, False), tokenizer, LENGTH, MOST)
        model = _train(base, domain_pieces, steps, seed + number)
        files.append(folder / f"{name}.expert")
        # of all of its files
        taken = torch.randperm(len(domain_pieces))[:OF_STATISTICS]
        statistics = collect_statistics(model, batches(domain_pieces[taken]))
        save_expert(
            model, files[-1], statistics=statistics, tokenizer=tokenizer, training={"steps": steps}
        )
        quiet = compose_experts(base, files[-1:], background=background)
        after[name] = quiet
        lost[name] = {}
        for way, tested in (("always_on", model), ("quiet", quiet)):
            losses[name][way] = loss(tested, name)
            lost[name][way] = loss(tested, FOREIGN) - losses[FOREIGN]["base"]
        seconds = time.perf_counter() - started
        print(f"trained {files[-1]} on {domain_pieces.numel():,} tokens in {seconds:.0f} s")
    mixture = compose_experts(base, files, background=background, tokenizer=tokenizer)
    after[FOREIGN] = mixture
    for text in held_out:
        losses[text]["composed"] = loss(mixture, text)
    output = check_model_output("model", output_dir / MODEL_FOLDER, True)
    with model_folder(output, mixture, tokenizer) as staging:
        keep_experts(mixture, staging)
    first = {text: batch[0]["input_ids"][0] for text, batch in held_out.items()}
    results: dict = {
        "steps": steps,
        "seed": seed,
        "experts": mixture.config.mpoe_experts,
        "losses": losses,
        "lost": lost,
        "kept": kept(losses),
        "picture": {text: _coloured(mixture, tokenizer, ids) for text, ids in first.items()},
        "continued": {
            text: _continued({"before": base, "after": after[text]}, tokenizer, ids[:PROMPT])
            for text, ids in first.items()
        },
        "megabytes": {file.name: file.stat().st_size / 1e6 for file in files},
        "seconds": time.perf_counter() - start,
    }
    _tell(output_dir / REPORT_FILE, results)
    write_json(output_dir / RESULTS_FILE, results)
    print(
        f"{output_dir / REPORT_FILE}, {output_dir / RESULTS_FILE}, experts and the mixture in "
        f"{output_dir}"
    )
    return results


def _train(base: Any, pieces: Any, steps: int, seed: int) -> Any:
    """An expert beside ``base``, trained on random pieces."""
    torch.manual_seed(seed)
    model = start_expert(base, NEURONS).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    # Of at least ten steps: the schedule divides by the steps of a warm-up.
    schedule = OneCycleLR(optimizer, RATE, total_steps=max(steps, 10) + 1, pct_start=0.1)
    for _ in range(steps):
        ids = pieces[torch.randint(len(pieces), (AT_ONCE,))]
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval()


def _coloured(mixture: Any, tokenizer: Any, ids: Any) -> list[tuple[str, int]]:
    """The first tokens of a text, each with the expert that most layers sent it to."""
    (route,) = route_text(mixture, tokenizer, tokenizer.decode(ids[:SHOWN]))
    by_token = zip(*([best[0] for best in layer] for layer in route.experts), strict=True)
    experts = [mode(of_layers) for of_layers in by_token]
    shown = [token.replace("\\n", " ") for token in route.tokens]
    return list(zip(shown, experts, strict=True))


def _continued(models: Mapping, tokenizer: Any, ids: Any) -> dict[str, str]:
    """A prompt, and how each model goes on."""
    prompt = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids[None])}
    said = {"prompt": tokenizer.decode(ids)}
    for name, model in models.items():
        written = model.generate(**prompt, max_new_tokens=NEW, do_sample=False)
        said[name] = tokenizer.decode(written[0, len(ids) :])
    return said


def kept(losses: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Share of its expert's gain that each domain keeps, with it alone and with all three."""
    shares = {}
    for name, by_way in losses.items():
        if name != FOREIGN:
            gain = by_way["base"] - by_way["always_on"]
            shares[name] = {
                way: (by_way["base"] - by_way[way]) / gain for way in ("quiet", "composed")
            }
    return shares


def conclusions(results: Mapping) -> list[str]:
    """What the numbers say, and what they do not."""
    shares = results["kept"].values()
    lost = results["lost"].values()
    foreign = results["losses"][FOREIGN]
    return [
        f"A quiet expert keeps {fmean(share['quiet'] for share in shares):.0%} of its gain and "
        f"costs {FOREIGN} {fmean(way['quiet'] for way in lost):.3f} nats; always on it costs "
        f"{fmean(way['always_on'] for way in lost):.3f} (means of the three).",
        f"The three in one model keep {fmean(share['composed'] for share in shares):.0%} and cost "
        f"{FOREIGN} {foreign['composed'] - foreign['base']:.3f}.",
        "The model has a million numbers; of one of 135 million docs/evidence.md tells. This shows "
        "neither longer training nor domains that are nearer to each other.",
    ]


def _tell(file: Path, results: Mapping) -> None:
    """Print, and write as ``report.html``: tables, coloured tokens, continuations and what they
    say."""
    losses = results["losses"]
    lost = results["lost"]
    shares = results["kept"]
    names = results["experts"]
    rows = []
    together = []
    gains = []
    costs = []
    for name in lost:
        base, always_on, quiet, composed = losses[name].values()
        by_way = lost[name]
        numbers = [f"{value:.3f}" for value in (base, always_on, quiet)]
        costs_of_ways = [f"{by_way[way]:+.3f}" for way in ("always_on", "quiet")]
        rows.append([name, *numbers, f"{shares[name]['quiet']:.0%}", *costs_of_ways])
        together.append([name, f"{base:.3f}", f"{composed:.3f}", f"{shares[name]['composed']:.0%}"])
        gains += [(f"{name}, always on", base - always_on), (f"{name}, quiet", base - quiet)]
        costs += [(f"{name}, always on", by_way["always_on"]), (f"{name}, quiet", by_way["quiet"])]
    base, composed = losses[FOREIGN].values()
    together.append([FOREIGN, f"{base:.3f}", f"{composed:.3f}", f"{composed - base:+.3f} lost"])
    title = f"An expert of each domain: {results['steps']} steps, seed {results['seed']}"
    apart = Table(_APART_HEADER, rows, title, _APART)
    mixture = Table(_TOGETHER_HEADER, together, "All three in one model", _TOGETHER)
    lines = []
    for text, said in results["continued"].items():
        lines += [[text, said["prompt"]], *([when, said[when]] for when in ("before", "after"))]
    continued = Table((), lines, "Before and after", _CONTINUED, kind="text")
    conclusion = conclusions(results)
    apart.show()
    mixture.show()
    colours = expert_colours(len(names))
    console = Console()
    known = zip(names, colours, strict=True)
    console.print(Text(_PICTURE, style="dim"))
    console.print(Text(" ").join(Text(f" {n} ", f"black on {c}") for n, c in known))
    for text, tokens in results["picture"].items():
        coloured = [(token, f"black on {colours[expert]}") for token, expert in tokens]
        console.print(Text.assemble(f"{text}: ", *coloured))
    continued.show()
    print("\n".join([*conclusion, f"{results['seconds']:.0f} seconds."]))
    items = Markup("").join(Markup("<li>{}</li>").format(line) for line in conclusion)
    bars = [
        section("Gained on its domain, nats per token", bars_html(gains)),
        section(f"Lost on {FOREIGN}, nats per token", bars_html(costs)),
    ]
    picture = section("Who took which token", tokens_html(results["picture"], names), note=_PICTURE)
    parts = [Markup("<ul>{}</ul>").format(items), apart.section(), *bars, mixture.section()]
    write_page(file, "mpoe demo: quiet experts", [*parts, picture, continued.section()])
