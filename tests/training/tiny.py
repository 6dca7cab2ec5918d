"""Tiny random models, data and trainers for tests of `MPOETrainer`."""

import dataclasses
import os
import signal
import sys
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import TrainerCallback

from mpoe.config import MPOEConfig, RouterConfig
from mpoe.layers import MPOEFeedForward
from mpoe.models import convert_to_mpoe
from mpoe.models.walk import mpo_modules
from mpoe.training import MPOETrainer, MPOETrainingArguments

from ..models.tiny_models import copied, tiny_config

# What Transformers' arguments call it, by release.
CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in {field.name for field in dataclasses.fields(MPOETrainingArguments)}
)

VOCABULARY = 40
PAD, EOS = 0, 1


def dense_model(family, dropout=0.0):
    name, rates, sizes = {
        "t5": (
            "T5ForConditionalGeneration",
            ["dropout_rate"],
            {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 1},
        ),
        "gpt2": (
            "GPT2LMHeadModel",
            ["resid_pdrop", "embd_pdrop", "attn_pdrop"],
            {"n_embd": 32, "bos_token_id": EOS},
        ),
        "bert": (
            "BertForSequenceClassification",
            ["hidden_dropout_prob", "attention_probs_dropout_prob"],
            {"hidden_size": 32, "intermediate_size": 64, "num_labels": 2},
        ),
    }[family]
    config = tiny_config(family, vocab_size=VOCABULARY, **sizes, **dict.fromkeys(rates, dropout))
    return getattr(transformers, name)(config)


@copied
def mpoe_model(family, dropout=0.0, jitter=0.0, seed=0, **config):
    torch.manual_seed(seed)
    router = RouterConfig(jitter=jitter, balance_loss_weight=0.05, z_loss_weight=0.01)
    options = {"num_experts": 4, "shape": "separable", "router": router, **config}
    return convert_to_mpoe(dense_model(family, dropout), MPOEConfig(**options))


class Rows(torch.utils.data.Dataset):
    """Random sequences of different lengths, padded to one; targets have different lengths too."""

    def __init__(self, family, rows=48, seed=1):
        generator = torch.Generator().manual_seed(seed)
        self.rows = []
        for _ in range(rows):
            ids = torch.randint(3, VOCABULARY, (12,), generator=generator)
            length = int(torch.randint(4, 13, (1,), generator=generator))
            mask = (torch.arange(12) < length).long()
            row = {"input_ids": ids * mask, "attention_mask": mask}
            if family == "t5":
                # Sorting-like task: the target is the first tokens of the source.
                targets = int(torch.randint(1, 7, (1,), generator=generator))
                row["labels"] = torch.where(torch.arange(6) < targets, ids[:6], -100)
            elif family == "gpt2":
                row["labels"] = torch.where(mask.bool(), ids, -100)
            else:
                row["labels"] = ids[0] % 2
            self.rows.append(row)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def arguments(output_dir, **options):
    defaults = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 8,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return MPOETrainingArguments(**{**defaults, **options})


def make_trainer(output_dir, family="t5", model=None, **options):
    names = ("callbacks", "compute_metrics", "train_dataset", "eval_dataset", "previous_optimizer")
    given = {name: options.pop(name) for name in names if name in options}
    given.setdefault("train_dataset", Rows(family))
    given.setdefault("eval_dataset", Rows(family, rows=20, seed=2))
    model = mpoe_model(family) if model is None else model
    return MPOETrainer(model=model, args=arguments(output_dir, **options), **given)


class Watch(TrainerCallback):
    """Names of the parameters that every optimizer step changes, or whose Adam state it does; when
    they are masked."""

    def __init__(self):
        self.changed = []
        self.masked = []  # in every micro-batch

    def held(self, model, optimizer):
        """Of a sharded model, this rank's part."""
        state = getattr(optimizer, "optimizer", optimizer).state
        own = {
            name: [p, *(v for _, v in sorted(state.get(p, {}).items()))]
            for name, p in model.named_parameters()
        }
        return {
            name: [getattr(v, "_local_tensor", v).detach().clone() for v in each]
            for name, each in own.items()
        }

    def on_step_begin(self, args, state, control, model, optimizer, **kwargs):
        self.before = self.held(model, optimizer)

    def on_substep_end(self, args, state, control, model=None, **kwargs):
        self.masked.append(all_masked(model))

    on_pre_optimizer_step = on_substep_end

    def on_optimizer_step(self, args, state, control, model, optimizer, **kwargs):
        pairs = (
            (name, self.before[name], now) for name, now in self.held(model, optimizer).items()
        )
        self.changed.append(
            {
                name
                for name, old, new in pairs
                if len(old) != len(new) or not all(map(torch.equal, old, new))
            }
        )


def all_masked(model):
    states = {cores.central_masked for _, cores in mpo_modules(model)}
    assert len(states) < 2, "central cores are masked alike"
    return states == {True}


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


LAST = -1


def preferring(place):
    """In place of `autotune._seconds`: the candidate at ``place`` of those that are timed is the
    fastest."""

    def seconds(runs, device):
        return [0.001 if k == place % len(runs) else 1.0 for k in range(len(runs))]

    return seconds


def main():
    """A run for tests that kill processes: `python -m tests.training.tiny OUTPUT_DIR FAMILY STEPS
    KILL_AT [resume]`.

    KILL_AT is "step-N" (kill the last rank after optimizer step N) or "never". Works under
    torchrun.
    """
    output_dir, family, steps, kill_at = sys.argv[1:5]

    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            last = args.process_index == args.world_size - 1
            if kill_at == f"step-{state.global_step}" and last:
                os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(1)
    trainer = make_trainer(output_dir, **resume_options(family, int(steps)), callbacks=[Kill()])
    trainer.train(resume_from_checkpoint=True if "resume" in sys.argv else None)
    if trainer.is_world_process_zero():
        torch.save(dict(trainer.model.state_dict()), Path(output_dir) / "final.pt")


def resume_options(family, steps):
    """A run in which everything random takes part: dropout, jitter, shuffling, the gradient mask,
    accumulation."""
    return {
        "family": family,
        "model": mpoe_model(family, dropout=0.1, jitter=0.1),
        "max_steps": steps,
        "save_strategy": "steps",
        "save_steps": 3,
        "gradient_mask_prob": 0.5,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 4,
        "warmup_steps": 2,
    }


if __name__ == "__main__":
    main()


class Toy(nn.Module):
    """Two MPOE layers of width 32 and a linear head."""

    def __init__(self, shape="separable", expert_type="mpo"):
        super().__init__()
        config = MPOEConfig(num_experts=4, shape=shape, light_p=8, expert_type=expert_type)
        self.layers = nn.ModuleList(MPOEFeedForward(32, 64, config, bias=True) for _ in range(2))
        self.layer_norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 1)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return self.head(self.layer_norm(x)).square().mean()

    def centrals(self):
        return [p for n, p in self.named_parameters() if n.endswith(".central")]

    def others(self):
        return [p for n, p in self.named_parameters() if not n.endswith(".central")]
