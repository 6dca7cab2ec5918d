"""The checks of `tools/gpu_compile.py`: it finds every kernel and lets nothing through that it
should stop."""

import importlib
import os
import pkgutil
from collections import Counter
from functools import partial
from multiprocessing import get_context

import gpu_compile
import pytest
import shipped_kernels as shipped
import torch
import triton
from gpu_compile import Binary, Job, compiled, job_of

import mpoe_kernels
from mpoe_kernels.experts import triton as experts
from mpoe_kernels.linear.triton import MOST_EXPERTS, grouped
from mpoe_kernels.routing import triton as routing
from mpoe_kernels.testing.launches import Launch, recorded
from mpoe_kernels.triton.architecture import ARCHITECTURES
from tests.assertions import refuses
from tests.cases import ROOT, in_two_dtypes

from . import planted_kernels

pytestmark = pytest.mark.emulated

GOOD = Binary(128, 0, 0, 65536, 0, 16, True)


def kernels_of_the_backend():
    """Every function in the package that Triton compiles and that is launched on its own."""
    found = set()
    for info in pkgutil.walk_packages(mpoe_kernels.__path__, "mpoe_kernels."):
        if "triton" not in info.name:
            continue
        module = importlib.import_module(info.name)
        for name, value in vars(module).items():
            if isinstance(value, triton.runtime.jit.JITFunction) and name.endswith("_kernel"):
                found.add(name)
    return found


def launches_of(problems, architecture):
    return [launch for problem in problems for launch in problem.launches(architecture)]


on_architectures = pytest.mark.parametrize(
    "architecture",
    [pytest.param(a, marks=[pytest.mark.slow] * (a in ("sm_80", "sm_100"))) for a in ARCHITECTURES],
)


@on_architectures
def test_every_kernel_is_found_on_every_architecture(architecture):
    jobs = gpu_compile.shipped_jobs((architecture,), quick=True)
    assert len(kernels_of_the_backend()) >= 14
    assert all(("enable_fp_fusion", True) in job.options for job in jobs), (
        "the default differs between Tritons"
    )
    assert {job.name for job in jobs} == kernels_of_the_backend()


def test_every_shipped_tile_is_compiled():
    shape, _ = shipped.shapes()["paper 64"]
    work = partial(shipped.run_linear, shape, 1, 4096, torch.bfloat16, "rebuild", on_chip=False)
    started = shipped.Problem("paper 64", work, every_tile=True).launches("sm_90")
    for kernel in ("grouped_rows_kernel", "grouped_blocks_kernel"):
        compiled = {
            (a["BM"], a["BN"], a["BK"], a["num_warps"], a["num_stages"])
            for launch in started
            if launch.name == kernel
            for a in [launch.arguments]
        }
        assert {
            (t.rows, t.columns, t.inner, t.warps, t.stages) for t in grouped.TILES["sm_90"]
        } <= compiled


@on_architectures
def test_blocks_that_share_a_reading_of_rows_are_compiled_with_every_activation(architecture):
    problems = list(shipped.FAMILIES["linear"](torch.bfloat16, False, shipped.T5_BASE))
    chosen = [
        problem._replace(every_tile=False)
        for problem in problems
        if problem.name.startswith("separable") and "E=8 T=4096" in problem.name
    ]
    started = launches_of(chosen, architecture)
    shared = [launch.arguments for launch in started if launch.arguments.get("da") is not None]
    tile = grouped.BOTH_TILES[architecture]
    assert {(a["BK"], a["num_warps"], a["num_stages"]) for a in shared} == {
        (tile.inner, tile.warps, tile.stages)
    }
    found = {(a["ACTIVATION"], a["again"] is not None) for a in shared}
    assert found == {*((each, False) for each in ("none", *shipped.ACTIVATIONS)), ("none", True)}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@in_two_dtypes
def test_every_tile_of_experts_is_compiled(architecture, dtype):
    """Of both tables for blocks, with the tile that the architecture may have of its own."""
    small = {kernel: choices[dtype.itemsize] for kernel, choices in experts.HIDDEN_TILES.items()}
    large = small
    if dtype == torch.bfloat16:
        large = dict(experts.LARGE_BLOCK_TILES)
        if architecture == "sm_100":
            small["blocks"] = experts.TileChoice((experts.SM_100_TILE,))
        if architecture in experts.IN_REGISTERS:
            small["blocks"] = large["blocks"] = experts.TileChoice((experts.SMALL_TILE,))
    neurons = {kernel: choices[dtype.itemsize] for kernel, choices in experts.NEURON_TILES.items()}
    names = {"forward": "rows"}
    for family, tables in (("hidden", (small, large)), ("neurons", (neurons,))):
        problems = shipped.FAMILIES[family](dtype, False, shipped.T5_BASE)
        found = {
            (launch.name, launch.arguments["BM"], launch.arguments["num_warps"])
            for launch in launches_of(problems, architecture)
            if "BM" in launch.arguments
        }
        for table in tables:
            for kernel, choice in table.items():
                name = f"{family}_{names.get(kernel, kernel)}_kernel"
                for tile in (*choice.many, choice.few, choice.alone):
                    assert tile is None or (name, tile.rows, tile.warps) in found, (kernel, tile)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_kernels_of_experts_fit_smaller_cards(dtype):
    """sm_86, sm_89 and sm_120, whose code uses as much shared memory as sm_80's, have 99 KiB for a
    program."""
    jobs = gpu_compile.shipped_jobs(("sm_80",), (dtype,), sizes=(shipped.T5_BASE,))
    built = [
        compiled(job)[job.name] for job in jobs if job.name.startswith(("hidden_", "neurons_"))
    ]
    assert [binary.problems("sm_80") for binary in built] == [[]] * len(built)
    assert max(binary.shared for binary in built) <= 99 << 10


