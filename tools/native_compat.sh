#!/usr/bin/env bash
# One wheel for every torch from 2.11 on: builds it against the torch of this Python, audits its library for symbols outside
# the stable ABI (torch-abi-audit), installs it beside the oldest and the newest torch and runs the ops' tests there.
#   tools/native_compat.sh [FOLDER]    environments and wheel in FOLDER (default build/compat); red on any failure
# `python` on PATH builds and needs torch, setuptools >= 77, CMake and torch-abi-audit; NEWEST_PYTHON (default python) runs
# the newest torch. The environments, of about 6 GB each, are kept and used again.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(realpath -m "${1:-build/compat}")
tests="kernels/test_linear.py kernels/test_linear_face.py kernels/test_routing.py kernels/test_ffn.py native"
mkdir -p "$folder"

rm -rf "$folder/wheel" "$folder/tests"
MPOE_BUILD=cpu python -m pip wheel -q --no-deps --no-build-isolation -w "$folder/wheel" .
wheel=$(echo "$folder"/wheel/*-cp311-abi3-*.whl)
python -m zipfile -e "$wheel" "$folder/wheel/unpacked"
torch-abi-audit --check both "$folder/wheel/unpacked/mpoe_kernels/_C.abi3.so"

# Away from the sources, so that what is installed is what is tested.
cp -r tests "$folder/tests"
cp pyproject.toml "$folder/"
check() { # NAME PYTHON REQUIREMENT
    local environment=$folder/$1
    [ -x "$environment/bin/python" ] || "$2" -m venv "$environment"
    "$environment/bin/python" -m pip install -q --no-cache-dir "$3" numpy pytest hypothesis expecttest opt_einsum
    "$environment/bin/python" -m pip install -q --no-deps --no-index --force-reinstall "$wheel"
    (
        cd "$folder/tests"
        "$environment/bin/python" -m mpoe_kernels.info
        # shellcheck disable=SC2086 - a list
        MPOE_REQUIRE_ALL=1 PYTHONPATH= "$environment/bin/python" -m pytest -q -m "" -k "not eager" $tests
    )
}
check oldest python "torch==2.11.*"
check newest "${NEWEST_PYTHON:-python}" torch
