"""Arguments of every public name: such that fit, and what they are exchanged for in `bad_calls`."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from mpoe_bench.cases import random_cores

import mpoe
import mpoe_kernels
from mpoe_kernels import MPOShape, fold, route
from mpoe_kernels.signatures import ARGUMENTS
from tests.kernels.raw_calls import calls, run
from tests.training.tiny import dense_model, mpoe_model

FIELDS = ("left", "central", "right", "in_features", "out_features")  # of MPOBlocks
TOKENS, EXPERTS, WIDTH, OUT = 12, 3, 8, 12


# ------------------------------------------------------------------ arguments that fit


def shape() -> MPOShape:
    return MPOShape((2, 2, 2), (2, 3, 2))


def chain(num_experts: int = EXPERTS) -> list[torch.Tensor]:
    return random_cores(shape(), num_experts, torch.float32)


def one_chain() -> list[torch.Tensor]:
    """The cores of one weight, without an axis of experts."""
    return [core.reshape(size) for core, size in zip(chain(1), shape().core_shapes, strict=True)]


def blocks() -> Any:
    return fold(chain(), 1, shape())


def down_blocks() -> Any:
    mirrored = MPOShape((2, 3, 2), (2, 2, 2))
    return fold(random_cores(mirrored, EXPERTS, torch.float32), 1, mirrored)


def index() -> torch.Tensor:
    return torch.arange(TOKENS).remainder(EXPERTS)[:, None]


def routing() -> Any:
    return route(index(), EXPERTS)


def offsets() -> torch.Tensor:
    return routing().expert_offsets


def rows() -> torch.Tensor:
    return torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(2))


def gates() -> torch.Tensor:
    return torch.full((TOKENS, 1), 0.5)


def of_blocks(blocks: Any, **changes: Any) -> Any:
    return mpoe_kernels.MPOBlocks(**{**{name: getattr(blocks, name) for name in FIELDS}, **changes})


def forward(factory: Callable[..., torch.nn.Module], x: Any, **options: Any) -> Any:
    """One of our layers is called with ``x``."""
    return factory(**options)(x)


def within(manager: Callable[..., Any], **options: Any) -> None:
    with manager(**options):
        pass


def config(**options: Any) -> Any:
    return mpoe.MPOEConfig(**{"num_experts": 2, "shape": "separable", **options})


Start = tuple[Callable[..., Any], Callable[[], dict[str, Any]]]


def of_kernels() -> dict[str, Start]:
    """Names of `mpoe_kernels`: the function to call, and what makes arguments with which it works."""
    k = mpoe_kernels
    routed: Callable[[], dict[str, Any]] = lambda: {"routing": routing(), "backend": None}  # noqa: E731

    def linear() -> dict[str, Any]:
        return {"x": rows(), "blocks": blocks(), "bias": torch.zeros(OUT), "activation": "relu", "backend": None}

    def grouped() -> dict[str, Any]:
        rows = {"row_index": torch.arange(TOKENS, dtype=torch.int32), "slot_of_token": torch.arange(TOKENS)[:, None]}
        return {**linear(), "expert_offsets": offsets(), **rows}

    def ffn() -> dict[str, Any]:
        both = {"up": blocks(), "down": down_blocks(), "dropout": 0.0}
        return {"x": rows(), **routed(), "top_k_weights": gates(), **both}

    def hidden() -> dict[str, Any]:
        sides = {"right": torch.randn(EXPERTS, 1, 4, 4), "left": torch.randn(EXPERTS, 1, 4, 4)}
        return {"u": rows(), "gates": gates(), "top_k_index": index(), **sides, "activation": "relu", "backend": None}

    def neurons() -> dict[str, Any]:
        own = {name: torch.randn(EXPERTS, 3, WIDTH) for name in ("up", "down", "gate_up")}
        return {"x": rows(), "gates": gates(), "top_k_index": index(), **own, "activation": "relu", "backend": None}

    def planned() -> dict[str, Any]:
        sizes = {"num_experts": 8, "num_tokens": 64, "top_k": 1}
        return {"shape": shape(), **sizes, "dtype": torch.float32, "training": True}

    parts = ("expert_offsets", "token_of_slot", "slot_of_token")
    return {
        "MPOShape": (k.MPOShape, lambda: {"in_factors": (2, 4), "out_factors": (3, 4), "max_bond": 3, "central": 1}),
        "MPOBlocks": (k.MPOBlocks, lambda: {name: getattr(blocks(), name) for name in FIELDS}),
        "Routing": (k.Routing, lambda: {name: getattr(routing(), name) for name in parts}),
        "decompose": (k.decompose, lambda: {"weight": torch.randn(WIDTH, OUT), "shape": shape(), "gauge": "symmetric"}),
        "decompose_with_errors": (
            k.decompose_with_errors,
            lambda: {"weight": torch.randn(WIDTH, OUT), "shape": shape()},
        ),
        "decompose_shared": (
            k.decompose_shared,
            lambda: {"weights": torch.randn(EXPERTS, WIDTH, OUT), "shape": shape(), "sweeps": 2},
        ),
        "reconstruct": (k.reconstruct, lambda: {"cores": one_chain(), "shape": shape()}),
        "fold": (k.fold, lambda: {"cores": chain(), "central": 1, "shape": shape(), "num_experts": EXPERTS}),
        "expert_weights": (k.expert_weights, lambda: {"blocks": blocks()}),
        "route": (k.route, lambda: {"top_k_index": index(), "num_experts": EXPERTS, "capacity": 5, "token_mask": None}),
        "dispatch": (k.dispatch, lambda: {"x": rows(), **routed()}),
        "combine": (k.combine, lambda: {"y_sorted": rows(), **routed(), "top_k_weights": gates()}),
        "mpo_linear": (k.mpo_linear, lambda: {**linear(), "blocks": fold(one_chain(), 1, shape())}),
        "grouped_mpo_linear": (k.grouped_mpo_linear, grouped),
        "mpo_ffn": (k.mpo_ffn, ffn),
        "hidden_experts": (k.hidden_experts, hidden),
        "neuron_experts": (k.neuron_experts, neurons),
        "mpo_embedding": (k.mpo_embedding, lambda: {"ids": torch.arange(5), "blocks": fold(one_chain(), 1, shape())}),
        "plan_contraction": (k.plan_contraction, planned),
        "use_backend": (lambda **o: within(k.use_backend, **o), lambda: {"name": "eager"}),
    }


def of_mpoe(folder: Path) -> dict[str, Start]:
    """Names of `mpoe`; those of sharding are always refused, for want of a process group."""
    saved = folder / "model"
    light = {"num_experts": 4, "shape": "light", "light_p": 8, "router": {"top_k": 2}}
    run = {"output_dir": str(folder / "run"), "use_cpu": True, "learning_rate": 1e-3, "gradient_mask_prob": 0.5}

    def layer(x: torch.Tensor) -> dict[str, Any]:
        return {"x": x, "shape": shape(), "backend": None, "device": None, "dtype": None}

    def ffn() -> dict[str, Any]:
        return {"x": rows()[None], "in_features": WIDTH, "hidden_features": 16, "config": config(), "bias": True}

    def router() -> dict[str, Any]:
        limited = mpoe.RouterConfig(capacity_factor=1.0)
        return {"x": rows(), "in_features": WIDTH, "num_experts": 4, "config": limited}

    def sharded() -> dict[str, Any]:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], 0.1)
        return {"model": mpoe_model("gpt2"), "optimizer": optimizer}

    def only() -> dict[str, Any]:
        torch.manual_seed(0)  # as `mpoe_model` does: the base is the one that the model was made of
        base = dense_model("gpt2")
        return {"model": mpoe_model("gpt2"), "path": folder / "only", "base": base}

    def composed() -> dict[str, Any]:
        torch.manual_seed(0)
        base = dense_model("gpt2")
        return {"base": base, "fine_tunes": [base, dense_model("gpt2")], "examples": None, "router": "ridge"}

    def added() -> dict[str, Any]:
        return {"mixture": mpoe.compose(**composed()), "base": dense_model("gpt2"), "fine_tune": dense_model("gpt2")}

    def started() -> Any:
        torch.manual_seed(0)
        return mpoe.start_expert(dense_model("gpt2"), 4)

    def texts() -> list[Any]:
        return [{"input_ids": torch.arange(8)[None]}]

    def saved_expert() -> dict[str, Any]:
        model = started()
        statistics = mpoe.collect_statistics(model, texts())
        return {"model": model, "path": folder / "an.expert", "statistics": statistics, "training": {"steps": 3}}

    def merged_expert() -> dict[str, Any]:
        mpoe.save_expert(**saved_expert())
        torch.manual_seed(0)
        return {"model": dense_model("gpt2"), "expert": folder / "an.expert"}

    def composed_experts() -> dict[str, Any]:
        expert = mpoe.save_expert(**saved_expert())
        torch.manual_seed(0)
        options = {"top_k": 2, "none": True, "background": texts()}
        return {"base": dense_model("gpt2"), "experts": [expert], **options}

    def made(factory: Callable[..., torch.nn.Module]) -> Callable[..., Any]:
        return lambda **options: forward(factory, options.pop("x"), **options)

    return {
        "RouterConfig": (mpoe.RouterConfig, lambda: {"top_k": 2, "capacity_factor": 1.0, "jitter": 0.1}),
        "MPOEConfig": (mpoe.MPOEConfig, lambda: dict(light)),
        "MPOETrainingArguments": (mpoe.MPOETrainingArguments, lambda: dict(run)),
        "MPOETrainer": (mpoe.MPOETrainer, lambda: {"model": mpoe_model("gpt2"), "args": None}),
        "TopKRouter": (made(mpoe.TopKRouter), router),
        "MPOLinear": (made(mpoe.MPOLinear), lambda: layer(rows())),
        "MPOEmbedding": (made(mpoe.MPOEmbedding), lambda: layer(torch.arange(5))),
        "MPOEFeedForward": (made(mpoe.MPOEFeedForward), ffn),
        "convert_to_mpoe": (
            mpoe.convert_to_mpoe,
            lambda: {"model": dense_model("gpt2"), "config": config(), "inplace": False},
        ),
        "compose": (mpoe.compose, composed),
        "add_expert": (
            mpoe.add_expert,
            lambda: {
                "mixture": mpoe.compose(**composed()),
                "base": dense_model("gpt2"),
                "fine_tune": dense_model("gpt2"),
            },
        ),
        "start_expert": (mpoe.start_expert, lambda: {"model": dense_model("gpt2"), "neurons": 4, "expert": None}),
        "collect_statistics": (
            mpoe.collect_statistics,
            lambda: {"model": started(), "batches": texts(), "rank": 2},
        ),
        "save_expert": (mpoe.save_expert, saved_expert),
        "load_expert": (mpoe.load_expert, lambda: {"path": merged_expert()["expert"]}),
        "merge_expert": (mpoe.merge_expert, merged_expert),
        "compose_experts": (mpoe.compose_experts, composed_experts),
        "freeze_all_but_experts": (mpoe.freeze_all_but_experts, lambda: {"model": mpoe_model("gpt2")}),
        "merge_latent": (mpoe.merge_latent, lambda: {"model": mpoe_model("gpt2", shape="neurons", latent=8)}),
        "merge_experts": (mpoe.merge_experts, lambda: {"model": mpoe_model("gpt2")}),
        "load_mpoe": (mpoe.load_mpoe, lambda: {"path": saved, "base": None}),
        "save_mpoe_only": (mpoe.save_mpoe_only, only),
        "import_original": (mpoe.import_original, lambda: {"source": saved, "base": dense_model("t5")}),
        "lora_on_cores": (mpoe.lora_on_cores, lambda: {"config": None}),
        "global_batch": (lambda **o: within(mpoe.global_batch, **o), lambda: {"group": None}),
        "shard_model": (mpoe.shard_model, lambda: {"model": mpoe_model("gpt2"), "mesh": None, "dtype": None}),
        "save_sharded": (mpoe.save_sharded, lambda: {"model": mpoe_model("gpt2"), "folder": folder / "sharded"}),
        "save_sharded_checkpoint": (
            mpoe.save_sharded_checkpoint,
            lambda: {**sharded(), "folder": folder / "s", "step": 1},
        ),
        "load_sharded_optimizer": (mpoe.load_sharded_optimizer, lambda: {**sharded(), "checkpoint": saved}),
    }


def of_raw_ops() -> dict[str, Start]:
    """The ops behind the public names."""

    def start(op: str) -> Start:
        return lambda **arguments: run(op, arguments), lambda: calls("auto")[op]

    return {f"torch.ops.mpoe.{op}": start(op) for op in ARGUMENTS}


def starts(folder: Path) -> dict[str, Start]:
    """By public name: the function to call, and what makes its arguments."""
    return {**of_kernels(), **of_mpoe(folder)}


# Names that are no calls, or results that nobody makes by hand: a plan, a decomposition, an error.
NOT_CALLED = {
    "BackendError",
    "ContractionPlan",
    "Decomposition",
    "DivergenceError",
    "SharedDecomposition",
    "__version__",
    "available_backends",
    "backend_reasons",
}


# ------------------------------------------------------------------ arguments that do not


def odd_tensors(draw: random.Random, like: torch.Tensor) -> Iterator[tuple[str, Any]]:
    size = list(like.shape)
    axis = draw.randrange(len(size)) if size else 0
    yield "on meta", like.to("meta")
    yield "empty", like.new_zeros([0] * len(size))
    if size:
        yield f"size 0 of axis {axis}", like.new_zeros([0 if i == axis else n for i, n in enumerate(size)])
        yield f"axis {axis} too long", torch.cat([like, like], axis)
        yield f"axis {axis} too short", like.narrow(axis, 0, max(size[axis] - 1, 0))
        yield "a huge view", like.new_zeros(()).expand([1 << 40, *size[1:]])
        yield "strided", torch.cat([like, like], axis)[(slice(None),) * axis + (slice(None, None, 2),)]
    yield "an axis more", like[None]
    yield "a number", like.new_zeros(())
    for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.int64, torch.bool, torch.complex64):
        if dtype != like.dtype:
            yield str(dtype), like.to(dtype)
    yield "sparse", like.to_sparse()
    yield "nested", torch.nested.nested_tensor([like, like])
    yield "without memory", resized(like, 0)
    yield "with half of its memory", resized(like, like.nbytes // 2)
    if like.is_floating_point():
        yield "yet to be negated", torch._neg_view(like)
        yield "zeros that stand for themselves", torch._efficientzerotensor(size, dtype=like.dtype)
        yield "of mkldnn", like.to_mkldnn() if like.dtype == torch.float32 else like
    if not like.is_floating_point() and like.dtype != torch.bool:
        for value in (-1, EXPERTS, 1 << 30):
            yield f"all {value}", torch.full_like(like, value)
        yield "reversed", like.flip(0) if size else like
        yield "random numbers", torch.randint_like(like, -(1 << 31), (1 << 31) - 1)
    else:
        yield "with NaN", torch.full_like(like, math.nan) if like.is_floating_point() else like
        yield "3e38", torch.full_like(like, 3e38) if like.dtype == torch.float32 else like
        yield "needs a gradient", like.clone().requires_grad_() if like.is_floating_point() else like


def resized(like: torch.Tensor, size: int) -> torch.Tensor:
    """A copy whose storage has ``size`` bytes, as FSDP leaves parameters between their uses."""
    copy = like.clone()
    copy.untyped_storage().resize_(size)
    return copy


def odd_paths(folder: Path) -> list[tuple[str, Any]]:
    """Paths that are not what they seem."""
    names = ("absent", "file", "loop", "dangling", "fifo", "fifo_model", "lying", "cut", "deep")
    return [(name, folder / name) for name in names] + [("no path", "\0"), ("a long path", "x" * 5000), ("", "")]


def make_paths(folder: Path) -> None:
    """The folder that calls read: a saved model, and what `odd_paths` names."""
    mpoe_model("gpt2").save_pretrained(folder / "model")
    (folder / "file").write_text("x")
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "dangling").symlink_to(folder / "nowhere")
    os.mkfifo(folder / "fifo")
    weights = (folder / "model" / "model.safetensors").read_bytes()
    settings = (folder / "model" / "config.json").read_text()
    for name in ("fifo_model", "lying", "cut", "deep"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(settings)
    os.mkfifo(folder / "fifo_model" / "model.safetensors")
    (folder / "lying" / "model.safetensors").write_bytes(weights.replace(b'"F32"', b'"I32"'))
    (folder / "cut" / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    (folder / "deep" / "config.json").write_text("[" * 100_000)


ODD: tuple[Any, ...] = (
    *(
        None,
        True,
        -1,
        0,
        1,
        7,
        2**31,
        2**63,
        10**30,
        1.5,
        -0.5,
        math.nan,
        math.inf,
        1e300,
        "",
        "x",
        "12",
        "relu",
        "cuda",
    ),
    *(
        [],
        [0],
        [None],
        [1.5],
        {},
        {"a": 1},
        (),
        (0, 2),
        (2, -1),
        object(),
        b"x",
        int,
        torch.float16,
        torch.device("meta"),
    ),
)


def exchange(value: Any, draw: random.Random, folder: Path) -> tuple[str, Any]:
    """Something else in the place of ``value``, in words and as it is."""
    if isinstance(value, torch.Tensor) and draw.random() < 0.8:
        return draw.choice(list(odd_tensors(draw, value)))
    if isinstance(value, mpoe_kernels.MPOBlocks) and draw.random() < 0.8:
        name = draw.choice(["left", "central", "right"])
        what, tensor = draw.choice(list(odd_tensors(draw, getattr(value, name))))
        return f"{name} {what}", of_blocks(value, **{name: tensor})
    if isinstance(value, mpoe_kernels.Routing) and draw.random() < 0.8:
        fields = {n: getattr(value, n) for n in ("expert_offsets", "token_of_slot", "slot_of_token")}
        name = draw.choice(list(fields))
        what, fields[name] = draw.choice(list(odd_tensors(draw, fields[name])))
        return f"{name} {what}", mpoe_kernels.Routing(**fields)
    if isinstance(value, list) and value and isinstance(value[0], torch.Tensor) and draw.random() < 0.8:
        place = draw.randrange(len(value))
        what, tensor = draw.choice(list(odd_tensors(draw, value[place])))
        return f"[{place}] {what}", [*value[:place], tensor, *value[place + 1 :]]
    if isinstance(value, torch.nn.Module) and draw.random() < 0.4:
        return "on meta", value.to("meta")
    if isinstance(value, Path) and draw.random() < 0.8:
        return draw.choice(odd_paths(folder))
    other = draw.choice(ODD)
    return repr(other)[:40], other
