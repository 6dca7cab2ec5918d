"""Measurements of this machine on disk, made by `calibrate`.

They replace the table's numbers for the device, thread count and processor that they were measured on, and are kept in
``$XDG_CACHE_HOME/mpoe/hardware.json`` (default ``~/.cache``; without a home, the temporary folder).
"""

from __future__ import annotations

import json
import os
import platform
import stat
import tempfile
import warnings
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from mpoe_kernels.planner.hardware import ByDtype, Hardware

VERSION = 3
LARGEST_FILE = 2**24  # bytes; one device takes about a thousand
SMALLEST, LARGEST = 1e-30, 1e30  # largest rate or time; predictions multiply and divide by several
_SCALARS = ("bandwidth", "new_memory_bandwidth", "cache_bandwidth")
_BY_DTYPE = ("flops", "half_size", "call_seconds")


def cache_file(name: str = "hardware.json") -> Path:
    """Where measurements are kept; below the temporary folder for a user without a home."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The specification ignores relative paths.
    if os.path.isabs(base):
        return Path(base) / "mpoe" / name
    home = os.path.expanduser("~")
    if not os.path.isabs(home):  # no HOME and an unknown user, as in containers
        return Path(tempfile.gettempdir()) / "mpoe" / name
    return Path(home) / ".cache" / "mpoe" / name


@lru_cache(maxsize=1)
def processor_name() -> str:
    """Model of this machine's processor, as the system names it; a virtual machine's may be short."""
    try:
        info = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        return next((line.split(":", 1)[1].strip() for line in info.splitlines() if line.startswith("model name")), "")
    except OSError:  # not Linux
        return platform.processor()


def _machine() -> str:
    """What measurements are valid for: processor, host and PyTorch."""
    return f"{platform.node()} / {processor_name()} / torch {torch.__version__}"


def key(device: str, threads: int) -> str:
    return f"{device} x {threads}"


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and SMALLEST < value < LARGEST


def _check_entry(entry: Any) -> None:
    if not isinstance(entry, dict):
        raise ValueError("an entry is not an object")
    for name in _SCALARS:
        if not _positive(entry.get(name)):
            raise ValueError(f"{name} must be a positive number; got {entry.get(name)!r}")
    for name in _BY_DTYPE:
        values = entry.get(name)
        if not isinstance(values, dict) or set(values) != set(ByDtype._fields):
            raise ValueError(f"{name} must map every dtype to a number")
        if not all(_positive(value) for value in values.values()):
            raise ValueError(f"{name} must hold positive numbers; got {values}")


def read(path: Path) -> dict[str, Any]:
    """Entries for this machine; an unusable file is ignored with a warning."""
    try:
        content = read_json(path)
        if content is None:
            return {}
        if not isinstance(content, dict) or content.get("version") != VERSION:
            raise ValueError(f"it is not version {VERSION} of the format")
        if content.get("machine") != _machine():
            raise ValueError(f"it was measured on another machine ({content.get('machine')!r})")
        devices = content.get("devices")
        if not isinstance(devices, dict):
            raise ValueError("it holds no devices")
        for entry in devices.values():
            _check_entry(entry)
    except (OSError, ValueError) as error:
        warnings.warn(
            f"calibration {path} is ignored: {error}; run `mpoe plan --calibrate` to replace it", stacklevel=2
        )
        return {}
    return devices


@lru_cache(maxsize=4)
def _entries(path: Path) -> dict[str, Any]:
    return read(path)


def calibrated(hardware: Hardware, device: str, threads: int) -> Hardware:
    """``hardware`` with this machine's measurements, if there are any."""
    entry = _entries(cache_file()).get(key(device, threads))
    return hardware if entry is None else _with_entry(hardware, entry)


def _with_entry(hardware: Hardware, entry: dict[str, Any]) -> Hardware:
    found = replace(
        hardware,
        peak_flops=ByDtype(**entry["flops"]),
        gemm_fraction=ByDtype(1.0, 1.0, 1.0, 1.0),
        tf32_flops=0.0,  # float32 was measured with or without TF32
        half_size=ByDtype(**entry["half_size"]),
        call_seconds=ByDtype(**entry["call_seconds"]),
        **{name: entry[name] for name in _SCALARS},
        note=f"measured on this machine; sizes from {hardware.note}",
    )
    if hardware.kind == "cpu":
        return found
    # On a GPU one launch serves all experts, and PyTorch keeps its memory: neither cost is modelled there.
    return replace(found, call_seconds=hardware.call_seconds, new_memory_bandwidth=hardware.new_memory_bandwidth)


def read_json(path: Path) -> Any:
    """Content of a small JSON file, ``None`` if there is no file.

    Raises:
        OSError: a file that cannot be read.
        ValueError: not a regular file (reading a pipe would wait for a writer), too large, or not JSON.
    """
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(found.st_mode) or found.st_size > LARGEST_FILE:
        raise ValueError(f"it is not a regular file of at most {LARGEST_FILE} bytes")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def write(path: Path, devices: dict[str, Any]) -> None:
    """Keep the measurements of all devices."""
    write_json(path, {"version": VERSION, "machine": _machine(), "devices": devices})


def write_json(path: Path, content: Any) -> None:
    """Write the file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".partial")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def forget_file() -> None:
    """Read the file again when it is next needed."""
    _entries.cache_clear()
