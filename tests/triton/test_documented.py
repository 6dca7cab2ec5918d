"""The generated tables in bench/results/ahead-of-time contain everything that is shipped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import triton_compile
import triton_predict

from mpoe_kernels.backends import triton_catalogue as catalogue
from mpoe_kernels.linear.triton import configs
from mpoe_kernels.contract import contraction
from mpoe_kernels.triton.architecture import ARCHITECTURES

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "bench" / "results" / "ahead-of-time" / "triton.md").read_text()


def table(name: str) -> list[list[str]]:
    """Cells of the table between two markers, without the header."""
    text = PAGE.split(f"<!-- {name} -->\n")[1].split(f"<!-- end of {name} -->")[0]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[2:]]


def test_every_kernel_and_tile_is_listed() -> None:
    rows = table("resources")
    for architecture in ARCHITECTURES:
        for kernel in configs.TILES[architecture]:
            for elements, dtype in (("16-bit", "bfloat16"), ("float32", "float32")):
                if kernel == "wide rows" and elements == "float32":
                    continue
                for tile in configs.candidates(kernel, architecture, catalogue.DTYPES[dtype]):
                    columns = tile.n // 2 if kernel == "pairs" else tile.n
                    words = f"BM {tile.m}, BK {tile.k}, BN {columns}, {tile.warps} warps, {tile.stages} stages"
                    column = 4 + list(triton_compile.TARGETS).index(architecture)
                    found = [
                        r[column] for r in rows if r[:3] == [f"{kernel.removeprefix('wide ')}_kernel", elements, words]
                    ]
                    assert found, f"{kernel} {words}: run tools/triton_compile.py --doc"
                    assert found[0] not in ("-", "fails")
    jobs = triton_compile.shipped_jobs(["sm_90"], ["bfloat16"], quick=True)
    assert {job.name for job in jobs} == {row[0] for row in rows}


@pytest.mark.slow
def test_other_sizes_are_listed() -> None:
    rows = table("large")
    assert not any("fails" in row for row in rows)
    jobs = triton_compile.shipped_jobs(ARCHITECTURES, ["bfloat16"], True, sizes=catalogue.LARGE_SIZES)
    for column, architecture in enumerate(triton_compile.TARGETS, start=4):
        listed = {row[0] for row in rows if row[column] != "-"}
        assert listed == {job.name for job in jobs if job.architecture == architecture}


def test_every_case_is_predicted() -> None:
    rows = table("predictions")
    wanted = {
        (str(e), str(t), name, phase)
        for e, t, name in triton_predict.cases(list(catalogue.shapes()))
        for phase in ("forward", "backward")
    }
    assert {tuple(row[:4]) for row in rows} == wanted
    for row in rows:
        predicted, roofline, chosen = (float(cell) for cell in row[-3:])
        assert predicted > roofline > 0, "a prediction beats the roofline"
        assert chosen > 0
    assert "not measurements" in PAGE


def test_predictions_of_a_product_are_those_of_its_launches() -> None:
    dims = catalogue.dims_of(catalogue.shapes()["separable"][0])
    chosen = triton_predict.choice(dims, 8, 4096, "forward")
    plan = contraction(chosen.strategy, dims, 8, 4096, torch.bfloat16, "forward")
    found = triton_predict.predictions(dims, 8, 4096, chosen, "none")
    flops = sum(one.flops for one in found)
    assert flops == pytest.approx(plan.flops, rel=1e-6), "its sizes fill whole tiles"
    assert all(one.seconds > one.roofline > 0 for one in found)
    text = triton_predict.kernel_table(["separable"], 8, 4096)
    assert "| separable | up forward | separable | rows_kernel |" in text
