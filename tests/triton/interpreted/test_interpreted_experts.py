"""Hidden-side experts and neurons: every kernel and gradient against the float64 reference, and the
launches."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.library import opcheck

from mpoe_kernels.experts import triton as experts
from mpoe_kernels.experts.triton import HIDDEN_TILES, NEURON_TILES, TileChoice
from mpoe_kernels.routing import triton as routing
from mpoe_kernels.routing.triton import SortedSlots
from mpoe_kernels.testing.launches import recorded
from mpoe_kernels.triton import start
from mpoe_kernels.triton.start import Tile
from tests.assertions import poisoned_memory
from tests.cases import either, pairwise
from tests.expert_problems import HiddenProblem, NeuronProblem
from tests.expert_scenarios import CASES

TABLES = {HiddenProblem: "HIDDEN_TILES", NeuronProblem: "NEURON_TILES"}
HALVES = (torch.bfloat16, torch.float16)
SIZES = (2, 4)  # bytes of a number, by which tiles are chosen
of_each_kind = pytest.mark.parametrize("kind", TABLES, ids=lambda kind: kind.__name__)


in_every_dtype = pytest.mark.parametrize(
    "dtype",
    [torch.float32, *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in HALVES)],
    ids=str,
)
SLOW_CASES = ("many experts", "top-4", "wide blocks", "parts of a tile", "one neuron")


def every_case():
    """Of both kinds."""
    cases = []
    for kind, named in CASES.items():
        for name, case in named.items():
            marks = [pytest.mark.slow] * (name in SLOW_CASES)
            cases.append(pytest.param(kind, case, id=f"{kind.__name__}-{name}", marks=marks))
    return pytest.mark.parametrize("kind, case", cases)


@every_case()
@in_every_dtype
def test_values_and_gradients(kind, case, dtype):
    kind(**case, dtype=dtype).check("triton")


@pytest.mark.slow
@every_case()
@in_every_dtype
def test_every_form(kind, case, dtype):
    """Gated and not, the groups' blocks shared and not, all with biases."""
    for gated in (False, True):
        for more in ({"per_group": False}, {"per_group": True}) if kind is HiddenProblem else ({},):
            form = {**case, **more, "gated": gated, "with_bias": True}
            kind(**form, dtype=dtype, seed=1).check("triton")


@of_each_kind
@pytest.mark.parametrize("activation", ["relu", "gelu_new", "none", "silu"])
def test_every_activation(kind, activation):
    sizes = {"tokens": 9, "experts": 1, **({"groups": 1} if kind is HiddenProblem else {})}
    for gated in (False, True):
        problem = kind(**sizes, gated=gated, activation=activation, dtype=torch.float32)
        (problem.on_quarters() if activation == "relu" else problem).check("triton")


@of_each_kind
def test_an_expert_chosen_twice_and_rows_of_nan_without_one(kind):
    problem = kind(tokens=17, experts=2, dtype=torch.float32, none_share=0.0, with_bias=True)
    problem.index[:, 1] = problem.index[:, 0]
    problem.index[3:6] = -1
    problem.check("triton")
    clean = problem.computed("triton")
    for name in (problem.ROWS, "gates"):
        problem.inputs[name][3:6] = torch.nan
    for name, value in problem.computed("triton").items():
        assert torch.equal(value, clean[name]), name


@of_each_kind
def test_each_gradient_alone(kind):
    problem = kind(tokens=5, experts=2, gated=True, with_bias=True, dtype=torch.float32)
    with poisoned_memory():
        everything = experts.backward(problem.backward_call())
    for needed in problem.NAMES:
        call = problem.backward_call([name == needed for name in problem.NAMES])
        with poisoned_memory():
            alone = experts.backward(call)
        for name, value, whole in zip(problem.NAMES, alone, everything, strict=True):
            assert torch.equal(value, whole) if name == needed else value.numel() == 0


def use_tile(monkeypatch, kind, tile):
    """Every kernel of a form takes this tile."""
    table = getattr(experts, TABLES[kind])
    choice = dict.fromkeys(SIZES, TileChoice((tile,)))
    monkeypatch.setattr(experts, TABLES[kind], dict.fromkeys(table, choice))


def tiles_of(choice):
    """All tiles of a choice."""
    return (*choice.many, *filter(None, (choice.few, choice.alone)))


def mostly_slow(kind, *default):
    cases = [
        pytest.param(name, marks=[pytest.mark.slow] * (name not in default)) for name in CASES[kind]
    ]
    return pytest.mark.parametrize("name", cases)