@pytest.mark.parametrize("sizes", shipped.LARGE_SIZES, ids=str)
def test_other_sizes_start_the_same_kernels(sizes):
    problems = list(shipped.problems(torch.bfloat16, few=True, sizes=sizes))
    assert not any(problem.every_tile for problem in problems)
    started = launches_of(problems, "sm_90")
    wanted = kernels_of_the_backend()
    if sizes.experts == (1024,):  # few slots of an expert take two kernels instead
        wanted.remove("neurons_fused_kernel")
    assert {launch.name for launch in started} == wanted
    rows = [launch.arguments for launch in started if launch.name == "grouped_rows_kernel"]
    assert sizes.experts[0] in {a["EXPERTS"] for a in rows}
    assert {sizes.model, sizes.hidden} <= {a["a"][0].numel() for a in rows}


@pytest.mark.slow
def test_of_other_sizes_every_kernel_gives_its_hardest_configuration():
    uses = gpu_compile.shipped_jobs(["gfx942"], ("float16",), sizes=shipped.LARGE_SIZES)
    found = Counter(job.name for job in uses)
    assert found["grouped_rows_kernel"] == len(shipped.LARGE_SIZES)
    widest = grouped.TILES["gfx942"][0].rows
    assert {dict(job.constants)["BM"] for job in uses if job.name == "grouped_rows_kernel"} == {
        widest
    }


def test_jobs_are_what_triton_would_specialise():
    x = torch.empty(64, dtype=torch.bfloat16, device="meta")
    arguments = {"a": x, "b": x[1:], "out": x[8:], "SIZE": 32, "STAGES": 1, "num_warps": 4}
    job = job_of(Launch(planted_kernels.product_kernel, (1,), arguments), "sm_90")
    assert job.signature[:3] == (("a", "*bf16"), ("b", "*bf16"), ("out", "*bf16"))
    assert job.constants == (("SIZE", 32), ("STAGES", 1))
    assert job.aligned == ("a", "out"), "an odd element is not a multiple of 16 bytes"
    assert job.options == (("num_warps", 4),)
    refuses(
        TypeError,
        "a must be a tensor, an integer or a float; got str",
        job_of,
        Launch(planted_kernels.product_kernel, (1,), {**arguments, "a": "x"}),
        "sm_90",
    )


def test_numbers_that_grow_with_the_tokens_are_not_specialised():
    """One kernel for 1, 16 and 17 tokens, as a captured graph needs."""
    jobs = set()
    for tokens in (1, 16, 17):
        rows = torch.empty(tokens * 2, 64, dtype=torch.bfloat16, device="meta")
        with recorded("sm_90") as found:
            list(routing.rows_to_sum({"out": rows.new_empty(tokens, 64)}, 64, 2, 16))
        jobs |= {job_of(launch, "sm_90") for launch in found}
    (job,) = jobs
    assert dict(job.signature)["tokens"] == "i32"
    assert "tokens" not in job.aligned
    assert {"F", "stride"} <= set(job.aligned)


@pytest.fixture
def forks(monkeypatch):
    """The command compiles in forks of this process, which has already imported everything."""
    monkeypatch.setattr(gpu_compile, "get_context", lambda _: get_context("fork"))


def binary_of(job):
    return compiled(job)[job.name]


