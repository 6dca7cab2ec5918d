"""Bad calls of every public name: one or two of the arguments that fit are exchanged for something
else.

That is something of another kind, size, device or dtype, or a path that is not what it seems.
"""

import contextlib
import dataclasses
import itertools
import math
import os
from functools import partial
from pathlib import Path

import torch
from mpoe_bench.cases import random_cores
from torch.utils._pytree import tree_leaves

import mpoe
import mpoe_kernels
from mpoe_kernels import MPOShape, fold, route
from mpoe_kernels.checks import check_memory
from mpoe_kernels.signatures import ARGUMENTS
from tests.cases import resized
from tests.kernels.problems import calls, run
from tests.training.tiny import dense_model, mpoe_model

from . import fuzz

TOKENS, EXPERTS, WIDTH, OUT = 12, 3, 8, 12


# ------------------------------------------------------------------ arguments that fit


def shape():
    return MPOShape((2, 2, 2), (2, 3, 2))


def chain(num_experts=EXPERTS):
    return random_cores(shape(), num_experts, torch.float32)


def one_chain():
    """The cores of one weight, without an axis of experts."""
    return [core.reshape(size) for core, size in zip(chain(1), shape().core_shapes, strict=True)]


def down_blocks():
    mirrored = MPOShape((2, 3, 2), (2, 2, 2))
    return fold(random_cores(mirrored, EXPERTS, torch.float32), 1, mirrored)


def parts(value):
    """Of blocks, a routing or a result."""
    return {each.name: getattr(value, each.name) for each in dataclasses.fields(value) if each.init}


def index():
    return torch.arange(TOKENS).remainder(EXPERTS)[:, None]


def tokens():
    return {"x": torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(2))}


def routed():
    return {
        "routing": route(index(), EXPERTS),
        "top_k_weights": torch.full((TOKENS, 1), 0.5),
        "backend": None,
    }


def linear(**others):
    blocks = fold(chain(), 1, shape())
    return {
        **tokens(),
        "blocks": blocks,
        "bias": torch.zeros(OUT),
        **others,
        "activation": "relu",
        "backend": None,
    }


def chosen(x, **others):
    gates = {"gates": torch.full((TOKENS, 1), 0.5), "top_k_index": index()}
    return {x: tokens()["x"], **gates, **others, "activation": "relu", "backend": None}


def layer(x):
    return {"x": x, "shape": shape(), "backend": None, "device": None, "dtype": None}


def config():
    return mpoe.MPOEConfig(num_experts=2, shape="separable")


def base(family="gpt2"):
    """Always of the same weights: experts know what they were trained on."""
    torch.manual_seed(0)
    return dense_model(family)


def model(**options):
    return {"model": mpoe_model("gpt2", **options)}


def composed():
    return {
        "base": base(),
        "fine_tunes": [base(), dense_model("gpt2")],
        "examples": None,
        "router": "ridge",
    }


def texts():
    return [{"input_ids": torch.arange(8)[None]}]


def trained(folder):
    model = mpoe.start_expert(base(), 4)
    statistics = mpoe.collect_statistics(model, texts())
    return {
        "model": model,
        "path": folder / "an.expert",
        "statistics": statistics,
        "training": {"steps": 3},
    }


def expert(folder):
    mpoe.save_expert(**trained(folder))
    return folder / "an.expert"


def optimizer():
    return {**model(), "optimizer": torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], 0.1)}


