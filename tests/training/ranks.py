"""Runs that one process and two (gloo) must do alike; `main` is one rank's part of the named ones.

Every run goes through the same global batches: rank r of R takes rows r, r + R, ... of each, or the
Trainer's share.
"""

import copy
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from mpoe import MPOEConfig, RouterConfig, convert_to_mpoe
from mpoe.layers import global_batch
from mpoe.models import load_mpoe
from mpoe.models.walk import kept_modules, mpo_modules, routed_layers
from mpoe.training import (
    DivergenceError,
    GradientMask,
    build_param_groups,
    find_last_checkpoint,
    load_sharded_optimizer,
    rank_share,
    save_sharded,
    save_sharded_checkpoint,
    shard_model,
)
from mpoe_kernels.contract import autotune

from .tiny import (
    CHECKPOINTING,
    LAST,
    Rows,
    Watch,
    arguments,
    make_trainer,
    mpoe_model,
    preferring,
    weights,
)

STEPS = 4
BATCH = 8
MASK = {"probability": 0.5, "seed": 5}  # masks the second step of four
EMBEDDING = {"target_modules": ["ffn", "embedding"]}
MANY = {"num_experts": 32}  # more than a rank has tokens in a layer: some get none


def by_trainer(folder, ranks, family, config, **options):
    """`MPOETrainer`: DDP with two ranks; two micro-batches a step, clipping, decay and warm-up."""
    resume = options.pop("resume", None)
    arguments = {
        "train_sampling_strategy": "sequential",
        "per_device_train_batch_size": BATCH // 2 // ranks,
        "gradient_accumulation_steps": 2,
        "max_steps": STEPS,
        "learning_rate": 1e-3,
        "gradient_mask_prob": MASK["probability"],
        "gradient_mask_seed": MASK["seed"],
        **options,
    }
    trainer = make_trainer(
        folder,
        family,
        mpoe_model(family, **config),
        train_dataset=Rows(family, rows=32),
        **arguments,
    )
    trainer.add_callback(watch := Watch())
    trainer.train(resume_from_checkpoint=resume)
    logs = [record for record in trainer.state.log_history if "task_loss" in record]
    return {
        "losses": [record["task_loss"] + record["aux_loss"] for record in logs],
        "aux_losses": [record["aux_loss"] for record in logs],
        "loads": [record["expert_min_share"] for record in logs],
        "masked": watch.masked[1::2],
        "moved": centrals(watch),
        "centrals": {n for n in watch.before if n.endswith(".central")},
        "weights": weights(trainer.model),
    }


def centrals(watch):
    """Central cores that each step changed."""
    return [{name for name in names if name.endswith(".central")} for names in watch.changed]


def diverged(folder):
    """The loss of rank 1 alone is infinite at the second step; its gradient is not."""
    trainer = make_trainer(folder, "t5", max_steps=STEPS)
    original = trainer.compute_loss

    def compute_loss(*arguments, **options):
        bad = trainer.args.process_index == 1 and trainer.state.global_step == 1
        return original(*arguments, **options) + (float("inf") if bad else 0.0)

    trainer.compute_loss = compute_loss
    try:
        trainer.train()
    except DivergenceError as error:
        return {"step": error.step, "message": str(error)}
    return {"step": None, "message": "no error"}