def planted(size, warps, stages, architecture="sm_90"):
    signature = (
        ("a", "*bf16"),
        ("b", "*bf16"),
        ("out", "*fp32"),
        ("SIZE", "constexpr"),
        ("STAGES", "constexpr"),
    )
    constants = (("SIZE", size), ("STAGES", stages))
    options = (("num_stages", stages), ("num_warps", warps))
    return Job(
        f"{planted_kernels.__name__}:product_kernel",
        architecture,
        signature,
        constants,
        ("a", "b", "out"),
        options,
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_sound_kernel_passes(architecture):
    binary = binary_of(planted(64, 4, 2, architecture=architecture))
    assert binary.problems(architecture) == []
    assert binary.matrix_instructions > 0
    assert binary.registers > 0


@pytest.mark.slow
def test_counting_the_pairs_of_thousands_of_experts_does_not_spill():
    index = torch.empty(4096, 2, dtype=torch.int64, device="meta")
    work = partial(routing.sort_pairs, index, MOST_EXPERTS)
    jobs = [job_of(launch, "sm_90") for launch in shipped.Problem("route", work).launches("sm_90")]
    counted = [job for job in jobs if job.name in ("histogram_kernel", "scatter_kernel")]
    assert len(counted) == 2
    assert [binary_of(job).problems("sm_90") for job in counted] == [[], []]


@pytest.mark.parametrize("architecture, warps", [("sm_80", 2), ("gfx942", 1)])
def test_a_kernel_that_spills_is_stopped(architecture, warps):
    (problem,) = binary_of(planted(128, warps, 1, architecture=architecture)).problems(architecture)
    assert problem.startswith("spills: ")


@pytest.mark.parametrize("architecture", ["sm_90", "gfx942"])
def test_programs_that_wait_for_one_another_are_stopped(architecture):
    """On AMD's card rows that a wave wrote may become visible after its signal."""
    signature, constants = (("out", "*i32"), ("SIZE", "constexpr")), (("SIZE", 32),)
    waiting, counting = (
        Job(
            f"{planted_kernels.__name__}:{name}_kernel",
            architecture,
            signature,
            constants,
            ("out",),
        )
        for name in ("waiting", "counting")
    )
    (line,) = gpu_compile.problems_of(waiting)
    assert line.startswith("RuntimeError: programs may wait for one another: ")
    assert gpu_compile.problems_of(counting) == []


def test_a_kernel_that_needs_too_much_shared_memory_is_stopped():
    problems = binary_of(planted(128, 8, 5)).problems("sm_90")
    assert any("bytes of shared memory; sm_90 has 232448" in problem for problem in problems)


def test_problems_of_a_binary():
    assert GOOD.problems("sm_100") == []
    assert Binary(128, 0, 0, 65536, 0, 0, True).problems("sm_90") == [
        "multiplies matrices without a tensor-core instruction"
    ]
    assert "columns of tensor memory" in Binary(128, 0, 0, 0, 640, 1, True).problems("sm_100")[0]


@pytest.mark.usefixtures("forks")
def test_the_command_fails_when_a_kernel_spills_or_does_not_compile(monkeypatch, capsys):
    jobs = [planted(128, 2, 1, architecture="sm_80"), planted(48, 2, 1)]
    monkeypatch.setattr(
        gpu_compile, "shipped_jobs", lambda *_, **__: dict.fromkeys(jobs, "planted")
    )
    assert gpu_compile.main(["triton", "--quick", "--jobs", "1"]) == 1
    done = capsys.readouterr()
    assert "product_kernel num_stages 1, num_warps 2 on sm_80 (planted): spills: " in done.err
    assert (
        "product_kernel num_stages 1, num_warps 2 on sm_90 (planted): CompilationError: "
        in done.err
    )
    assert "2 configurations, 2 failures" in done.out


SPILLING = """
__global__ void __launch_bounds__(1024) gradient_kernel(float* x, int n) {
  float kept[64];
#pragma unroll
  for (int i = 0; i < 64; ++i) kept[i] = x[i * n];
#pragma unroll
  for (int i = 0; i < 64; ++i) x[i * n + 1] = kept[(i * 7) % 64] * kept[i];
}
"""


@pytest.mark.skipif(not (os.environ.get("CUDACXX") or gpu_compile.find("nvcc")), reason="no nvcc")
@pytest.mark.parametrize(
    "code, problem",
    [(SPILLING, "nvcc failed"), ("__global__ void f() { int unused; }", "never referenced")],
)
def test_what_nvcc_warns_of_is_stopped(code, problem, tmp_path):
    source = tmp_path / "planted.cu"
    source.write_text(code)
    (line,) = gpu_compile.problems_of(Job(str(source), "sm_90"))
    assert line.startswith("RuntimeError: nvcc failed")
    assert problem in line


def test_every_source_is_compiled():
    jobs = gpu_compile.sources(gpu_compile.TARGETS)
    assert {job.architecture for job in jobs} == {"sm_80", "sm_90", "sm_100"}
    assert {ROOT / job.kernel for job in jobs} == set((ROOT / "csrc").rglob("*.cu"))


OURS = "triton --quick --only collect_kernel --arch sm_90".split()


@pytest.mark.usefixtures("forks")
def test_the_command_compiles_a_kernel_of_ours(capsys):
    assert gpu_compile.main(OURS) == 0
    assert "1 kernels and files, 1 configurations, 0 failures" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, message",
    [(["--arch", "sm_70"], "--arch: invalid choice"), (["hip"], "kinds: invalid choice")],
)
def test_refusals(words, message, capsys):
    with pytest.raises(SystemExit):
        gpu_compile.main(words)
    assert message in capsys.readouterr().err


def test_recordings_are_of_known_architectures():
    refuses(ValueError, "architecture must be one of", recorded("sm_70").__enter__)
