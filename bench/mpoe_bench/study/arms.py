"""A study with arms: their models and FLOPs, and one training loop.

Within a seed every arm has the same start and the same data in the same order.
"""

import argparse
import copy
import math
import time
from collections.abc import Callable, Iterable
from fractions import Fraction
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import GPT2Config, GPT2LMHeadModel

from mpoe.config import MPOEConfig
from mpoe.layers import DenseExperts
from mpoe.models import convert_to_mpoe
from mpoe.training import MPOETrainingArguments, build_param_groups
from mpoe_bench.study.experts import mean_loss
from mpoe_bench.study.plan import LAYERS, Arm, Corner, Record, Records, Run, Study, read_study
from mpoe_bench.study.tables import ArmsResults
from mpoe_bench.study.texts import BLOCK, Blocks, batches, read_blocks

VOCABULARY = 256
# GPT-2's .02 is for models ten times as wide; here, models would learn so slowly that width would
# be mistaken for capacity.
INIT_STD = 0.1


def dense_model(model: int, hidden: int, seed: int, layers: int = LAYERS) -> GPT2LMHeadModel:
    """A GPT-2 of bytes with random weights from ``seed``: ``layers`` layers of size ``model``."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=BLOCK,
        n_embd=model,
        n_layer=layers,
        n_head=max(model // 16, 1),
        n_inner=hidden,
        activation_function="gelu_pytorch_tanh",  # GPT-2's own in one op
        initializer_range=INIT_STD,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    made = GPT2LMHeadModel(config)
    made.loss_type = "ForCausalLM"
    return made


def convert(dense: GPT2LMHeadModel, arm: Arm, model: int, seed: int) -> nn.Module:
    """``dense`` as the mixture of an arm, in place."""
    torch.manual_seed(20_000 + seed)
    mixture = convert_to_mpoe(dense, MPOEConfig(**arm.fields(model)), inplace=True)
    if arm.own_start:
        for module in mixture.modules():
            if isinstance(module, DenseExperts):
                for projection in module.projections().values():
                    nn.init.normal_(projection.weight, std=INIT_STD)
    return mixture


class Costs(NamedTuple):
    """Sizes of a feed-forward layer of an arm and its model's FLOPs.

    Attributes:
        weights: matrices of the dense network and the experts; ``parameters``: biases and the
            router too.
        flops: multiply-adds of a token in the layer, router in.
        whole_flops: of a token in the whole model, head in; attention sees half of a block on
            average.
    """

    weights: int
    parameters: int
    flops: float
    whole_flops: float


def costs(study: Study, key: str, model: int, layers: int = LAYERS) -> Costs:
    """The costs of an arm, after its conversion."""
    return costs_of(study.arms[key], model, dense_hidden(study, key, model), layers)


def costs_of(arm: Arm, model: int, hidden: int, layers: int = LAYERS) -> Costs:
    """Those of an arm whose dense network has ``hidden`` hidden units."""
    made = dense_model(model, hidden, 0, layers=1)
    dense = 2 * model * hidden
    flops = float(dense)
    if arm.experts is not None:
        made = convert(made, arm, model, 0)
    network = made.transformer.h[0].mlp
    if arm.experts is not None:
        config = made.mpoe_config
        relative = config.top_k
        if config.keeps_network:
            relative = network.relative_flops(config.top_k)
        flops = relative * dense + model * config.num_experts
    weights = 0
    parameters = 0
    for name, parameter in network.named_parameters():
        parameters += parameter.numel()
        if parameter.ndim > 1 and "router" not in name and "bias" not in name:
            weights += parameter.numel()
    attention = 4 * model**2 + 2 * model * (BLOCK + 1) / 2
    whole = layers * (attention + flops) + model * VOCABULARY
    return Costs(weights, parameters, flops, whole)


def dense_hidden(study: Study, key: str, model: int) -> int:
    """Hidden size of an arm's dense network: its own, or, to the next multiple of 8, as costly as
    another arm's."""
    arm = study.arms[key]
    if arm.flops_of:
        units = costs(study, arm.flops_of, model).flops / (2 * model)
    elif arm.size_of:  # each hidden unit has a bias, and each output
        units = (costs(study, arm.size_of, model).parameters - model) / (2 * model + 1)
    else:
        return int(Fraction(arm.hidden) * 4 * model)
    return round(units / 8) * 8


def steps_of(study: Study, key: str, corner: Corner) -> int:
    """The steps of an arm: those of the corner, or as many as another arm's training FLOPs
    allow."""
    arm = study.arms[key]
    if arm.budget_of is None:
        return corner.steps
    model = corner.model
    layers = corner.layers
    other = study.arms[arm.budget_of]
    hidden = dense_hidden(study, arm.budget_of, model)
    mixture = costs(study, arm.budget_of, model, layers).whole_flops
    before = costs_of(Arm(""), model, hidden, layers).whole_flops
    until = other.dense_until if other.experts else 1.0
    spent = until * before + (1 - until) * mixture
    return round(corner.steps * spent / costs(study, key, model, layers).whole_flops)


WARMUP = 0.05  # share of the steps
CLIP = 1.0
WEIGHT_DECAY = 0.01
BETAS = (0.9, 0.98)


def schedule(step: int, steps: int) -> float:
    """Factor on every rate in step ``step``, counted from 0: linear warm-up, then a cosine to 0."""
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    rest = max(1, steps - warmup)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / rest))


