"""`mpoe demo --compare`: a dense model, a wider one, Switch and MPO experts, trained alike by
`mpoe train` and put side by side by `mpoe compare`."""

from pathlib import Path
from typing import NamedTuple

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


class Settings(NamedTuple):
    """Options of all arms, and learning rates, chosen on the validation items."""

    options: str
    baseline_rate: str
    mixture_rate: str


SETTINGS = {
    # rates from .001, .0015 and .002 with 200 steps of two seeds
    "t5": Settings(
        "--tasks doc_module --max_steps 200 --per_device_train_batch_size 32", "1e-3", "1.5e-3"
    ),
    "gpt2": Settings(
        "--tasks doc_lm --max_steps 60 --per_device_train_batch_size 16", "3e-4", "3e-4"
    ),
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


def compare_arms(output_dir: Path, model: str, steps: int | None, seed: int) -> None:
    """Train the arms alike, each in a folder of its own, and put them side by side."""
    from mpoe.cli import compare, train

    settings = SETTINGS[model]
    alike = f"{settings.options} --model {model} --seed {seed} {_ALIKE}"
    if steps:
        alike += f" --max_steps {steps}"
    for arm, options in ARMS.items():
        print(f"{arm}:")
        rate = settings.baseline_rate if "--baseline" in options else settings.mixture_rate
        words = f"{alike} --learning_rate {rate} {options}"
        train.command([*words.split(), "--output_dir", str(output_dir / arm)])
    runs = [str(output_dir / arm) for arm in ARMS]
    compare.command([*runs, "--output_dir", str(output_dir), "--overwrite"])
    print(_COMPARED)
