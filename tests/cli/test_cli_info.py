"""`mpoe --help` and `mpoe info`: quick, and complete."""

from __future__ import annotations

import json
import subprocess
import sys

from mpoe_kernels import backend_reasons
from mpoe_kernels.version import __version__


def test_help_lists_the_commands_without_importing_torch() -> None:
    code = (
        "import sys\nfrom mpoe.cli.main import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as e:\n    assert not e.code\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    for command in ("train", "evaluate", "convert", "generate", "inspect", "info", "demo"):
        assert command in answer.stdout


def test_info_shows_versions_and_backends(cli) -> None:
    assert cli("--version").out == f"mpoe {__version__}\n"
    answer = cli("info")
    assert "eager" in answer.out
    assert "Usage" not in answer.out
    facts = json.loads(cli("info", "--json").out)
    assert facts["packages"]["torch"]
    assert facts["backends"] == backend_reasons()
    assert facts["cores"] >= 1


def test_the_package_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "mpoe", "frobnicate"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer.returncode == 2
    assert "frobnicate" in answer.stderr
