"""`mpoe inspect MODEL`: routes of tokens, singular values at the bonds, growth of parameters; as a report with plots.

Of a mixture that `mpoe compose` made of experts it also says what each expert is worth on the texts: the loss without
it, and the distance to the best single expert of every token.

MODEL is the folder of a converted model or of a training run, whose curves are drawn too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpoe.cli.errors import CommandError
from mpoe.cli.files import REPORT_FILE
from mpoe.cli.parsing import option, read_command
from mpoe.cli.run_data import data_of_run
from mpoe.cli.tasks import DataOptions, resolve
from mpoe.models.table import ENCODER, SEQ2SEQ
from mpoe.plotting import have_matplotlib

if TYPE_CHECKING:
    from mpoe.data.task import Task
    from mpoe.inspection.composed import Worth

_AT_ONCE = 16  # items of a batch
_MAX_TOKENS = 60  # of the items that are shown when no text is given


@dataclass
class InspectOptions:
    """Options that only `inspect` has."""

    _argument_group_name = "inspection"

    text: list[str] = option([], "sentences whose tokens are followed; default: the first two items of the data")
    output_dir: str = option("mpoe_inspect", "folder for report.html, plots and inspect.json")
    overwrite: bool = option(False, "replace the report in the output folder")
    split: str = option("validation", "items that the expert load is counted on")
    num_items: int = option(256, "at most so many of them")
    num_tokens: int = option(2048, "tokens of the pass that plans are for")

    def __post_init__(self) -> None:
        if any(not text.strip() for text in self.text):
            raise ValueError("text must hold words; got an empty one")
        for name in ("num_items", "num_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")


def command(arguments: Sequence[str]) -> None:
    """Run the command on its tokens."""
    usage = "mpoe inspect MODEL [--flag value ...]"
    asked = read_command(usage, __doc__, [InspectOptions, DataOptions], arguments, words=1)
    if asked is None:
        return
    if not asked.words:
        raise CommandError(f"inspect needs a model first: {usage}")
    options, data = asked.options
    data, seed, described = data_of_run(asked.words[0], data, asked.given)
    if not have_matplotlib():
        raise CommandError('inspect draws with matplotlib, which is not installed: pip install "mpoe[report]"')
    find_tasks = partial(resolve, data.eval_tasks or data.tasks, data, data_seed=seed, described=described)
    run(asked.words[0], options, find_tasks)


def _checked_folder(options: InspectOptions) -> Path:
    from mpoe.training.output_dir import check_folder

    folder = check_folder("output_dir", Path(options.output_dir))
    if (folder / "config.json").exists():
        raise CommandError(f"output_dir {folder} holds a model; choose another folder")
    if (folder / REPORT_FILE).exists() and not options.overwrite:
        raise CommandError(f"output_dir {folder} holds an earlier report; give --overwrite, or another --output_dir")
    return folder


def run(name: str, options: InspectOptions, find_tasks: Callable[..., list[Task]]) -> None:
    """Inspect the model ``name``; writes the report. ``find_tasks(style=...)`` gives the tasks whose items count."""
    folder = _checked_folder(options)
    from mpoe.cli.pretrained import find, load_model, load_tokenizer

    source = find(name)
    if not source.is_mpoe:
        raise CommandError(
            f"{name} is a dense {source.model_type}; inspect looks into mixtures: mpoe convert {name} OUT, then "
            "mpoe inspect OUT"
        )
    records = _curves(Path(name))
    tokenizer = load_tokenizer(source)
    tasks = find_tasks(style=SEQ2SEQ if source.style == ENCODER else source.style)
    items = _items(source.style, options, tasks, tokenizer)
    model = load_model(source)
    counted = f"{len(items)} {options.split} items of {', '.join(task.name for task in tasks)}"
    print(f"{name}: counting {counted}, following tokens, reading bonds")
    from mpoe.cli.inspect_sections import Inspection

    texts = options.text or _shown(items, tokenizer)
    inspection = Inspection(name, model, tokenizer, items, counted, records, texts, options.num_tokens)
    if source.style != ENCODER:
        inspection.worth = _worth(Path(name), model, tokenizer, items, options.text)
    inspection.write(folder)
    for line in inspection.worth_lines():
        print(line)
    print(f"plots, numbers and report are in {folder}; open {folder / REPORT_FILE}")


def _worth(folder: Path, model: Any, tokenizer: Any, items: list[dict[str, Any]], texts: Sequence[str]) -> Worth | None:
    """What the experts of a composed mixture are worth on ``texts``, or on the items; None for other models."""
    from mpoe.data.collate import PaddingCollator
    from mpoe.inspection.composed import composed_worth
    from mpoe.models.expert_mixture import EXPERTS_FOLDER, kept_experts

    if not (folder / EXPERTS_FOLDER).is_dir():
        return None
    experts, background = kept_experts(folder)
    classes = [*(expert.statistics for expert in experts), *([] if background is None else [background])]
    if texts and not model.config.is_encoder_decoder:
        rows = tokenizer(list(texts))["input_ids"]
        items = [{"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids} for ids in rows]
    collate = PaddingCollator(tokenizer.pad_token_id)
    parts = (items[start : start + _AT_ONCE] for start in range(0, len(items), _AT_ONCE))
    return composed_worth(model, classes, [collate(part) for part in parts])


def _curves(folder: Path) -> list[dict[str, Any]]:
    """Records of a training run, if this is the folder of one."""
    from mpoe.training.metrics_file import METRICS_FILE, read_metrics

    return read_metrics(folder) if (folder / METRICS_FILE).is_file() else []


def _items(style: str, options: InspectOptions, tasks: Sequence[Task], tokenizer: Any) -> list[dict[str, Any]]:
    """Encoded items on which the expert load is counted; an encoder reads only the inputs."""
    from mpoe.cli.scoring import encode_task

    share = -(-options.num_items // len(tasks))
    if style != ENCODER:
        return [item for task in tasks for item in encode_task(task, options.split, tokenizer, share, style)]
    texts = [example.source for task in tasks for example in task.examples(options.split)[:share]]
    encoded = tokenizer(texts, truncation=True, max_length=128)
    return [
        {"input_ids": ids, "attention_mask": mask}
        for ids, mask in zip(encoded["input_ids"], encoded["attention_mask"], strict=True)
    ]


def _shown(items: Sequence[dict[str, Any]], tokenizer: Any) -> list[str]:
    """The beginnings of the first two items, as text."""
    return [tokenizer.decode(item["input_ids"][:_MAX_TOKENS], skip_special_tokens=True) for item in items[:2]]