@pytest.mark.parametrize("share", [2, 1000])
@mostly_slow(HiddenProblem, "no full tile", "parts of a block")
def test_several_tiles_and_parts(name, share, monkeypatch):
    """Products of 16 units; programs of rows take one group, or with many programs several."""
    use_tile(monkeypatch, HiddenProblem, Tile(16, 16, 16, 4))
    monkeypatch.setattr(experts, "_share", lambda groups, *_: min(groups, share))
    HiddenProblem(**CASES[HiddenProblem][name], dtype=torch.float32).check("triton")


@pytest.mark.parametrize("on_chip", [0, 1000])
@mostly_slow(NeuronProblem, "no full tile", "gated")
def test_both_ways_in_small_tiles(name, on_chip, monkeypatch):
    """With the hidden neurons on chip or not; several tiles of every size."""
    use_tile(monkeypatch, NeuronProblem, Tile(16, 64 if on_chip else 16, 16, 4))
    monkeypatch.setattr(experts, "ON_CHIP", dict.fromkeys(SIZES, on_chip))
    NeuronProblem(**CASES[NeuronProblem][name], dtype=torch.float32).check("triton")


@pytest.mark.slow
def test_a_thousand_experts():
    NeuronProblem(5, 1024, 16, neurons=8, width=8, out=8, dtype=torch.bfloat16).check("triton")


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    "kind, own", [(HiddenProblem, {"groups": 1, "block": 16}), (NeuronProblem, {"neurons": 130})]
)
def test_half_precision(kind, own, dtype):
    kind(tokens=18, experts=2, gated=True, with_bias=True, dtype=dtype, **own).check("triton")


@pytest.mark.parametrize(
    "of, dtype, value",
    pairwise(
        [(HiddenProblem, kernel) for kernel in HIDDEN_TILES]
        + [(NeuronProblem, kernel) for kernel in NEURON_TILES],
        [torch.float32, torch.bfloat16],
        [torch.nan, torch.inf],
    ),
)
def test_a_spoiled_token_spoils_no_other_on_any_tile(of, dtype, value, monkeypatch):
    """Nor the gradients of the expert that it did not choose. It is the first one, which a load
    beyond the last row of a tile could fall back to."""
    kind, kernel = of
    sizes = {"groups": 2, "block": 8} if kind is HiddenProblem else {}
    table = getattr(experts, TABLES[kind])
    form = {"gated": True, "with_bias": True, "none_share": 0.0}
    problem = kind(tokens=20, experts=3, dtype=dtype, **form, **sizes)
    problem.index[:, 1] = (problem.index[:, 0] + 1) % 3
    left_out = 3 - int(problem.index[0].sum())
    others = torch.arange(20) != 0
    monkeypatch.setattr(
        experts, "ON_CHIP", dict.fromkeys(SIZES, 1000 * (kernel == "fused"))
    )  # else it is not launched
    for tile in tiles_of(table[kernel][dtype.itemsize]):
        monkeypatch.setitem(table[kernel], dtype.itemsize, TileChoice((tile,)))
        clean, rows = problem.computed("triton"), problem.inputs[problem.ROWS]
        kept = rows[0].clone()
        rows[0] = value
        spoiled = problem.computed("triton")
        rows[0] = kept
        for name, result in spoiled.items():
            clean_part = left_out if len(result) == 3 else others
            assert torch.equal(result[clean_part], clean[name][clean_part]), (tile, name)
        assert not spoiled["o"][0].isfinite().any()


def tokens_of(call, tokens):
    """The same call for some of the tokens."""
    rows = {
        name: getattr(call, name)
        for name in ("x", "u", "u_gate", "gates", "top_k_index")
        if hasattr(call, name)
    }
    return replace(
        call, **{name: None if value is None else value[tokens] for name, value in rows.items()}
    )


ALONE = {
    "on chip": (NeuronProblem, {"width": 70, "out": 20, "neurons": 40}),
    "many neurons": (NeuronProblem, {"width": 20, "out": 24, "neurons": 140, "gated": True}),
    "blocks": (HiddenProblem, {"groups": 1, "block": 24, "gated": True}),
    "large blocks": (HiddenProblem, {"groups": 1, "block": 72, "with_bias": True}),
}


def product_in_order(a, b, dtype=None):
    """The interpreter's product as matrix units sum it: by the inner index in order, whatever the
    number of rows.

    BLAS, which NumPy calls, sums otherwise for other numbers of rows on some processors.
    """
    dtype = dtype or np.result_type(a, b)
    total = np.zeros((*a.shape[:-1], b.shape[-1]), dtype)
    for inner in range(a.shape[-1]):
        total += a[..., :, inner, None].astype(dtype) * b[..., None, inner, :].astype(dtype)
    return total