def optimiser(model: nn.Module, rate: float) -> torch.optim.AdamW:
    """AdamW on the package's parameter groups; every weight at the same rate."""
    arguments = MPOETrainingArguments(
        output_dir="unused",
        regime="scratch",
        learning_rate=rate,
        central_lr_scale=1.0,
        auxiliary_lr_scale=1.0,
        weight_decay=WEIGHT_DECAY,
        use_cpu=True,
        report_to=[],
    )
    return torch.optim.AdamW(build_param_groups(model, arguments), betas=BETAS, fused=True)


def train_steps(
    model: nn.Module,
    adam: torch.optim.Optimizer,
    steps: int,
    batches: Iterable[Tensor],
    first: int = 0,
    loss_of: Callable[[Any, Tensor], Tensor] | None = None,
) -> None:
    """Train in those of the ``steps`` of a run that begin with ``first``, at most at ``adam``'s
    rates.

    ``loss_of``: the model and token ids -> the loss; default: the model's own.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    parameters = list(model.parameters())
    rates = LambdaLR(adam, lambda step: schedule(first + step, steps))
    for step, ids in enumerate(batches, first):
        loss = loss_of(model, ids) if loss_of else model(input_ids=ids, labels=ids).loss
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, CLIP)
        adam.step()
        adam.zero_grad()
        rates.step()
        value = loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(f"is {value} in step {step}")


class Trained(NamedTuple):
    """A run's model, and the CPU time of its training."""

    model: Any
    seconds: float


Starts = dict[tuple, Trained]  # dense models that mixtures start from


def train(study: Study, run: Run, data: dict[str, Blocks], starts: Starts) -> Trained:
    """Train a run's model. ``starts``: mixtures of one seed and rate start from the same dense
    model, trained once.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    arm = study.arms[run.arm]
    size = run.corner.model
    layers = run.corner.layers
    steps = steps_of(study, run.arm, run.corner)
    hidden = dense_hidden(study, run.arm, size)
    drawn = list(batches(data["train"], run.seed, steps))

    def trained(model: Any, first: int, end: int) -> Trained:
        begin = time.process_time()
        adam = optimiser(model, run.rate)
        train_steps(model.train(), adam, steps, drawn[first:end], first)
        return Trained(model, time.process_time() - begin)

    dense = dense_model(size, hidden, run.seed, layers)
    if arm.experts is None:
        return trained(dense, 0, steps)
    until = round(arm.dense_until * steps)
    key = size, layers, hidden, run.seed, run.rate, steps, until
    if key not in starts:
        starts[key] = trained(dense, 0, until)
    start = starts[key]
    mixture = convert(copy.deepcopy(start.model), arm, size, run.seed)
    end = trained(mixture, until, steps)
    return Trained(mixture, start.seconds + end.seconds)


def evaluate(model: Any, blocks: Blocks) -> dict[str, float]:
    """Loss per byte of every domain."""
    return {domain: mean_loss(model, ids) for domain, ids in blocks.items()}


def run_once(study: Study, run: Run, data: dict[str, Blocks], starts: Starts) -> Record:
    """Train and evaluate; returns one JSON-able record. ``starts``: see `train`.

    ``cpu_seconds`` is the process's CPU time for the training alone; losses are means over domains,
    in nats per byte.
    """
    try:
        model, seconds = train(study, run, data, starts)
    except FloatingPointError as error:
        return {
            "diverged": f"the loss of {run.key} {error}",
            "validation": math.inf,
            "test": math.inf,
        }
    model.eval()
    size = run.corner.model
    validation = evaluate(model, data["validation"])
    test = evaluate(model, data["test"])
    mixture = costs(study, run.arm, size, run.corner.layers)
    dense = costs(study, study.reference, size, run.corner.layers)
    pairs = zip(Costs._fields, mixture, dense, strict=True)
    return {
        "validation": round(fmean(validation.values()), 5),
        "test": round(fmean(test.values()), 5),
        "parts": {domain: round(loss, 4) for domain, loss in test.items()},
        "hidden": dense_hidden(study, run.arm, size),
        "steps": steps_of(study, run.arm, run.corner),
        **{name: round(cost / of_dense, 3) for name, cost, of_dense in pairs},
        "cpu_seconds": round(seconds, 1),
    }


class ArmsStudy:
    """Makes the runs of a study with arms."""

    def __init__(self, file: Path) -> None:
        self.study = read_study(file)
        self.starts = {}

    def waiting(self, records: Records) -> list[str]:
        """Keys of runs that are missing and whose rate is known, in order: of a stage first those
        that choose rates."""
        study = self.study
        results = ArmsResults(study, records)
        keys = []
        for stage in study.stages:
            for arm in stage.arms:
                keys += [run.key for run in study.candidates(stage.model, arm)]
            for seed in study.seeds:
                for arm in stage.arms:
                    runs = results.runs_of(stage.corner, arm)
                    keys += [run.key for run in runs if run.seed == seed]
        return [key for key in dict.fromkeys(keys) if key not in records]

    def prepare(self, arguments: argparse.Namespace) -> None:
        """Read what the runs need.

        Raises:
            FileNotFoundError, ValueError: an option is missing, or what it names.
        """
        if arguments.data_dir is None:
            raise ValueError("data_dir must name the folder of the texts; got none")
        self.data = read_blocks(arguments.data_dir)

    def make(self, key: str, records: Records) -> Record:
        """Make a run that waits; its record, JSON-able."""
        return run_once(self.study, Run.of(key), self.data, self.starts)

    def table(self, records: Records) -> str:
        return ArmsResults(self.study, records).page()