def _plain_loop(
    model,
    family,
    step,
    optimizer,
    bf16=False,
    numbers=range(STEPS),
    seed=MASK["seed"],
    after=lambda number: None,
):
    """The loop of a user: mask, loss over the global batch, backward, optimizer."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    rows = Rows(family, rows=numbers.stop * BATCH)
    inner = getattr(model, "module", model)
    watch = Watch()
    mask = GradientMask(inner, MASK["probability"] if list(mpo_modules(inner)) else 0.0, seed)
    losses, masked = [], []
    model.train()
    for number in numbers:
        batch = [rows[number * BATCH + i] for i in range(rank, BATCH, ranks)]
        inputs = {name: torch.stack([row[name] for row in batch]) for name in batch[0]}
        watch.on_step_begin(None, None, None, inner, optimizer)
        with (
            mask.step(number) as active,
            global_batch(),
            torch.autocast("cpu", torch.bfloat16, enabled=bf16),
        ):
            loss = rank_share(model(**inputs), inputs["labels"], model)
            step(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        watch.on_optimizer_step(None, None, None, inner, optimizer)
        masked.append(active)
        mean = loss.detach().clone()
        if ranks > 1:
            dist.all_reduce(mean)
        losses.append(float(mean) / ranks)
        after(number + 1)
    return {
        "losses": losses,
        "masked": masked,
        "moved": centrals(watch),
        "centrals": {n for n in watch.before if n.endswith(".central")},
    }


def _optimizer(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def by_accelerate(folder, ranks, family, config):
    """A plain loop of Accelerate: DDP with two ranks."""
    AcceleratorState._reset_state()  # of an earlier run, whose precision would be kept
    find_unused = DistributedDataParallelKwargs(
        find_unused_parameters=True
    )  # masked cores take no part
    accelerator = Accelerator(cpu=True, kwargs_handlers=[find_unused])
    assert accelerator.num_processes == ranks
    model = mpoe_model(family, **config)
    prepared, optimizer = accelerator.prepare(model, _optimizer(model))
    return {
        **_plain_loop(prepared, family, accelerator.backward, optimizer),
        "weights": weights(model),
    }


def by_sharding(folder, ranks, family, config, checkpointing=False, bf16=False, dtype=None):
    """A plain loop; with two ranks sharded (FSDP2), gathered and saved at the end."""
    model = mpoe_model(
        family, seed=dist.get_rank() if ranks > 1 else 0, **config
    )  # rank 0's weights win
    if checkpointing:
        model.activation_checkpointing_enable()
    if ranks > 1:
        shard_model(model, dtype=dtype)
    result = _plain_loop(
        model, family, torch.Tensor.backward, _optimizer(model), bf16 or dtype is not None
    )
    if ranks > 1:
        save_sharded(model, folder)
    else:
        model.save_pretrained(folder)
    inputs = {name: value[None] for name, value in Rows(family, rows=1)[0].items()}
    with torch.no_grad():
        result["logits"] = model.eval()(**inputs).logits
    return result


LOOP_STEPS, SAVED = 6, 2
# Masks the first two steps: in the checkpoint after them the central cores have no optimizer state
# yet.
LOOP_SEED = 0


def kept_loop(folder, kill_after=None):
    """A sharded loop that keeps checkpoints: losses of the steps from the last one in the folder
    on, or of all."""
    checkpoint = find_last_checkpoint(folder)
    model = shard_model(load_mpoe(checkpoint).train() if checkpoint else mpoe_model("t5"))
    optimizer = torch.optim.AdamW(build_param_groups(model, arguments("unused")))
    start = load_sharded_optimizer(model, optimizer, checkpoint) if checkpoint else 0
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.8**step, last_epoch=start - 1
    )

    def after(step):
        schedule.step()
        if step == SAVED:
            save_sharded_checkpoint(model, optimizer, folder, step)
        if step == kill_after and dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGKILL)

    options = {"numbers": range(start, LOOP_STEPS), "seed": LOOP_SEED, "after": after}
    losses = _plain_loop(model, "t5", torch.Tensor.backward, optimizer, **options)["losses"]
    return losses


# name: (loop, family, MPOEConfig, options)
RUNS = {
    "trainer": (by_trainer, "t5", {}, {"save_strategy": "steps", "save_steps": 2}),
    "trainer, checkpointing": (by_trainer, "gpt2", EMBEDDING, {CHECKPOINTING: True}),
    "accelerate, idle experts": (by_accelerate, "t5", MANY, {}),
    "sharded, checkpointing": (by_sharding, "gpt2", {**EMBEDDING, **MANY}, {"checkpointing": True}),
}
HIDDEN = {"shape": "hidden", "block_size": 8, "expert_bias": True}
MORE_RUNS = {
    "trainer, bfloat16": (by_trainer, "t5", {}, {"bf16": True}),
    "trainer, idle dense experts": (
        by_trainer,
        "t5",
        {**MANY, "expert_type": "dense"},
        {"gradient_mask_prob": 0.0},
    ),
    "accelerate, bert": (by_accelerate, "bert", {}, {}),
    "sharded, t5 with MPO embedding": (by_sharding, "t5", EMBEDDING, {}),
    "sharded, dense experts": (by_sharding, "t5", {"expert_type": "dense"}, {}),
    "trainer, hidden-side experts": (by_trainer, "t5", HIDDEN, {"gradient_mask_prob": 0.0}),
    "sharded, hidden-side experts": (by_sharding, "gpt2", HIDDEN, {}),
    "sharded, bfloat16": (by_sharding, "t5", {}, {"dtype": torch.bfloat16}),
    "sharded, autocast": (by_sharding, "gpt2", {}, {"bf16": True}),
}


def run(name, folder, ranks):
    loop, family, config, options = (RUNS | MORE_RUNS)[name]
    return loop(folder / name, ranks, family, config, **options)


# ------------------------------------------------------------------ models


SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def mixture(**config):
    """A gated model whose experts differ and contribute, the same one on every rank."""
    torch.manual_seed(0)
    model = convert_to_mpoe(
        LlamaForCausalLM(LlamaConfig(**SIZES)),
        MPOEConfig(num_experts=4, expert_bias=True, **config),
    )
    for layer in kept_modules(model).values():
        for parameter in layer.experts.parameters():
            torch.nn.init.normal_(parameter, std=0.4)
    return model


def whole(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


def one_step(model, rows=slice(None)):
    """Gradients, and weights after one optimizer step, by name."""
    ids = torch.randint(0, 40, (4, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[::2, 5:] = 0  # as many in every half
    with global_batch():
        model(input_ids=ids[rows], attention_mask=mask[rows], labels=ids[rows]).loss.backward()
    named = {name.removeprefix("module."): p for name, p in model.named_parameters()}
    found = {f"d {name}": whole(p.grad) for name, p in named.items()}
    torch.optim.SGD(model.parameters(), lr=0.1, foreach=False).step()
    return {**found, **{name: whole(p.detach()) for name, p in named.items()}}


def check(one, found, kind):
    assert one.keys() == found.keys()
    for name, value in one.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-4, atol=1e-6, msg=lambda m, n=f"{kind} {name}": f"{n}: {m}"
        )


def kept(folder):
    """Experts beside dense networks, under DDP, FSDP2 and Transformers' tensor parallelism."""
    own = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    router = RouterConfig(top_k=2, scoring_func="sigmoid", bias_update_rate=0.01)
    for options in ({"neurons": 8}, {"neurons": 8, "latent": 8}, {"block_size": 8}):
        shape = "neurons" if "neurons" in options else "hidden"
        alone = mixture(shape=shape, router=router, **options)
        alone.save_pretrained(folder / "alone")
        dist.barrier()
        split = type(alone).from_pretrained(folder / "alone", tp_plan="auto").train()
        parts = [name for name, p in split.named_parameters() if hasattr(p, "to_local")]
        assert any("self_attn" in name for name in parts)
        assert any("mlp" in name for name in parts) == (shape == "neurons")
        replicated, sharded = (
            DistributedDataParallel(copy.deepcopy(alone)),
            shard_model(copy.deepcopy(alone)),
        )
        one = one_step(alone)
        for kind, model, rows in (
            ("tensor parallel", split, slice(None)),
            ("DDP", replicated, own),
            ("FSDP2", sharded, own),
        ):
            check(one, one_step(model, rows), f"{kind}, {options}")


