"""`mpoe plan MODEL_OR_CONFIG [flags]`: the cost of a mixture of MPO experts, computed only from the configuration.

No weights are loaded or allocated.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpoe.cli.errors import CommandError, close_matches
from mpoe.cli.parsing import option, read_command

if TYPE_CHECKING:
    from mpoe.config import MPOEConfig
    from mpoe.estimation.cluster import Cluster
    from mpoe.estimation.costs import Usage
    from mpoe.estimation.inventory import Inventory
    from mpoe.estimation.suggest import Limits

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9, "t": 10**12}


@dataclass
class PlanOptions:
    """The mixture and its workload."""

    _argument_group_name = "plan"

    experts: int = option(8, "experts per layer", "num_experts")
    shape: str | None = option(
        None,
        "hidden, separable, paper, light, or JSON: kind -> MPOShape; of suggestions: the only family; default: hidden, "
        "or separable where a bond or cores are given",
    )
    bond: int | None = option(None, "cap of every bond dimension; none = lossless", "max_bond")
    separable_left: int | None = option(None, "left core of a separable up projection")
    separable_right: int | None = option(None, "right core of a separable up projection")
    light_p: int = option(64, "product i * j of a light shape's outer cores")
    exclude_modules: list[str] = option([], "feed-forward modules that stay dense")
    layers_to_transform: list[int] = option([], "layers to convert; none given = all")
    top_k: int | None = option(None, "experts per token; default: 2 of hidden, 1 of other shapes")
    tokens: int = option(2048, "tokens of one device in one step; of T5: in each of encoder and decoder")
    decoder_tokens: int | None = option(None, "T5: tokens of the decoder, when they are others")
    device: str = option("cpu", "cpu (this machine) or a name of the planner's hardware table, e.g. h100")
    dtype: str = option("bf16", "fp32, bf16 or fp16: activations and products")
    training: bool = option(False, "forward and backward; the default")
    inference: bool = option(False, "forward only")
    mask_central: bool = option(False, "training: a step in which the gradient mask spares the central cores")
    per_layer: bool = option(False, "list every layer")
    explain: bool = option(False, "say why the other strategies lost")
    json: str | None = option(None, "also write everything to this file")


@dataclass
class SuggestOptions:
    """Shapes for a budget."""

    _argument_group_name = "suggest"

    suggest: bool = option(False, "propose shapes instead of planning one; a budget or rank implies it")
    max_parameters: str | None = option(None, "of the whole model, e.g. 300M or 1.2B")
    max_time: float | None = option(None, "of the feed-forward layers, x dense, e.g. 1.3")
    rank_by: str = option("capacity", "capacity (auxiliary parameters per expert), time or parameters")


@dataclass
class ClusterOptions:
    """Several devices: replicated MPO experts against expert-parallel Switch."""

    _argument_group_name = "several devices"

    nodes: list[int] = option([1], "nodes; several numbers are compared, a line for each design")
    gpus_per_node: int = option(1, "devices of a node")
    link_gbps: float | None = option(None, "gigabit/s one device sends to other nodes; none = the device's")
    node_link_gbps: float | None = option(None, "gigabit/s one device sends inside its node; none = the device's")


@dataclass
class CalibrateOptions:
    """Measuring this machine."""

    _argument_group_name = "calibration"

    calibrate: bool = option(False, "measure this machine for about a minute and keep the result; needs no model")


GROUPS = (PlanOptions, SuggestOptions, ClusterOptions, CalibrateOptions)


def parse_count(name: str, text: str) -> int:
    """``"300M"``, ``"1.2B"``, ``"300_000_000"`` -> the number (units k, M, B or G, T).

    Raises:
        CommandError: not such a number, or less than one.
    """
    match = re.fullmatch(r"([0-9][0-9_,]*(?:\.[0-9]+)?|\.[0-9]+)\s*([kmgbt]?)", text.strip().lower())
    if match is None:
        raise CommandError(f"{name} must be a number like 300M or 1.2B; got {text!r}")
    value = int(float(match[1].replace("_", "").replace(",", "")) * _UNITS[match[2]])
    if value < 1:
        raise CommandError(f"{name} must be at least 1; got {text!r}")
    return value


def command(arguments: Sequence[str]) -> None:
    """Run the command on its tokens."""
    usage = "mpoe plan MODEL_OR_CONFIG [--flag value ...]"
    asked = read_command(usage, __doc__, GROUPS, arguments, words=1)
    if asked is None:
        return
    words, (plan, suggest, cluster, calibrate), given = asked
    if calibrate.calibrate:
        _calibrate(plan.device)
    if words:
        run(words[0], plan, suggest, cluster, given)
    elif not calibrate.calibrate:
        raise CommandError(f"plan needs a model first: {usage}")


def run(
    model: str, options: PlanOptions, suggest_options: SuggestOptions, cluster_options: ClusterOptions, given: set[str]
) -> dict[str, Any]:
    """Plan, or suggest shapes, print tables and return (and write) everything as JSON-able values."""
    from mpoe.cli.files import check_writable_file, write_json

    if options.json is not None:
        check_writable_file("json", Path(options.json))
    _check(options, suggest_options, cluster_options)
    suggesting = suggest_options.suggest or bool(given & {"max_parameters", "max_time", "rank_by"})
    if suggesting:
        _check_suggest(options, given)
    budget = _budget(suggest_options)
    from mpoe.cli import plan_json, plan_tables
    from mpoe.estimation.costs import model_costs

    inventory = _inventory(model, options)
    config = _config(inventory, options, given, suggesting)
    work = _workload(inventory, options)
    clusters = _clusters(work, cluster_options, given)
    if suggesting:
        from mpoe.config import NAMED_SHAPES
        from mpoe.estimation.suggest import suggest

        if budget.x_dense is not None and not any(work.tokens.values()):
            raise CommandError("max_time needs tokens; got 0")
        families = NAMED_SHAPES if options.shape is None else (options.shape,)
        suggestions = suggest(inventory, config, work, budget, suggest_options.rank_by, families)
        values = plan_json.suggestion_values(suggestions, inventory, work, budget)
        plan_tables.show_suggestions(values, suggestions, inventory, work, suggest_options.rank_by)
    else:
        costs = model_costs(inventory, config, work)
        values = plan_json.plan_values(costs)
        plan_tables.show_plan(values, costs, per_layer=options.per_layer, explain=options.explain)
        if clusters:
            from mpoe.cli import cluster_tables
            from mpoe.estimation.cluster import placements

            placed = [placements(costs, cluster) for cluster in clusters]
            found = [plan_json.cluster_values(*each, work) for each in zip(clusters, placed, strict=True)]
            if len(clusters) == 1:
                values["cluster"] = found[0]
                cluster_tables.show_cluster(found[0], work)
            else:
                values["clusters"] = found
                cluster_tables.show_scale(found, clusters, work)
    if options.json is not None:
        write_json(Path(options.json), values)
        print(f"written to {options.json}")
    return values


def _check(options: PlanOptions, suggest_options: SuggestOptions, cluster: ClusterOptions) -> None:
    """Refuse invalid values before heavy imports."""
    if options.training and options.inference:
        raise CommandError("--training and --inference exclude each other")
    for name, value, least in (
        ("experts", options.experts, 1),
        ("bond", options.bond, 1),
        ("top_k", options.top_k, 1),
        ("tokens", options.tokens, 0),
        ("decoder_tokens", options.decoder_tokens, 0),
        *(("nodes", nodes, 1) for nodes in cluster.nodes),
        ("gpus_per_node", cluster.gpus_per_node, 1),
    ):
        if value is not None and value < least:
            raise CommandError(f"{name} must be at least {least}; got {value}")
    for name, speed in (("link_gbps", cluster.link_gbps), ("node_link_gbps", cluster.node_link_gbps)):
        if speed is not None and not (speed > 0 and math.isfinite(speed)):
            raise CommandError(f"{name} must be greater than 0; got {speed}")
    if options.dtype not in DTYPES:
        raise CommandError(f"dtype must be one of {', '.join(DTYPES)}; got {options.dtype!r}")
    if options.mask_central and options.inference:
        raise CommandError("mask_central concerns training; it cannot be given with --inference")
    if suggest_options.max_time is not None and not (
        suggest_options.max_time > 0 and math.isfinite(suggest_options.max_time)
    ):
        raise CommandError(f"max_time must be greater than 0; got {suggest_options.max_time}")


def _check_suggest(options: PlanOptions, given: set[str]) -> None:
    """Refuse options that a search for shapes cannot use, rather than ignore them."""
    chosen = ("bond", "separable_left", "separable_right", "light_p")
    for name in (*chosen, "per_layer", "explain", "nodes", "gpus_per_node", "link_gbps", "node_link_gbps"):
        if name in given:
            why = "is what suggestions choose" if name in chosen else "concerns the plan of one shape"
            raise CommandError(f"{name} {why}; it cannot be given with --suggest or a budget")
    if options.shape is not None and options.shape.lstrip().startswith("{"):
        raise CommandError("shape must be separable, paper or light with --suggest or a budget; got JSON")


def _budget(options: SuggestOptions) -> Limits:
    from mpoe.estimation.suggest import RANKS, Limits

    if options.rank_by not in RANKS:
        hint = close_matches(options.rank_by, RANKS)
        raise CommandError(f"rank_by must be one of {', '.join(RANKS)}; got {options.rank_by!r}{hint}")
    most = None if options.max_parameters is None else parse_count("max_parameters", options.max_parameters)
    return Limits(most, options.max_time)


def _inventory(model: str, options: PlanOptions) -> Inventory:
    from mpoe.estimation.inventory import take_inventory

    if model == "t5" and not Path(model).exists():  # gpt2, the other stand-in's name, means the well-known size here
        from mpoe.data.embedded import stand_in_path

        model = str(stand_in_path(model))
    return take_inventory(model, options.exclude_modules, options.layers_to_transform or None)


def _config(inventory: Inventory, options: PlanOptions, given: set[str], suggesting: bool) -> MPOEConfig:
    """The requested mixture; for a converted model, its own unless flags override it."""
    from mpoe.cli.options import ExpertOptions
    from mpoe.config import MPOEConfig
    from mpoe.config.shapes import SEPARABLE

    asked = ExpertOptions(
        num_experts=options.experts,
        shape=SEPARABLE if options.shape is None and suggesting else options.shape,
        max_bond=options.bond,
        separable_left=options.separable_left,
        separable_right=options.separable_right,
        light_p=options.light_p if "light_p" in given else None,
        top_k=options.top_k,
    ).build()
    assert asked is not None  # only a dense model has no configuration
    asked = asked if inventory.blocks_fit else asked.with_cores()
    if inventory.mpoe is None:
        return asked
    own = inventory.mpoe
    names = {"experts": "num_experts", "bond": "max_bond", "shape": "shape", "light_p": "light_p"}
    names |= {name: name for name in ("separable_left", "separable_right")}
    changes = {kept: getattr(asked, kept) for name, kept in names.items() if name in given}
    routing = asked if "top_k" in given else own
    return MPOEConfig(
        **{kept: getattr(own, kept) for kept in names.values() if kept not in changes},
        **changes,
        moe_type=routing.moe_type,
        router=routing.router,
    )


def _workload(inventory: Inventory, options: PlanOptions) -> Usage:
    import torch

    from mpoe.estimation.costs import Usage
    from mpoe.estimation.timing import Device
    from mpoe_kernels.planner import hardware_of

    hardware_of(options.device)  # refuses an unknown one

    if options.decoder_tokens is not None and "decoder" not in inventory.streams:
        raise CommandError(f"decoder_tokens needs a model with a decoder of its own; {inventory.name} has none")
    tokens = dict.fromkeys((*inventory.streams, *(stream for stream, _, _ in inventory.rest)), options.tokens)
    if options.decoder_tokens is not None:
        tokens["decoder"] = options.decoder_tokens
    device = Device(options.device, getattr(torch, DTYPES[options.dtype]))
    return Usage(tokens, device, not options.inference, options.mask_central)


def _clusters(work: Usage, options: ClusterOptions, given: set[str]) -> list[Cluster]:
    if not given & {"nodes", "gpus_per_node", "link_gbps", "node_link_gbps"}:
        return []
    from mpoe.estimation.cluster import Cluster

    hardware = work.device.hardware

    def bytes_per_second(gbps: float | None, default: float) -> float:
        return default if gbps is None else gbps * 1e9 / 8

    network = bytes_per_second(options.link_gbps, hardware.network_bandwidth)
    link = bytes_per_second(options.node_link_gbps, hardware.link_bandwidth)
    return [Cluster(nodes, options.gpus_per_node, network, link) for nodes in options.nodes]


def _calibrate(device: str) -> None:
    """Measure a device of this machine, and print the results and where they are saved."""
    import torch

    from mpoe.cli.plan_tables import show_hardware
    from mpoe_kernels.planner import calibrate
    from mpoe_kernels.planner.measured import cache_file

    print(f"measuring {device}: about a minute, best on a quiet machine", flush=True)
    try:
        hardware = calibrate(device)
    except OSError as error:
        raise CommandError(f"calibrate: {cache_file()} cannot be written: {error}") from error
    show_hardware(hardware, torch.get_num_threads() if hardware.kind == "cpu" else None)
    print(f"kept in {cache_file()}; plans for {device} use it from now on")