def arguments(folder):
    """By public name. Sharding is always refused, for want of a process group."""
    saved = folder / "model"
    weight, sizes = (
        {"weight": torch.randn(WIDTH, OUT), "shape": shape()},
        {"num_experts": 8, "num_tokens": 64},
    )
    one = {"blocks": fold(one_chain(), 1, shape())}
    light = {"num_experts": 4, "shape": "light", "light_p": 8, "router": {"top_k": 2}}
    run = {
        "output_dir": str(folder / "run"),
        "use_cpu": True,
        "learning_rate": 1e-3,
        "gradient_mask_prob": 0.5,
    }
    slots = {
        "row_index": torch.arange(TOKENS, dtype=torch.int32),
        "slot_of_token": torch.arange(TOKENS)[:, None],
    }
    sides = {name: torch.randn(EXPERTS, 1, 4, 4) for name in ("right", "left")}
    own = {name: torch.randn(EXPERTS, 3, WIDTH) for name in ("up", "down", "gate_up")}
    limited = {
        "in_features": WIDTH,
        "num_experts": 4,
        "config": mpoe.RouterConfig(capacity_factor=1.0),
    }
    dense = {"in_features": WIDTH, "hidden_features": 16, "config": config(), "bias": True}
    return {
        "MPOShape": lambda: {
            "in_factors": (2, 4),
            "out_factors": (3, 4),
            "max_bond": 3,
            "central": 1,
        },
        "MPOBlocks": lambda: parts(linear()["blocks"]),
        "Routing": lambda: parts(routed()["routing"]),
        "decompose": lambda: {**weight, "gauge": "symmetric"},
        "decompose_with_errors": lambda: dict(weight),
        "reconstruct": lambda: {"cores": one_chain(), "shape": shape()},
        "fold": lambda: {"cores": chain(), "central": 1, "shape": shape(), "num_experts": EXPERTS},
        "expert_weights": lambda: {"blocks": linear()["blocks"]},
        "route": lambda: {
            "top_k_index": index(),
            "num_experts": EXPERTS,
            "capacity": 5,
            "token_mask": None,
        },
        "dispatch": lambda: {**tokens(), "routing": routed()["routing"], "backend": None},
        "combine": lambda: {"y_sorted": tokens()["x"], **routed()},
        "mpo_linear": lambda: linear(**one),
        "grouped_mpo_linear": lambda: linear(
            expert_offsets=routed()["routing"].expert_offsets, **slots
        ),
        "mpo_ffn": lambda: {
            **tokens(),
            **routed(),
            "up": linear()["blocks"],
            "down": down_blocks(),
            "dropout": 0.0,
        },
        "hidden_experts": lambda: chosen("u", **sides),
        "neuron_experts": lambda: chosen("x", **own),
        "mpo_embedding": lambda: {"ids": torch.arange(5), **one},
        "plan_contraction": lambda: {
            "shape": shape(),
            **sizes,
            "top_k": 1,
            "dtype": torch.float32,
            "training": True,
        },
        "use_backend": lambda: {"name": "eager"},
        "RouterConfig": lambda: {"top_k": 2, "capacity_factor": 1.0, "jitter": 0.1},
        "MPOEConfig": lambda: dict(light),
        "MPOETrainingArguments": lambda: dict(run),
        "MPOETrainer": lambda: {**model(), "args": None},
        "TopKRouter": lambda: {**tokens(), **limited},
        "MPOLinear": lambda: layer(tokens()["x"]),
        "MPOEmbedding": lambda: layer(torch.arange(5)),
        "MPOEFeedForward": lambda: {"x": tokens()["x"][None], **dense},
        "convert_to_mpoe": lambda: {"model": base(), "config": config(), "inplace": False},
        "compose": composed,
        "start_expert": lambda: {"model": base(), "neurons": 4, "expert": None},
        "collect_statistics": lambda: {
            "model": mpoe.start_expert(base(), 4),
            "batches": texts(),
            "rank": 2,
        },
        "save_expert": lambda: trained(folder),
        "load_expert": lambda: {"path": expert(folder)},
        "merge_expert": lambda: {"model": base(), "expert": expert(folder)},
        "compose_experts": lambda: {
            "base": base(),
            "experts": [mpoe.load_expert(expert(folder))],
            "top_k": 2,
            "none": True,
            "background": texts(),
        },
        "freeze_all_but_experts": model,
        "merge_latent": lambda: model(shape="neurons", latent=8),
        "merge_experts": model,
        "load_mpoe": lambda: {"path": saved, "base": None},
        "save_mpoe_only": lambda: {"base": base(), **model(), "path": folder / "only"},
        "import_original": lambda: {"source": saved, "base": dense_model("t5")},
        "lora_on_cores": lambda: {"config": None},
        "global_batch": lambda: {"group": None},
        "shard_model": lambda: {**model(), "mesh": None, "dtype": None},
        "save_sharded": lambda: {**model(), "folder": folder / "sharded"},
        "save_sharded_checkpoint": lambda: {**optimizer(), "folder": folder / "s", "step": 1},
        "load_sharded_optimizer": lambda: {**optimizer(), "checkpoint": saved},
    }


