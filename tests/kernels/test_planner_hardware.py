"""The hardware table, this machine's devices, calibration files, and a step's roofline."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
import types
import warnings
from pathlib import Path

import pytest
import torch

from mpoe_kernels import MPOShape, plan_contraction
from mpoe_kernels.contract import HARDWARE, Hardware, Step, calibrate, hardware_here, hardware_of
from mpoe_kernels.contract import calibrate as calibrate_function
from mpoe_kernels.planner.cost import gemm_efficiency, rate_and_half_size, step_time
from mpoe_kernels.planner.device import forget
from mpoe_kernels.planner.hardware import ByDtype
from mpoe_kernels.planner.measured import cache_file


@pytest.fixture
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A private cache folder; afterwards everything is read again from the usual one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    forget()
    yield tmp_path
    monkeypatch.undo()
    forget()


def entry() -> dict:
    rates = {"float64": 1e10, "float32": 2e10, "bfloat16": 3e10, "float16": 4e10}
    sizes = dict.fromkeys(rates, 5.0)
    calls = dict.fromkeys(rates, 8e-7)
    scalars = {"bandwidth": 6e9, "new_memory_bandwidth": 2e9, "cache_bandwidth": 7e10}
    return {"flops": rates, "half_size": sizes, "call_seconds": calls, **scalars}


def write(content: object) -> Path:
    path = cache_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    forget()
    return path


def current_file(**changes: object) -> dict:
    from mpoe_kernels.contract import measured

    content = {
        "version": measured.VERSION,
        "machine": measured._machine(),
        "devices": {measured.key("cpu", torch.get_num_threads()): entry()},
    }
    return {**content, **changes}


@pytest.mark.parametrize("name", HARDWARE)
def test_table(name: str) -> None:
    hardware = HARDWARE[name]
    assert hardware.name == name
    assert hardware_of(name.upper()) == hardware
    assert pickle.loads(pickle.dumps(hardware)) == hardware
    for field in dataclasses.fields(Hardware):
        value = getattr(hardware, field.name)
        if isinstance(value, int | float) and field.name not in ("tf32_flops", "sram_bandwidth"):
            assert value > 0, field.name
    assert (
        (hardware.sram_bandwidth > hardware.cache_bandwidth) == (hardware.kind == "gpu") == bool(hardware.matrix_unit)
    )
    assert hardware.note
    assert all(0 < fraction <= 1 for fraction in hardware.gemm_fraction)
    assert hardware.cache_bandwidth > hardware.bandwidth or hardware.kind == "cpu"
    assert hardware.ridge(torch.bfloat16) > 1
    tf32 = hardware.with_tf32()
    assert (tf32.peak_flops.float32 > hardware.peak_flops.float32) == (hardware.kind == "gpu")
    assert tf32.peak_flops.bfloat16 == hardware.peak_flops.bfloat16


def test_this_cpu_scales_with_its_threads(cache_home: Path) -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = hardware_of("cpu")
        torch.set_num_threads(2)
        two = hardware_of(torch.device("cpu"))
    finally:
        torch.set_num_threads(threads)
    assert two.peak_flops.float32 == 2 * one.peak_flops.float32
    assert one.cache_bytes == two.cache_bytes
    assert hardware_here("cpu") == hardware_of("cpu")
    assert hardware_here("mps").kind == "gpu", "ops never fail for want of numbers"


def test_gpus_are_known_by_name(cache_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB", "NVIDIA GeForce RTX 4090"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    properties = [types.SimpleNamespace(name=name) for name in names]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties[index])
    assert hardware_of("cuda") == hardware_of("cuda:0") == HARDWARE["h100"]
    assert hardware_of(torch.device("cuda", 1)) == HARDWARE["a100"]
    with pytest.raises(ValueError, match="no numbers are known for NVIDIA GeForce RTX 4090; name the nearest of cpu"):
        hardware_of("cuda:2")


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA H200", "h200"),
        ("AMD Instinct MI300X", "mi300"),
    ],
)
def test_cards_of_one_generation_have_numbers_of_their_own(
    name: str, key: str, cache_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: types.SimpleNamespace(name=name))
    assert hardware_of("cuda:0") == HARDWARE[key]


def test_calibration_is_kept_and_used(cache_home: Path) -> None:
    write(current_file())
    found = hardware_of("cpu")
    assert found.flops_per_second(torch.bfloat16) == 3e10
    assert found.half_size == ByDtype(5.0, 5.0, 5.0, 5.0)
    assert (found.bandwidth, found.cache_bandwidth, found.call_seconds.bfloat16) == (6e9, 7e10, 8e-7)
    assert "measured on this machine" in found.note
    assert hardware_of("h100") == HARDWARE["h100"]
    plan = plan_contraction(MPOShape.paper(768, 3072, max_bond=16), 8, 512)
    assert plan.hardware == found


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{ not json", "Expecting property name"),
        ("[]", "it is not version 3 of the format"),
        ({"version": 99}, "it is not version 3 of the format"),
        (current_file(machine="another"), r"it was measured on another machine \('another'\)"),
        (current_file(devices=[]), "it holds no devices"),
        (current_file(devices={"cpu x 1": 3}), "an entry is not an object"),
        (
            current_file(devices={"cpu x 1": {**entry(), "bandwidth": -1}}),
            "bandwidth must be a positive number; got -1",
        ),
        (current_file(devices={"cpu x 1": {**entry(), "flops": {"float32": 1.0}}}), "flops must map every dtype"),
        (
            current_file(devices={"cpu x 1": {**entry(), "half_size": {**entry()["half_size"], "float32": "x"}}}),
            "half_size must hold positive numbers",
        ),
    ],
)
def test_broken_or_foreign_calibrations_are_ignored_with_a_warning(
    cache_home: Path, content: object, message: str
) -> None:
    before = hardware_of("cpu")
    path = write(content)
    with pytest.warns(UserWarning, match=message) as caught:
        assert hardware_of("cpu") == before
    assert str(path) in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hardware_of("cpu")  # it warns only once


def test_unreadable_calibration(cache_home: Path) -> None:
    path = cache_file()
    path.mkdir(parents=True)
    with pytest.warns(UserWarning, match="is ignored: it is not a regular file"):
        hardware_of("cpu")


def test_cache_folder_follows_the_platform_rule(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_file() == tmp_path / "mpoe" / "hardware.json"
    for unset in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert cache_file() == Path.home() / ".cache" / "mpoe" / "hardware.json"


def test_calibrate_measures_and_keeps(cache_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    module = importlib.import_module("mpoe_kernels.planner.calibrate")
    timed = []

    def fake_seconds(function, device) -> float:
        timed.append(device)
        if len(timed) % 3 == 2:  # the smallest of the three GEMMs per dtype really runs
            function()
            return 1e-4
        return 1e-3

    monkeypatch.setattr(module, "_seconds", fake_seconds)
    found = calibrate()
    assert len(timed) == 15  # three GEMMs per dtype, two copies, new memory
    assert found == hardware_of("cpu")
    assert found.flops_per_second(torch.float32) == pytest.approx(2 * 512 * 3072 * 768 / 1e-3)
    rate = found.flops_per_second(torch.float32)
    call = found.call_seconds.float32
    assert call == pytest.approx(1e-4 - 2 * 32**3 / rate)
    short = 2 * 16 * 384 * 384 / (rate * gemm_efficiency(16, 384, 384, 1, torch.float32, found)) + call
    assert short == pytest.approx(1e-3), "the model gives the short GEMM back"
    forget()
    assert hardware_of("cpu") == found, "a later process reads the file"
    assert [path.name for path in cache_file().parent.iterdir()] == ["hardware.json"], "nothing partial is left"


def test_a_failed_write_leaves_the_old_file(cache_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mpoe_kernels.contract import measured

    path = write(current_file())
    before = path.read_text()

    def fail(*args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(measured.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        measured.write(path, {})
    assert path.read_text() == before
    assert list(path.parent.iterdir()) == [path]


def test_calibration_refuses_what_is_not_here() -> None:
    with pytest.raises(ValueError, match=r"only a device of this machine can be measured.*got 'h100'"):
        calibrate_function("h100")
    with pytest.raises(ValueError, match="device must be one of cpu"):
        calibrate_function("tpu")


def test_roofline_of_a_step() -> None:
    h100 = HARDWARE["h100"]
    large = Step("y", "gemm", 8192, 8192, 8192, 1, 2 * 2 * 8192**2, 2 * 8192**2)
    time = step_time(large, torch.bfloat16, h100)
    assert time.total == time.compute + time.overhead
    assert time.compute == pytest.approx(2 * 8192**3 / h100.flops_per_second(torch.bfloat16), rel=0.01)
    decode = Step("y", "gemm", 1, 8192, 8192, 1, 2 * 8192**2 + 2 * 8192, 2 * 8192)
    time = step_time(decode, torch.bfloat16, h100)
    assert time.memory == pytest.approx(2 * 8192**2 / 3.35e12, rel=0.01)
    assert time.memory > time.compute
    cached = dataclasses.replace(decode, cached_bytes=2 * 8192**2, working_set=40_000_000)
    assert step_time(cached, torch.bfloat16, h100).memory < 0.7 * time.memory
    too_large = dataclasses.replace(cached, working_set=200_000_000)
    assert step_time(too_large, torch.bfloat16, h100) == time
    copy = Step("copy", "copy", 0, 0, 0, 1, 10**9, 10**9)
    assert step_time(copy, torch.float32, h100).total == pytest.approx(2e9 / 3.35e12, rel=0.01)


def test_a_core_does_one_after_the_other() -> None:
    cpu = dataclasses.replace(HARDWARE["cpu-generic"], units=1)
    small = Step("y", "grouped_gemm", 64, 64, 64, 10, 10 * 2 * 4 * 64**2, 10 * 4 * 64**2)
    assert step_time(small, torch.float32, cpu).memory == 0, "it stays in the core's own cache"
    moved = 10 * 4 * (64 * 4096 + 4096 * 4096 + 64 * 4096)
    large = Step("y", "grouped_gemm", 64, 4096, 4096, 10, moved, 0)
    time = step_time(large, torch.float32, cpu)
    assert time.memory == pytest.approx((moved - 10 * cpu.sram_bytes) / cpu.bandwidth)
    assert time.total == time.compute + time.memory + time.overhead
    efficiency = gemm_efficiency(64, 4096, 4096, 10, torch.float32, cpu)
    assert time.compute == pytest.approx(large.flops / cpu.flops_per_second(torch.float32) / efficiency)


def test_small_gemms_are_slower_per_flop() -> None:
    for name in ("cpu-generic", "h100"):
        hardware = HARDWARE[name]
        rates = [gemm_efficiency(m, 3072, 768, 8, torch.bfloat16, hardware) for m in (1, 8, 64, 512, 4096)]
        assert rates == sorted(rates)
        assert 0 < rates[0] < 0.5 < rates[-1] <= 1
    grouped = Step("y", "grouped_gemm", 8, 64, 64, 64, 10**6, 10**6)
    one_by_one = step_time(grouped, torch.float32, HARDWARE["cpu-generic"]).overhead
    assert one_by_one > 64 * HARDWARE["cpu-generic"].call_seconds.float32
    assert step_time(grouped, torch.float32, HARDWARE["h100"]).overhead == HARDWARE["h100"].launch_seconds


@pytest.mark.parametrize(("rate", "half"), [(2e11, 11.0), (2e12, 120.0)])
def test_two_gemms_give_the_rate_and_the_price_of_shortness(rate: float, half: float) -> None:
    hardware = dataclasses.replace(HARDWARE["cpu-generic"], half_size=ByDtype(*4 * [half]))
    sizes = (256, 768, 768), (16, 768, 768)
    rates = [rate * gemm_efficiency(*mnk, 1, torch.float32, hardware) for mnk in sizes]
    found = rate_and_half_size(sizes[0], rates[0], sizes[1], rates[1])
    assert found == pytest.approx((rate, half))


@pytest.mark.parametrize("short", [1e9, 2e11])
def test_rates_that_no_shortness_explains_are_taken_as_they_are(short: float) -> None:
    rate, half = rate_and_half_size((256, 768, 768), 1e11, (16, 768, 768), short)
    assert rate == 1e11
    assert 0.5 <= half < math.inf