@pytest.mark.parametrize("name, dtype", pairwise(list(ALONE), [torch.float32, torch.bfloat16]))
def test_a_token_has_the_same_bits_alone_and_in_any_batch(name, dtype, monkeypatch):
    """Of 300 tokens: sorted in one launch or two, on every tile; of 40: few slots of an expert, not
    kept on chip; alone: not sorted, narrow tiles."""
    monkeypatch.setattr(np, "matmul", product_in_order)
    kind, sizes = ALONE[name]
    call = kind(tokens=300, experts=8, top_k=2, dtype=dtype, **sizes).call()
    whole = experts.forward(call)
    for tokens in (slice(7, 8), slice(290, 300), slice(250, 290)):
        assert torch.equal(experts.forward(tokens_of(call, tokens)), whole[tokens])
    monkeypatch.setattr(routing, "MOST_AT_ONCE", 0)
    for tile in range(3):
        monkeypatch.setattr(start, "_first", lambda ways, tile=tile: ways[min(tile, len(ways) - 1)])
        monkeypatch.setattr(
            TileChoice, "of", lambda choice, _: tiles_of(choice._replace(alone=None))
        )
        assert torch.equal(experts.forward(call), whole), tile


@of_each_kind
def test_rows_of_pairs_that_do_not_fit_go_in_pieces(kind, monkeypatch):
    """Of as many columns as fit; the bits stay."""
    sizes = {"groups": 4, "block": 5} if kind is HiddenProblem else {"width": 80, "out": 70}
    problem = kind(tokens=40, experts=3, gated=True, with_bias=True, dtype=torch.float32, **sizes)
    monkeypatch.setattr(experts, "_share", lambda *_: 1)
    whole = problem.computed("triton")
    added = []
    kernel = routing.kernels.collect_kernel
    monkeypatch.setattr(routing, "MOST_ROWS", 1)

    def note(*arguments, **options):
        if arguments[0] is kernel:
            added.append(options["rows"].shape)
        plain(*arguments, **options)

    plain = routing.start
    monkeypatch.setattr(routing, "start", note)
    found = problem.computed("triton")
    assert len(added) > 4
    assert max(columns for _, columns in added) < whole["o"].shape[1]
    for name, value in found.items():
        assert torch.equal(value, whole[name]), name