def routes(model):
    """Tokens that the model generates, and the experts of each, by layer."""
    found = {}
    hooks = [
        layer.router.register_forward_hook(
            lambda _, __, routed, name=name: found.setdefault(name, []).append(
                routed.top_k_index.tolist()
            )
        )
        for name, layer in routed_layers(model)
    ]
    ids = torch.arange(3, 19).view(2, 8)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        tokens = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)
    for hook in hooks:
        hook.remove()
    return {"experts": found, "tokens": tokens.tolist(), "logits": logits.flatten().tolist()}


def choices(folder):
    """Ranks whose clocks disagree write what each computed: the same tokens of a model whose
    experts are replicated, first alone, then a training."""
    rank = int(os.environ["RANK"])
    os.environ["XDG_CACHE_HOME"] = str(folder / f"cache-{rank}")  # as on two hosts
    os.environ[autotune.SETTING] = "1"
    autotune._seconds = preferring(LAST if rank else 0)
    torch.manual_seed(0)
    config = MPOEConfig(shape="paper", num_experts=4, router=RouterConfig(top_k=2))
    model = convert_to_mpoe(
        LlamaForCausalLM(LlamaConfig(**SIZES, pad_token_id=0, eos_token_id=None)), config
    ).eval()
    for name, parameter in model.named_parameters():
        if "auxiliary" in name or "router" in name:
            torch.nn.init.normal_(parameter, std=0.4)
    model.save_pretrained(folder / f"model-{rank}")
    result = {"alone": routes(model), "chosen alone": autotune.choices()}
    dist.init_process_group("gloo")
    split = type(model).from_pretrained(folder / f"model-{rank}", tp_plan="auto").eval()
    assert any(hasattr(parameter, "to_local") for parameter in split.parameters()), (
        "nothing is split"
    )
    result["split"] = routes(split)
    trainer = make_trainer(folder / "run", "t5", max_steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    result["weights"] = {
        name: weight.flatten().tolist() for name, weight in weights(trainer.model).items()
    }
    result["chosen"] = autotune.choices()
    (folder / f"rank-{rank}.json").write_text(json.dumps(result))
    dist.barrier()


# ------------------------------------------------------------------ processes


def torchrun(name, *arguments, timeout=300):
    """`torchrun` with a module of this folder, its output in `stdout`."""
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        2,
    ]
    command = [*launcher, "-m", f"{__package__}.{name}", *arguments]
    return subprocess.run(
        list(map(str, command)),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        cwd=Path(__file__).parents[2],
    )


def main():
    """`torchrun -m tests.training.ranks FOLDER NAME ...` writes what came out of these runs into
    FOLDER.

    ``loop`` and ``kill`` are `kept_loop`, which is killed in the second case; ``kept`` and
    ``choices`` see there.
    """
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    if names == ["choices"]:
        return choices(folder)
    dist.init_process_group("gloo")
    if names == ["kept"]:
        return kept(folder)
    if names == ["kill"]:
        kept_loop(folder / "killed", kill_after=SAVED + 1)
    if names == ["loop"]:
        results = {name: kept_loop(folder / name) for name in ("straight", "killed", "from one")}
    else:
        results = {name: run(name, folder / "two", 2) for name in names}
    if (folder / "resume").is_dir():  # with a checkpoint of one process
        results["resumed"] = by_trainer(folder / "resume", 2, "t5", {}, resume=True)
        results["own router losses"] = by_trainer(
            folder / "own", 2, "t5", {}, global_router_losses=False
        )
        results["diverged"] = diverged(folder / "diverged")
    torch.save(results, folder / f"rank-{dist.get_rank()}.pt")
    dist.barrier()


if __name__ == "__main__":
    main()
    dist.destroy_process_group()
