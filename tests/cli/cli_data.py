"""Command lines as they are typed; small data: rows in a file, and folders that described tasks
fit."""

import json
import shlex

import torch
from safetensors.torch import load_file

from mpoe import collect_statistics, save_expert, start_expert
from mpoe.cli import main
from mpoe.data.stand_in_models import load_stand_in
from mpoe.data.tasks import find_spec
from mpoe.models.walk import neuron_modules


def words(*lines):
    """The arguments that a shell makes of command lines; what holds spaces stands in quotes."""
    return [word for line in lines for word in shlex.split(str(line))]


def run(*lines):
    """`mpoe` with these words, whose errors are raised."""
    return main.run(words(*lines))


def write_rows(file, rows):
    """One JSON object per line."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_expert(file, first_token=0, neurons=8, changed=0, training=None):
    """An expert of the tiny GPT-2, or of one whose weights were ``changed``, with statistics of
    tokens from ``first_token`` on."""
    base, tokenizer = load_stand_in("gpt2")
    base.transformer.h[0].mlp.c_fc.weight.data += changed
    model = start_expert(base, neurons)
    for layer in neuron_modules(model).values():
        torch.nn.init.normal_(layer.experts.down, std=0.02)
    ids = torch.randint(first_token, first_token + 100, (4, 16))
    statistics = collect_statistics(model, [{"input_ids": ids}])
    save_expert(model, file, statistics=statistics, tokenizer=tokenizer, training=training)


def same_weights(first, second):
    one, two = (load_file(folder / "model.safetensors") for folder in (first, second))
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def write_sentiment(folder):
    """A tiny two-class task."""
    folder.mkdir(parents=True)
    for split, size in (("train", 24), ("validation", 8), ("test", 8)):
        rows = [
            {"sentence": f"the film number {i} is {'good' if i % 2 else 'bad'}", "label": i % 2}
            for i in range(size)
        ]
        write_rows(folder / f"{split}.jsonl", rows)
    return folder


def write_described(data_dir, spec):
    """A folder ``spec.name`` in ``data_dir`` with a few rows that the description fits."""
    folder = data_dir / spec.name
    folder.mkdir(parents=True, exist_ok=True)
    labels = [label for label, word in spec.label_words.items() if word is not None] or [0.4, 3]
    for split, size in (("train", 16), ("validation", 8), ("test", 4)):
        rows = [
            {
                **{column: f"{column} {i} of {split}" for column in spec.columns},
                spec.label_column: labels[i % 2],
            }
            for i in range(size)
        ]
        write_rows(folder / f"{split}.jsonl", rows)
    return folder


def described(data_dir, *names):
    """`write_described` of known tasks."""
    for name in names:
        spec = find_spec(name)
        write_described(data_dir, spec)
    return data_dir