@pytest.mark.parametrize("complete", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_opcheck(complete):
    problem = HiddenProblem(
        tokens=2, experts=2, top_k=1, groups=1, gated=True, with_bias=True, dtype=torch.float32
    )
    quick = ("test_schema", "test_autograd_registration", "test_faketensor")
    utils = (*quick, "test_aot_dispatch_dynamic") if complete else quick
    call, backward = (
        problem.call("triton"),
        problem.backward_call([True, False, True, True, True, False, True], "triton"),
    )
    opcheck(torch.ops.mpoe.hidden_experts.default, tuple(vars(call).values()), test_utils=utils)
    opcheck(
        torch.ops.mpoe.hidden_experts_backward.default,
        tuple(vars(backward).values()),
        test_utils=quick,
    )


# ------------------------------------------------------------------ launches


def started(problem, *need):
    """What a call launches on a GPU: the forward, or the needed gradients."""
    with recorded("sm_90") as launches:
        if need:
            experts.backward(problem.backward_call(list(need)))
        else:
            experts.forward(problem.call())
    return launches


def names(problem, *need):
    return [one.name for one in started(problem, *need)]


@either("gated")
@either("per_group")
def test_launches_of_the_hidden_side(per_group, gated):
    sizes = {"tokens": 50, "experts": 8, "groups": 3, "block": 4}
    problem = HiddenProblem(
        **sizes, per_group=per_group, gated=gated, with_bias=True, dtype=torch.float32
    )
    rows = ["sort_kernel", "hidden_rows_kernel", "collect_kernel"]
    assert names(problem) == rows
    sums = ["collect_kernel"] * gated
    assert names(problem, True, False, False, False, False, True, False) == [*rows, *sums]
    assert names(problem, *[True] * 7) == [*rows, *sums, "hidden_blocks_kernel"]
    assert names(problem, False, True, *[False] * 5) == rows[:2], "the gates' gradients are no rows"
    assert names(problem, False, False, True, True, True, False, True) == [
        "sort_kernel",
        "hidden_blocks_kernel",
    ]


@either("gated")
def test_launches_of_neurons(gated):
    sizes = {"experts": 4, "top_k": 2, "gated": gated, "dtype": torch.float32}
    problem = NeuronProblem(tokens=50, with_bias=True, **sizes)
    assert names(problem) == ["sort_kernel", "neurons_fused_kernel", "collect_kernel"]
    rows = ["sort_kernel", "neurons_hidden_kernel", "neurons_rows_kernel", "collect_kernel"]
    assert names(NeuronProblem(tokens=50, neurons=200, **sizes)) == rows
    few_slots = NeuronProblem(tokens=50, **sizes | {"experts": 8})
    assert names(few_slots) == rows
    assert names(problem, *[True] * 6) == [*rows, "neurons_weights_kernel"]
    assert names(problem, True, *[False] * 5) == rows
    assert names(problem, *[False] * 6) == []


@pytest.mark.parametrize("most, warps", [(4, 4), (3, 8)])
def test_warps_beside_many_experts(most, warps, monkeypatch):
    """`tools/gpu_compile.py` sees what fewer would spill."""
    monkeypatch.setattr(experts, "MOST_IN_FOUR_WARPS", most)
    launches = started(
        NeuronProblem(tokens=100, experts=4, top_k=2, neurons=200, dtype=torch.bfloat16)
    )
    (hidden_launch,) = [one for one in launches if one.name == "neurons_hidden_kernel"]
    assert hidden_launch.arguments["num_warps"] == warps


@of_each_kind
def test_no_token_is_no_launch(kind):
    assert names(kind(tokens=0)) == names(kind(tokens=0), *[True] * len(kind.NAMES)) == []


def test_a_few_pairs_are_not_sorted():
    """Two launches, with programs for a whole card."""
    found = started(
        NeuronProblem(
            tokens=1, top_k=8, experts=64, width=768, out=768, neurons=64, dtype=torch.bfloat16
        )
    )
    assert [(one.name, one.grid) for one in found] == [
        ("neurons_hidden_kernel", (8, 4)),
        ("neurons_rows_kernel", (1, 24)),
    ]
    hidden_side = HiddenProblem(tokens=8, top_k=8, groups=3, block=16, dtype=torch.bfloat16)
    assert [one.grid for one in started(hidden_side)] == [(64, 3, 1), (2, 1)]


@of_each_kind
def test_the_backward_finds_the_forwards_sort(kind):
    """Of a plain call; one that somebody watches sorts again."""
    with recorded("sm_90") as found:
        kind(tokens=50, dtype=torch.float32).computed("triton")
    sorts = [launch for launch in found if launch.name == "sort_kernel"]
    assert len(sorts) == 1
    order = {
        launch.arguments["order"].data_ptr()
        for launch in found
        if launch.arguments.get("order") is not None
    }
    assert order == {sorts[0].arguments["offsets"].data_ptr()}
    with recorded("sm_90") as found, torch.autograd.profiler.profile():
        kind(tokens=50, dtype=torch.float32).computed("triton")
    assert [launch.name for launch in found].count("sort_kernel") == 2


@of_each_kind
def test_one_choice_needs_no_sum(kind):
    assert "collect_kernel" not in names(kind(tokens=90, top_k=1, dtype=torch.float32))


@pytest.mark.parametrize("tokens, least", [(64, 0.45), (4096, 0.9)])
def test_most_rows_of_tiles_are_in_use(tokens, least):
    """64 experts, eight per token, chosen at random: more rows in a tile than slots of an expert
    would be idle."""
    index = torch.rand(tokens, 64).topk(8).indices
    slots = SortedSlots(torch.empty(66 + index.numel()), 64, index.numel())
    counts = index.flatten().bincount(minlength=64)
    kernel = "hidden" if slots.fit(experts.FEW_SLOTS) else "fused"
    rows = NEURON_TILES[kernel][2].of(slots)[0].rows
    assert (
        index.numel() / (rows * (counts + rows - 1).div(rows, rounding_mode="floor").sum()) >= least
    )


def test_few_tokens_share_an_idle_device():
    """Programs for parts of the columns, each of which computes the hidden activations."""
    sizes = {"top_k": 2, "experts": 8, "width": 256, "out": 4096, "neurons": 32, "none_share": 0.0}
    calls = [
        started(NeuronProblem(tokens=tokens, dtype=torch.bfloat16, **sizes))
        for tokens in (65, 4096)
    ]
    (_, parts), (tiles, one) = (
        each.grid for call in calls for each in call if each.name == "neurons_fused_kernel"
    )
    assert parts > 8
    assert (tiles > 128, one) == (True, 1)