# ------------------------------------------------------------------ what takes them


def forward(factory, x, **options):
    """One of our layers is called with ``x``."""
    return factory(**options)(x)


def within(manager, **options):
    with manager(**options):
        pass


LAYERS = ("TopKRouter", "MPOLinear", "MPOEmbedding", "MPOEFeedForward")
MANAGERS = ("use_backend", "global_batch")


def starts(folder):
    """By public name: the function to call, and what makes its arguments."""
    found = {}
    for name, make in arguments(folder).items():
        function = getattr(mpoe if name in mpoe.__all__ else mpoe_kernels, name)
        function = partial(forward, function) if name in LAYERS else function
        found[name] = partial(within, function) if name in MANAGERS else function, make
    return found


def of_raw_ops():
    """The ops behind the public names."""
    return {
        f"torch.ops.mpoe.{op}{'+grad' * r}": (
            lambda op=op, r=r, **given: run(op, given, r),
            partial(calls, "auto", op),
        )
        for op, r in itertools.product(ARGUMENTS, (False, True))
    }


# ------------------------------------------------------------------ arguments that do not


def misfit_tensors(draw, like):
    size = list(like.shape)
    axis = draw.randrange(len(size)) if size else 0
    yield "on meta", like.to("meta")
    yield "empty", like.new_zeros([0] * len(size))
    if size:
        yield (
            f"size 0 of axis {axis}",
            like.new_zeros([0 if i == axis else n for i, n in enumerate(size)]),
        )
        yield f"axis {axis} too long", torch.cat([like, like], axis)
        yield f"axis {axis} too short", like.narrow(axis, 0, max(size[axis] - 1, 0))
        yield "a huge view", like.new_zeros(()).expand([1 << 40, *size[1:]])
        yield (
            "strided",
            torch.cat([like, like], axis)[(slice(None),) * axis + (slice(None, None, 2),)],
        )
    yield "an axis more", like[None]
    yield "a number", like.new_zeros(())
    for dtype in (
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.int8,
        torch.int64,
        torch.bool,
        torch.complex64,
    ):
        if dtype != like.dtype:
            yield str(dtype), like.to(dtype)
    yield "sparse", like.to_sparse()
    yield "nested", torch.nested.nested_tensor([like, like])
    yield "without memory", resized(like, 0)
    yield "with half of its memory", resized(like, like.nbytes // 2)
    if like.is_floating_point():
        yield "yet to be negated", torch._neg_view(like)
        yield "zeros that stand for themselves", torch._efficientzerotensor(size, dtype=like.dtype)
        yield "with NaN", torch.full_like(like, math.nan)
        yield "needs a gradient", like.clone().requires_grad_()
    elif like.dtype != torch.bool:
        for value in (-1, EXPERTS, 1 << 30):
            yield f"all {value}", torch.full_like(like, value)
        yield "reversed", like.flip(0) if size else like
        yield "random numbers", torch.randint_like(like, -(1 << 31), (1 << 31) - 1)
    if like.dtype == torch.float32:
        yield "of mkldnn", like.to_mkldnn()
        yield "3e38", torch.full_like(like, 3e38)


def unusual_paths(folder):
    """Paths that are not what they seem."""
    names = "absent file loop dangling fifo fifo_model lying cut deep".split()
    return [(name, folder / name) for name in names] + [
        ("no path", "\0"),
        ("a long path", "x" * 5000),
        ("", ""),
    ]


def make_paths(folder):
    """The folder that calls read: a saved model, and what `unusual_paths` names."""
    mpoe_model("gpt2").save_pretrained(folder / "model")
    (folder / "file").write_text("x")
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "dangling").symlink_to(folder / "nowhere")
    os.mkfifo(folder / "fifo")
    weights = (folder / "model/model.safetensors").read_bytes()
    settings = (folder / "model/config.json").read_text()
    for name in ("fifo_model", "lying", "cut", "deep"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(settings)
    os.mkfifo(folder / "fifo_model/model.safetensors")
    (folder / "lying/model.safetensors").write_bytes(weights.replace(b'"F32"', b'"I32"'))
    (folder / "cut/model.safetensors").write_bytes(weights[: len(weights) // 2])
    (folder / "deep/config.json").write_text("[" * 100_000)


UNUSUAL = (
    *fuzz.UNUSUAL,
    7,
    "12",
    "relu",
    "cuda",
    (),
    (0, 2),
    (2, -1),
    object(),
    b"x",
    int,
    torch.half,
    torch.device("meta"),
)


def exchange(value, draw, folder):
    """Something else in the place of ``value``, in words and as it is."""
    if isinstance(value, torch.Tensor) and draw.random() < 0.8:
        return draw.choice(list(misfit_tensors(draw, value)))
    if isinstance(value, (mpoe_kernels.MPOBlocks, mpoe_kernels.Routing)) and draw.random() < 0.8:
        own = parts(value)
        name = draw.choice([name for name, part in own.items() if isinstance(part, torch.Tensor)])
        what, own[name] = draw.choice(list(misfit_tensors(draw, own[name])))
        return f"{name} {what}", type(value)(**own)
    if (
        isinstance(value, list)
        and value
        and isinstance(value[0], torch.Tensor)
        and draw.random() < 0.8
    ):
        place = draw.randrange(len(value))
        what, tensor = draw.choice(list(misfit_tensors(draw, value[place])))
        return f"[{place}] {what}", [*value[:place], tensor, *value[place + 1 :]]
    if isinstance(value, torch.nn.Module) and draw.random() < 0.4:
        return "on meta", value.to("meta")
    if isinstance(value, Path) and draw.random() < 0.8:
        return draw.choice(unusual_paths(folder))
    other = draw.choice(UNUSUAL)
    return repr(other)[:40], other


# ------------------------------------------------------------------ what comes of them

# PyTorch's own refusals: views of a storage that is too short, layouts without a kernel, types that
# a schema excludes.
PYTORCHS = (
    "setStorage: ",
    "Could not run ",
    "ested",
    "parse",
    "kldnn",
    "Cast error details: ",
    "materialize all",
)


def tensors_of(value):
    """Every tensor in a result."""
    if isinstance(value, torch.nn.Module):
        value = list(value.parameters())
    elif dataclasses.is_dataclass(value):
        value = parts(value)
    return [leaf.detach() for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def stray(result):
    """What a result holds that nobody wrote: NaN, or the largest integer, with which fresh memory
    is filled."""
    held = []
    for tensor in tensors_of(result):
        if (
            tensor.is_meta
            or tensor.layout != torch.strided
            or tensor.is_nested
            or not 0 < tensor.numel() <= 1 << 24
        ):
            continue
        # An argument that was given back without its memory is not to be read.
        with contextlib.suppress(ValueError):
            check_memory("result", tensor)
            held.append(tensor)
    for tensor in held:
        if tensor.is_floating_point() and bool(tensor.isnan().any()):
            return f"NaN in a result {list(tensor.shape)}"
        if tensor.dtype in (torch.int32, torch.int64) and bool(
            (tensor == torch.iinfo(tensor.dtype).max).any()
        ):
            return f"the largest integer in a result {list(tensor.shape)}"
    return None


def bad_calls(draw, folder):
    """An endless stream: every public name and raw op in turn."""
    make_paths(folder)
    makers = {**starts(folder), **of_raw_ops()}
    for name in itertools.cycle(makers):
        yield fuzz.Case(name, partial(bad_call, *makers[name], draw, folder), " ")


def bad_call(function, make, draw, folder):
    """Call with one or two arguments exchanged."""
    torch.manual_seed(draw.randrange(1000))
    arguments, said = make(), ""
    if "backend" in arguments:
        arguments["backend"] = draw.choice([arguments["backend"], "eager", "native"])
    try:
        for argument in draw.sample(list(arguments), min(len(arguments), draw.choice([1, 1, 2]))):
            what, arguments[argument] = exchange(arguments[argument], draw, folder)
            said += f"{argument} {what}, "
        print(said, flush=True)
        result = function(**arguments)
    except Exception as error:
        error.add_note(said)
        by_index = isinstance(error, IndexError) and "; got " in str(error)
        if by_index or (
            isinstance(error, RuntimeError) and any(words in str(error) for words in PYTORCHS)
        ):
            raise fuzz.Refused(str(error)) from error
        raise
    if not any(word in said for word in ("NaN", "nan", "inf", "3e38", "1e300")) and (
        found := stray(result)
    ):
        raise AssertionError(f"{found}: {said}")
